"""How items are put to one model: media read, prompts in the family's words, and answers or likelihoods out.

Shape legend: L tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.language import MultimodalLM
from mmzoo.media import Video, read_image, read_video
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

        Raises:
            VideoReadError: the video cannot be read.
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
            return read_video(self.benchmark.make(item), **options)
        return read_video(self._path(item), deadline=self.deadline, **options)

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
            return hashlib.sha256(self.benchmark.make(item).tobytes()).hexdigest()
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
    """A prompt in a family's words, up to where the model goes on.

    A system text opens the question in families that have no place for one.
    """
    processor, user, system = model.processor, prompt.user, prompt.system
    place = "" if medium is None else "<video>" if isinstance(medium, Video) else "<image>"
    if system is not None and not has_system(processor):
        user, system = f"{system.rstrip()}\n{user}", None
    text = processor.prompt(user, place, system=system)
    return text + processor.before_answer + prompt.start if prompt.start else text


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
        return written(model, [put(model, *one) for one in zip(prompts, media)], media, protocol.max_new_tokens)
    return [_likeliest(model, protocol.answers, *one) for one in zip(items, prompts, media, strict=True)]


@torch.no_grad()
def written(model: MultimodalLM, texts: Sequence[str], media: Sequence[Any], max_new_tokens: int) -> list[str]:
    """What a model writes, greedily, to each text, which shows a picture, a `Video` or nothing."""
    videos = [[medium] if isinstance(medium, Video) else [] for medium in media]
    images = [[] if medium is None or isinstance(medium, Video) else [medium] for medium in media]
    batch = model.processor(list(texts), images=images, videos=videos).to(model.device)
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    return model.processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _likeliest(model: MultimodalLM, answers: Answers, item: Item, prompt: Prompt, medium: Any) -> str:
    if answers == "letters":
        choices = [lettered(i) for i in range(len(item.options))]
    else:
        choices, prompt = list(item.options), prompt._replace(start="")
    gap = "" if prompt.start else model.processor.before_answer
    found = likelihoods(model, put(model, prompt, medium), medium, [gap + choice for choice in choices])
    return lettered(found.index(max(found)))


@torch.no_grad()
def likelihoods(model: MultimodalLM, text: str, medium: Any, continuations: Sequence[str]) -> list[float]:
    """Mean log-probability of a token of each continuation of a text: the negative of its loss.

    Args:
        model: with its processor.
        text: as `put` gives it.
        medium: the picture or `Video` that it shows, or None.
        continuations: any number.

    Raises:
        InputError: a continuation adds no token.
    """
    videos = [medium] if isinstance(medium, Video) else []
    images = [] if medium is None or videos else [medium]
    before, *whole = (model.processor.sample(text + one, images, videos) for one in ("", *continuations))
    ids, layouts, pixels = zip(*whole, strict=True)
    batch = model.processor.collate(ids, layouts, pixels, padding_side="right").to(model.device)
    logits = model(**{name: batch[name] for name in batch if name != "attention_mask"}).logits
    rows = zip(logits, ids, strict=True)
    return [_mean_log_probability(row, tokens, _shared(before[0], tokens)) for row, tokens in rows]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with: at a seam the tokenizer may join what was given apart."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _mean_log_probability(logits_LV: Tensor, tokens: Sequence[int], start: int) -> float:
    if start >= len(tokens):
        raise InputError("An option adds no token to the prompt: it is empty, or the tokenizer drops it.")
    told = torch.tensor(tokens[start:], device=logits_LV.device)
    return float(logits_LV[start - 1 : len(tokens) - 1].float().log_softmax(-1).gather(1, told[:, None]).mean())
