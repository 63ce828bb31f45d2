"""What a benchmark is: items from its annotation files, and protocols that ask, judge and sum up.

Everything here is data and small pure functions. The runner asks models; a benchmark never does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmzoo.errors import InputError

ANSWERED, UNANSWERED, UNREADABLE, FAILED = "answered", "unanswered", "unreadable media", "model error"
STATES = (ANSWERED, UNANSWERED, UNREADABLE, FAILED)

Answers = Literal["text", "letters", "options"]
"""How a model answers: it writes, or the likeliest of the options' letters or of their words is taken."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its benchmark.
        question: as annotated.
        answer: what is right: the index of an option where there are options, else the annotation's own.
        options: without letters of their own.
        media: path of the video, folder of frames or image, below the folder of media; "" without one.
        kind: the group that the benchmark reports by, such as the task.
        cluster: what items share that are not independent, such as their video.
        bound: start and end in seconds, where only a part of the video is meant.
        details: every other field that a protocol needs.
    """

    id: str
    question: str
    answer: Any = None
    options: tuple[str, ...] = ()
    media: str = ""
    kind: str = ""
    cluster: str = ""
    bound: tuple[float, float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Prompt(NamedTuple):
    """What a model is told: the user's words (media stand before them), a system text, and how its answer begins."""

    user: str
    system: str | None = None
    start: str = ""


class Verdict(NamedTuple):
    """What a protocol makes of a response.

    Attributes:
        score: usually 0 or 1; None where the protocol drops the item from its denominator.
        parsed: what was read from the response; None if nothing was: the item counts as unanswered, whatever its score.
    """

    score: float | None
    parsed: Any = None


@dataclass(frozen=True)
class Judged:
    """An item with what the model said to it. `verdict` is None for unreadable media and model errors."""

    item: Item
    response: str | None
    verdict: Verdict | None
    state: str


@dataclass(frozen=True)
class Frames:
    """Which frames are looked at: a rule of `mmzoo.media.SAMPLING_RULES` with its numbers.

    Attributes:
        sampling: None leaves it to the model's processor, and also `num_frames` where that is None.
        num_frames: frames wanted.
        fps: frames a second wanted, for rules by rate.
    """

    sampling: str | None = None
    num_frames: int | None = None
    fps: float | None = None

    def of(self, processor: Any) -> Frames:
        """With what is left to a model's processor filled in."""
        if self.sampling is not None:
            return self
        return Frames(processor.sampling, self.num_frames or processor.num_frames, self.fps)

    def __str__(self) -> str:
        counts = (f"{self.num_frames} frames" if self.num_frames else "", f"{self.fps:g} frames/s" if self.fps else "")
        return " at ".join(filter(None, counts)) or f"frames: {self.sampling}"


Message = dict[str, str]
Judge = Callable[[list[Message]], str]
"""Messages with `role` and `content` -> the reply of a language model that reads answers."""


