"""A table of the synthetic world's questions for model cards: each kind beside its controls. It runs offline.

Protocol "world (exact word, 8 frames)", as the benchmark `world` of `mmzoo eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from rich.progress import track

from mmzoo.language import MultimodalLM
from mmzoo.world import (
    QUESTION_KINDS,
    TEMPORAL_KINDS,
    Clip,
    Question,
    Split,
    blind_accuracy,
    chance_accuracy,
    make_clip,
)
from mmzoo_eval.asking import put, written
from mmzoo_eval.benchmark import Prompt

PROTOCOL = "world (exact word, 8 frames)"
SHOWN_AT = 128


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of all, with the half width of a 95 % interval (normal approximation)."""

    right: int
    total: int

    @property
    def value(self) -> float:
        return self.right / self.total

    @property
    def margin(self) -> float:
        return 1.96 * sqrt(self.value * (1 - self.value) / self.total)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.margin:.1f}"


def clips_of(split: Split, count: int, first: int = 0) -> list[Clip]:
    """Clips of one split, rendered at the size at which they are shown."""
    return [make_clip(first + i, split=split, size=SHOWN_AT) for i in range(count)]


@torch.no_grad()
def evaluate(
    model: MultimodalLM, clips: Sequence[Clip], *, batch_size: int = 6, show: bool = False
) -> dict[str, Accuracy]:
    """Accuracy of a model on every question of the clips, by kind.

    Args:
        model: with its processor.
        clips: frames of any size; the processor resizes them.
        batch_size: clips of a batch.
        show: draw a progress bar.
    """
    right: dict[str, list[bool]] = {}
    starts = range(0, len(clips), batch_size)
    for start in track(starts, description="answering", disable=not show, transient=True):
        asked = [(clip, question) for clip in clips[start : start + batch_size] for question in clip.questions]
        for (_, question), answer in zip(asked, answers(model, asked), strict=True):
            right.setdefault(question.kind, []).append(answer == question.answer)
    return {kind: Accuracy(sum(right[kind]), len(right[kind])) for kind in QUESTION_KINDS if kind in right}


def answers(model: MultimodalLM, asked: Sequence[tuple[Clip, Question]]) -> list[str]:
    """What the model says to each (clip, question)."""
    videos = [model.processor.read_video(clip.frames) for clip, _ in asked]
    texts = [put(model, Prompt(question.text), video) for (_, question), video in zip(asked, videos, strict=True)]
    return [text.strip() for text in written(model, texts, videos, max_new_tokens=4, do_sample=False)]


def levels(clips: Sequence[Clip]) -> dict[str, tuple[float, float]]:
    """Chance and blind level of each kind."""
    chance, blind = chance_accuracy(clips), blind_accuracy(clips)
    return {kind: (chance[kind], blind[kind]) for kind in chance}


def report(model: MultimodalLM, count: int = 300, *, show: bool = False) -> dict[str, dict[str, object]]:
    """The benchmark: test clips, the same clips reversed, and clips of unseen combinations.

    Returns:
        for each kind: chance, blind, test, "reversed, right answers" (the reversed clip and its own answers),
        "reversed, old answers" (the reversed clip and the answers of the forward one: low where time is seen) and
        unseen.
    """
    test, unseen = clips_of("test", count), clips_of("unseen", count)
    backwards = [clip.reversed() for clip in test]
    stale = [_with_answers_of(clip, forward) for clip, forward in zip(backwards, test, strict=True)]
    columns = {
        "test": evaluate(model, test, show=show),
        "reversed, right answers": evaluate(model, backwards, show=show),
        "reversed, old answers": evaluate(model, stale, show=show),
        "unseen": evaluate(model, unseen, show=show),
    }
    return {
        kind: {"chance": chance, "blind": blind, **{name: column[kind] for name, column in columns.items()}}
        for kind, (chance, blind) in levels(test).items()
    }


def _with_answers_of(clip: Clip, other: Clip) -> Clip:
    return replace(clip, questions=other.questions)


def markdown(rows: dict[str, dict[str, object]]) -> str:
    """The report as a table; temporal kinds are marked."""
    names = list(next(iter(rows.values())))
    lines = ["| question | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, row in rows.items():
        cells = [f"{100 * cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        lines.append(f"| {kind}{' (temporal)' if kind in TEMPORAL_KINDS else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
