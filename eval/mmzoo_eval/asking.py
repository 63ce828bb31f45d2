"""How items are put to one model: media read, prompts in the family's words, and answers or likelihoods out.

Shape legend: L tokens, A tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.language import MultimodalLM
from mmzoo.media import Video, read_image, read_video
from mmzoo.processing import IMAGE, VIDEO, Turn
from mmzoo_eval.benchmark import Answers, Benchmark, Frames, Item, Prompt, Protocol, Verdict, lettered


@dataclass(frozen=True)
class Media:
    """What a benchmark shows, and how it is read.

    Attributes:
        benchmark: whose items these are.
        folder: that `Item.media` starts from.
        frames: which frames are looked at.
        deadline: seconds after which a video is given up.
    """

    benchmark: Benchmark
    folder: Path
    frames: Frames
    deadline: float = 120.0

    def read(self, item: Item, processor: Any) -> Any:
        """The picture or `Video` of an item, or None if it shows nothing.

        A model that hears is given the sound of files, too, if the choice of frames is left to it: its frames stand for
        half a second each, and those of other rules are not in step with the sound.

        Raises:
            VideoReadError, AudioReadError: the video, or its sound, cannot be read.
            InputError: the picture cannot be read.
        """
        if not item.media:
            return None
        if self.benchmark.media == "image":
            return read_image(self._path(item))
        frames = self.frames.of(processor)
        options: dict[str, Any] = {"sampling": frames.sampling, "num_frames": frames.num_frames, "fps": frames.fps}
        options["video_fps"] = item.details.get("video_fps")
        options["bound"] = item.bound if frames.sampling == "mvbench" else None
        options["stop"] = item.details.get("cut_frame")
        if self.benchmark.make:
            made, sound = read_video(self.benchmark.make(item), **options), self.benchmark.sound
            return processor.with_sound(made, sound(item)) if processor.hears and sound else made
        seen = read_video(self._path(item), deadline=self.deadline, **options)
        if not processor.hears or self.frames.sampling is not None or self._path(item).is_dir():
            return seen
        stop = options["stop"] / seen.fps if options["stop"] and seen.fps else None
        return processor.with_sound(seen, self._path(item), stop)

    def _path(self, item: Item) -> Path:
        """Where an item's file is; some benchmarks keep a few of theirs elsewhere than they say."""
        path, pattern = self.folder / item.media, item.details.get("media_pattern")
        if path.exists() or not pattern:
            return path
        return next(iter(sorted(self.folder.glob(pattern))), path)

    def sha256(self, item: Item) -> str:
        """Digest of what an item shows: of the file, of a folder's files with their names, or of made frames.

        A file that is not there has a digest too, so that the item is asked again when it is.
        """
        if not item.media:
            return ""
        if self.benchmark.make:
            sound = self.benchmark.sound(item).tobytes() if self.benchmark.sound else b""
            return hashlib.sha256(self.benchmark.make(item).tobytes() + sound).hexdigest()
        path = self._path(item)
        if not path.is_dir():
            return _file_sha256(path)
        names = sorted(one.name for one in path.iterdir() if one.is_file())
        return hashlib.sha256("".join(f"{name} {_file_sha256(path / name)}\n" for name in names).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    if not path.is_file():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_likelihood(protocol: Protocol, answers: Answers) -> Protocol:
    """The protocol with its prompts, for which the model chooses the likeliest of the options instead of writing.

    Args:
        protocol: of items with options.
        answers: "letters" compares the options' letters after what the protocol lets the answer begin with; "options"
            compares their words, by the mean log-probability of a token, as EgoSchema's variant mc_ppl does.
    """

    def judge(item: Item, response: str) -> Verdict:
        number = ord(response) - ord("A")
        return Verdict(float(number == item.answer), number)

    return replace(protocol, name=f"{protocol.name}, likelihood of {answers}", answers=answers, judge=judge)


def put(model: MultimodalLM, prompt: Prompt, medium: Any) -> str:
    """A prompt in a family's words, up to where the model goes on. A system text stands as in `opened`."""
    text = opened(model.processor, [Turn(prompt.user, "", places(all_of(medium)))], prompt.system)
    return text + model.processor.before_answer + prompt.start if prompt.start else text


def opened(processor: Any, turns: Sequence[Turn], system: str | None = None) -> str:
    """The text of a dialogue, up to where the model answers its last turn.

    A system text opens the first question in families that have no place for one.

    Args:
        processor: of the family.
        turns: from the first on; the answer of the last is not looked at.
        system: in place of the processor's own system text.

    Raises:
        InputError: several turns, for a family that takes one.
    """
    first, *others = turns
    if system is not None and not has_system(processor):
        first, system = first._replace(question=f"{system.rstrip()}\n{first.question}"), None
    if not others:
        return processor.prompt(first.question, first.media, system=system)
    answer = "\ufffc"  # stands for an object in a text, so that no text holds it by itself
    whole = processor.dialogue([first, *others[:-1], others[-1]._replace(answer=answer)], system)
    return whole[: whole.rindex(answer)].removesuffix(processor.before_answer)


def all_of(medium: Any) -> list[Any]:
    """Media as a list: of None, of a picture, of a `Video`, or of a list of these."""
    return list(medium) if isinstance(medium, (list, tuple)) else [] if medium is None else [medium]


def places(media: Sequence[Any]) -> str:
    """The places of media in a text."""
    return "".join(VIDEO if isinstance(medium, Video) else IMAGE for medium in media)


def has_system(processor: Any) -> bool:
    """Whether a family has a place for a system text."""
    try:
        processor.prompt("", system="")
    except InputError:
        return False
    return True


def responses(
    model: MultimodalLM, protocol: Protocol, items: Sequence[Item], prompts: Sequence[Prompt], media: Sequence[Any]
) -> list[str]:
    """What a model says to a batch of items: its own words, or the letter of the likeliest option."""
    if protocol.answers == "text":
        texts = [put(model, *one) for one in zip(prompts, media)]
        return written(model, texts, media, max_new_tokens=protocol.max_new_tokens, do_sample=False, num_beams=1)
    return [_likeliest(model, protocol.answers, *one) for one in zip(items, prompts, media, strict=True)]


@torch.no_grad()
def written(model: MultimodalLM, texts: Sequence[str], media: Sequence[Any], **generation: Any) -> list[str]:
    """What a model writes after each text of a batch.

    Args:
        model: with its processor.
        texts: as `put` and `opened` give them.
        media: for each text the picture or `Video` that it shows, a list of these, or None.
        **generation: options of transformers' `generate`.
    """
    shown = [all_of(medium) for medium in media]
    videos = [[one for one in each if isinstance(one, Video)] for each in shown]
    images = [[one for one in each if not isinstance(one, Video)] for each in shown]
    batch = model.processor(list(texts), images=images, videos=videos).to(model.device)
    tokens = model.generate(**batch, **generation)
    return model.processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _likeliest(model: MultimodalLM, answers: Answers, item: Item, prompt: Prompt, medium: Any) -> str:
    if answers == "letters":
        choices = [lettered(i) for i in range(len(item.options))]
    else:
        choices, prompt = list(item.options), prompt._replace(start="")
    gap = "" if prompt.start else model.processor.before_answer
    found = likelihoods(model, put(model, prompt, medium), medium, [gap + choice for choice in choices])
    return lettered(found.index(max(found)))


def likelihoods(model: MultimodalLM, text: str, medium: Any, continuations: Sequence[str]) -> list[float]:
    """Mean log-probability of a token of each continuation of a text: the negative of its loss.

    Arguments and errors are those of `continued`.
    """
    return [float(one.log_probabilities.mean()) for one in continued(model, text, medium, continuations)]


class Continued(NamedTuple):
    """What a model gives a continuation: the log-probability of each of its tokens, float32 [A]; greedy if each of them
    is the likeliest.
    """

    log_probabilities: Tensor
    greedy: bool


@torch.no_grad()
def continued(model: MultimodalLM, text: str, medium: Any, continuations: Sequence[str]) -> list[Continued]:
    """How likely a model finds each continuation of a text.

    Args:
        model: with its processor.
        text: as `put` gives it.
        medium: the picture or `Video` that it shows, a list of these, or None.
        continuations: any number.

    Raises:
        InputError: a continuation adds no token.
    """
    videos = [one for one in all_of(medium) if isinstance(one, Video)]
    images = [one for one in all_of(medium) if not isinstance(one, Video)]
    before, *whole = (model.processor.sample(text + one, images, videos) for one in ("", *continuations))
    ids, layouts, pixels = zip(*whole, strict=True)
    batch = model.processor.collate(ids, layouts, pixels, padding_side="right").to(model.device)
    logits = model(**{name: batch[name] for name in batch if name != "attention_mask"}).logits
    rows = zip(logits, ids, strict=True)
    return [_continued(row, tokens, _shared(before[0], tokens)) for row, tokens in rows]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with: at a seam the tokenizer may join what was given apart."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _continued(logits_LV: Tensor, tokens: Sequence[int], start: int) -> Continued:
    if start >= len(tokens):
        raise InputError("An option adds no token to the prompt: it is empty, or the tokenizer drops it.")
    told = torch.tensor(tokens[start:], device=logits_LV.device)
    scores_AV = logits_LV[start - 1 : len(tokens) - 1].float().log_softmax(-1)
    return Continued(scores_AV.gather(1, told[:, None])[:, 0], bool((scores_AV.argmax(-1) == told).all()))
