"""What lmms-eval asks, put to a zoo model. This module does not import lmms-eval; `mmzoo_eval.lmms_plugin` does.

Every request becomes messages as lmms-eval's chat form has them: `{"role": ..., "content": [{"type": "video", "url":
...}, {"type": "text", "text": ...}]}`. A medium is a PIL image, the path of an image or a video, or the frames of a
video as a list of pictures or a uint8 array [T, H, W, 3]. A video is read by the rule of the family's processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from mmzoo.errors import EvaluationError, InputError, MmzooError
from mmzoo.language import MultimodalLM
from mmzoo.media import read_image
from mmzoo.processing import IMAGE, VIDEO, Turn, is_image
from mmzoo_eval.asking import continued, opened, places, written

MAX_NEW_TOKENS = 1024
"""Of an answer to a task that does not say."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
GENERATION = (
    *("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
    *("until", "do_sample", *SAMPLING),
)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        document: which document of which task it belongs to, in words.
        text: what lmms-eval wrote of it; requests about one document with one text show the same.
        messages: made when they are needed: they hold media.
        options: lmms-eval's `generation_kwargs`.
    """

    document: str
    text: str
    messages: Callable[[], Sequence[Message]]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Rounds:
    """A request of several rounds: each is asked alone, and the task makes it of what was said before.

    Attributes:
        asked: the round that is open.
        following: with previous_output, round_idx and previous_round_info -> (messages, whether it is over, what was
            said as the task wants to keep it, or None, the next previous_round_info).
    """

    asked: Asked
    following: Callable[..., tuple[Sequence[Message] | None, bool, Sequence[str] | None, Any]]
    said: list[str] = field(default_factory=list)
    asked_rounds: int = 0
    info: Any = None

    def goes_on(self, answer: str) -> bool:
        """Whether the task asks again after an answer."""
        self.said.append(answer)
        self.asked_rounds += 1
        known = {"previous_output": list(self.said), "previous_round_info": self.info}
        messages, over, said, self.info = self.following(round_idx=self.asked_rounds, **known)
        self.said = self.said if said is None else list(said)
        if not over:
            self.asked = replace(self.asked, messages=lambda: messages or [])
        return not over


@dataclass(frozen=True)
class Asker:
    """Puts requests to a model.

    lmms-eval has no state for a document that could not be asked: whatever stood in its place would be scored as an
    answer. So each method raises EvaluationError, which names the document, for a video or an image that cannot be
    read, a medium that the model does not take, a dialogue that the family has no words for, and an unknown option.

    Attributes:
        model: in evaluation mode, with its processor.
        batch_size: requests of a batch.
        system: in place of the system text of the messages and of the processor.
        deadline: seconds after which a video is given up.
        ignored: options of tasks that are left out on purpose.
        quiet: show no progress bar.
    """

    model: MultimodalLM
    batch_size: int = 1
    system: str | None = None
    deadline: float = 120.0
    ignored: Sequence[str] = ()
    quiet: bool = True

    def generate(self, asked: Sequence[Asked]) -> list[str]:
        """What the model says to each request, cut where the task says, without white space around it."""
        said = [""] * len(asked)
        for batch in track(self._batches(asked), description="answering", disable=self.quiet):
            some = [asked[i] for i in batch]
            options, until = generation(some[0].options, self.ignored)
            if until:
                options["stopping_criteria"] = StoppingCriteriaList([_Until(self.model.processor.tokenizer, until)])
            texts, media = zip(*map(self._put, some), strict=True)
            with _about(some):
                answers = written(self.model, texts, media, **options)
            for i, answer in zip(batch, answers, strict=True):
                said[i] = cut(answer, until)
        return said

    def generate_rounds(self, rounds: Sequence[Rounds]) -> list[list[str]]:
        """What the model says in each round of each request."""
        open_ = list(rounds)
        while open_:
            answers = self.generate([one.asked for one in open_])
            open_ = [one for one, answer in zip(open_, answers, strict=True) if one.goes_on(answer)]
        return [one.said for one in rounds]

    def losses(self, asked: Sequence[Asked], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """Mean loss of each continuation's tokens, and whether each of them is the likeliest.

        lmms-eval's interface speaks of log-likelihoods, but its evaluator takes the least of the options for the
        answer, and its own models give the loss.

        lmms-eval puts a task's delimiter before a continuation, usually a space. What stands between prompt and answer
        is the family's business: the white space before a continuation is replaced by it.
        """
        gap = self.model.processor.before_answer
        found: list[tuple[float, bool]] = []
        same = groupby(zip(asked, continuations, strict=True), lambda pair: (pair[0].document, pair[0].text))
        for pairs in track([list(group) for _, group in same], "scoring", disable=self.quiet):
            text, media = self._put(pairs[0][0])
            for start in range(0, len(pairs), self.batch_size):
                some = pairs[start : start + self.batch_size]
                with _about([one for one, _ in some[:1]]):
                    wanted = [gap + continuation.lstrip() for _, continuation in some]
                    scored = continued(self.model, text, media, wanted)
                found += [(-float(one.log_probabilities.mean()), one.greedy) for one in scored]
        return found

    def _batches(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Requests with the same options, in their order; every option is looked at before anything is asked."""
        alike: dict[str, list[int]] = {}
        for i, one in enumerate(asked):
            with _about([one]):
                alike.setdefault(repr(generation(one.options, self.ignored)), []).append(i)
        size = self.batch_size
        return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]

    def _put(self, asked: Asked) -> tuple[str, list[Any]]:
        """The text of a request in the family's words, and the media that it shows."""
        with _about([asked]):
            system, turns, media = dialogue(asked.messages(), self._read)
            system = system if self.system is None else self.system
            return opened(self.model.processor, turns, system), media

    def _read(self, medium: Any) -> Any:
        """A picture, or a `Video` by the rule of the family's processor."""
        path = isinstance(medium, (str, os.PathLike))
        if is_image(medium):
            return read_image(medium)
        if path or isinstance(medium, (list, tuple)) or getattr(medium, "ndim", None) == 4:
            return self.model.processor.read_video(medium, deadline=self.deadline)
        return read_image(medium)