@dataclass(frozen=True)
class Protocol:
    """One way to ask, judge and sum up.

    Attributes:
        name: unique in its benchmark; it is printed with every score.
        source: whose rules these are: repository and commit.
        judge: (item, response) -> Verdict.
        aggregate: scored items -> metric -> value, in the protocol's own unit and under its own names. It gets those
            that have a verdict.
        headline: the metric that is printed first.
        prompt: item -> Prompt; None where the source judges only.
        frames: which frames are shown.
        max_new_tokens: of an answer.
        unit: "percent" or "fraction" or "points", of the headline.
        answers: what `judge` is given; `by_likelihood` makes the other kinds.
        own: item -> the item as this protocol shows it, where its suite has other copies of the videos.
    """

    name: str
    source: str
    judge: Callable[[Item, str], Verdict]
    aggregate: Callable[[Sequence[Judged]], dict[str, float]]
    headline: str
    prompt: Callable[[Item], Prompt] | None = None
    frames: Frames = Frames()
    max_new_tokens: int = 16
    unit: Literal["percent", "fraction", "points"] = "percent"
    answers: Answers = "text"
    own: Callable[[Item], Item] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: as in `mmzoo eval run MODEL NAME`.
        title: as papers write it.
        read: folder or file of annotations, as published -> items. Raises DatasetError, with file and field.
        protocols: by name; the first is the default.
        media: what is shown.
        data: where the annotations are published and how the folder has to look, in one or two sentences.
        dataset_id: name of the benchmark's data set on the Hub, where it has one.
        judged_by: (judge, its name) -> the protocols in which it reads the answers, where there are any.
        make: item -> uint8 frames [T, H, W, 3], for a benchmark whose videos are no files.
        sound: item -> float32 samples [S] at 16 kHz, of what is made.
    """

    name: str
    title: str
    read: Callable[[Path], list[Item]]
    protocols: Mapping[str, Protocol]
    media: Literal["video", "image"] = "video"
    data: str = ""
    dataset_id: str | None = None
    judged_by: Callable[[Judge, str], Mapping[str, Protocol]] | None = None
    make: Callable[[Item], np.ndarray] | None = None
    sound: Callable[[Item], np.ndarray] | None = None

    def protocol(self, name: str | None = None) -> Protocol:
        """The protocol of that name, or the default. Raises InputError, with the names there are."""
        if not self.protocols:
            raise InputError(f"The answers of {self.title} are read by a judge: give one.")
        if name is None:
            return next(iter(self.protocols.values()))
        if name not in self.protocols:
            raise InputError(f"{self.title} has no protocol {name!r}. It has: {', '.join(self.protocols)}.")
        return self.protocols[name]


@dataclass(frozen=True)
class FileScorer:
    """What scores files of predictions and asks no model, as in `mmzoo eval score NAME FILES...`.

    Attributes:
        name: as in the command.
        title: as papers write it.
        protocols: names; the first is the default.
        files: what it takes, in this order: name -> what it holds.
        compute: (files, protocol) -> metric -> value. Raises DatasetError, with file and field.
        headline: the metric that is printed first.
        source: whose rules these are: repository and commit.
        unit: "percent" or "fraction" or "points", of the headline.
    """

    name: str
    title: str
    protocols: tuple[str, ...]
    files: Mapping[str, str]
    compute: Callable[[Sequence[Path], str], dict[str, float]]
    headline: str
    source: str
    unit: Literal["percent", "fraction", "points"] = "percent"

    def score(self, paths: Sequence[str | Path], protocol: str | None = None) -> dict[str, float]:
        """Metric -> value. Raises InputError for another number of files, or a protocol that there is not."""
        chosen = self.protocols[0] if protocol is None else protocol
        if chosen not in self.protocols:
            raise InputError(f"{self.title} has no protocol {chosen!r}. It has: {', '.join(self.protocols)}.")
        if len(paths) != len(self.files):
            wanted = ", ".join(f"{name} ({what})" for name, what in self.files.items())
            raise InputError(f"{self.title} takes {len(self.files)} files, not {len(paths)}: {wanted}.")
        return self.compute([Path(path) for path in paths], chosen)


def by_name(*protocols: Protocol) -> dict[str, Protocol]:
    """Protocols as a benchmark holds them."""
    return {protocol.name: protocol for protocol in protocols}


def judged(item: Item, response: str, protocol: Protocol) -> Judged:
    """An item with the protocol's verdict on a response."""
    verdict = protocol.judge(item, response)
    return Judged(item, response, verdict, UNANSWERED if verdict.parsed is None else ANSWERED)


def mean(values: Sequence[float], scale: float = 1.0) -> float:
    """The mean times a scale; nan of nothing."""
    return scale * sum(values) / len(values) if values else float("nan")


def scores(rows: Sequence[Judged]) -> list[float]:
    """The scores that count."""
    return [row.verdict.score for row in rows if row.verdict is not None and row.verdict.score is not None]


def by_kind(rows: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Rows by the kind of their item, in the order of first appearance."""
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        groups.setdefault(row.item.kind, []).append(row)
    return groups


def lettered(number: int) -> str:
    """A, B, C ... for 0, 1, 2 ..."""
    return chr(ord("A") + number)