@contextmanager
def _about(asked: Sequence[Asked]) -> Iterator[None]:
    try:
        yield
    except MmzooError as error:
        raise EvaluationError(
            f"{', '.join(one.document for one in asked)}: {error} lmms-eval would score whatever stood in place of an "
            "answer, so the evaluation stops. Repair the document or leave it out."
        ) from error


def generation(options: Mapping[str, Any], ignored: Sequence[str] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """lmms-eval's `generation_kwargs` -> options of transformers' `generate`, and the strings before which answers end.

    A temperature of 0, or do_sample false, decodes greedily (or with beams); then the options of sampling mean nothing,
    and tasks give them all the same. A temperature above 0 without do_sample samples.

    Raises:
        InputError: an option that this does not know, or `until` that is not text.
    """
    given = {name: value for name, value in options.items() if value is not None and name not in ignored}
    if unknown := sorted(given.keys() - set(GENERATION)):
        raise InputError(
            f"The task has options of generation that mmzoo does not know: {', '.join(unknown)}. It knows "
            f"{', '.join(GENERATION)}. To leave options out, name them: --model_args ignore={'+'.join(unknown)}."
        )
    until = given.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(one, str) for one in until):
        raise InputError(f"`until` is a text or a list of texts, not {until!r}.")
    temperature = given.get("temperature")
    sample = bool(given.pop("do_sample", temperature)) and temperature != 0
    kept = {name: value for name, value in given.items() if sample or name not in SAMPLING}
    return {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **kept, "do_sample": sample}, tuple(filter(None, until))


def cut(answer: str, until: Sequence[str]) -> str:
    """An answer up to the first of some strings, without white space around it."""
    return answer[: min([answer.find(one) for one in until if one in answer], default=len(answer))].strip()


class _Until(StoppingCriteria):
    """Ends an answer that holds one of some strings."""

    def __init__(self, tokenizer: Any, until: Sequence[str]):
        self.tokenizer, self.until = tokenizer, until
        self.prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.prompt is None:
            self.prompt = input_ids.shape[1] - 1
        answers = self.tokenizer.batch_decode(input_ids[:, self.prompt :], skip_special_tokens=True)
        ended = [any(one in answer for one in self.until) for answer in answers]
        return torch.tensor(ended, device=input_ids.device)


def visual_messages(visuals: Sequence[Any] | None, text: str) -> list[Message]:
    """lmms-eval's simple form as messages: what `doc_to_visual` returns stands before the text."""
    shown = [{"type": "visual", "url": visual} for visual in visuals or ()]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def framed(messages: Sequence[Message], metadata: Mapping[str, Any]) -> Sequence[Message]:
    """Messages in which a video's frames are one video, for a task that gives frames as pictures.

    Such a task says in its metadata that its task_type is video, and a number of sample_frames.
    """
    if metadata.get("task_type") != "video" or "sample_frames" not in metadata:
        return messages
    return [{**message, "content": _framed(message["content"])} for message in messages]


def _framed(content: Any) -> Any:
    if isinstance(content, str):
        return content
    picture = [one["type"] in ("image", "visual") and not isinstance(one["url"], str) for one in content]
    frames = [one["url"] for one, is_frame in zip(content, picture) if is_frame]
    others = [one for one, is_frame in zip(content, picture) if not is_frame]
    return [{"type": "video", "url": frames}, *others] if frames else content


def dialogue(messages: Sequence[Message], read: Callable[[Any], Any]) -> tuple[str | None, list[Turn], list[Any]]:
    """Messages -> system text, turns, and media in the order of their places.

    Media that come before the text of a message stand where the family puts them; media between texts stand there. A
    text that holds places of its own keeps them.

    Raises:
        InputError: roles in another order than system, user, assistant, user ...; or a content that is none of text,
            image and video.
    """
    roles = [str(message["role"]) for message in messages]
    system = "system" in roles[:1]
    pairs = messages[int(system) :]
    if len(pairs) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles[int(system) :])):
        raise InputError(f"A dialogue goes: system (or not), user, assistant, user ..., user. This one: {roles}.")
    media: list[Any] = []
    turns = []
    for i in range(0, len(pairs), 2):
        answer = _text(pairs[i + 1]) if i + 1 < len(pairs) else ""
        pieces = [one if isinstance(one, str) else read(_shown(one)) for one in _pieces(pairs[i])]
        media += [one for one in pieces if not isinstance(one, str)]
        turns.append(_turn(pieces, answer))
    return _text(messages[0]) if system else None, turns, media


def _turn(pieces: Sequence[Any], answer: str) -> Turn:
    """A question of texts and media, and its answer."""
    question = "".join(piece for piece in pieces if isinstance(piece, str))
    if IMAGE in question or VIDEO in question:
        return Turn(question, answer)
    started = [isinstance(piece, str) for piece in pieces]
    if started == sorted(started):
        return Turn(question, answer, places([piece for piece in pieces if not isinstance(piece, str)]))
    return Turn("".join(piece if isinstance(piece, str) else places([piece]) for piece in pieces), answer)


def _pieces(message: Message) -> list[Any]:
    """Texts as text, everything else as it is."""
    content = message["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [one["text"] if one["type"] == "text" else one for one in content]


def _text(message: Message) -> str:
    pieces = _pieces(message)
    if not all(isinstance(piece, str) for piece in pieces):
        raise InputError(f"Media stand in the words of the role {message['role']!r}. Only a user shows something.")
    return "".join(pieces)


def _shown(item: Mapping[str, Any]) -> Any:
    """The medium of a piece of content."""
    medium = item.get("url", item.get("path"))
    if isinstance(medium, Mapping):
        return _shown({"type": item["type"], **medium})
    if item["type"] not in ("image", "video", "visual") or medium is None:
        raise InputError(f"mmzoo's models take images and videos, not {item['type']!r} with {', '.join(item)}.")
    if any(item.get(name) is not None for name in ("start_time", "end_time", "video_start", "video_end")):
        raise InputError(f"Only whole videos are read, not a part of {medium!r}. Cut the file first.")
    return medium
