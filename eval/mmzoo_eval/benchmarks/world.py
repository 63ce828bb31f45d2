"""The synthetic world's benchmark: it runs offline, and every temporal question has the reversed clip as its control.

Protocol "exact word": a clip is rendered at 128 pixels, the model answers greedily, and an answer counts if it is
exactly the right word.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from mmzoo.world import QUESTION_KINDS, Clip, Split, make_clip
from mmzoo_eval.benchmark import (
    Benchmark,
    Frames,
    Item,
    Judged,
    Prompt,
    Protocol,
    Verdict,
    by_kind,
    by_name,
    mean,
    scores,
)

CLIPS, SHOWN_AT = 300, 128


@lru_cache(maxsize=64)
def _clip(split: Split, seed: int, backwards: bool) -> Clip:
    clip = make_clip(seed, split=split, size=SHOWN_AT)
    return clip.reversed() if backwards else clip


def _items(split: Split, backwards: bool) -> list[Item]:
    return [
        Item(
            id=f"{split}-{seed}-{number}",
            question=question.text,
            answer=question.options.index(question.answer),
            options=question.options,
            media=f"{split}-{seed}",
            kind=question.kind,
            cluster=f"{split}-{seed}",
            details={"split": split, "seed": seed, "backwards": backwards},
        )
        for seed in range(CLIPS)
        for number, question in enumerate(_clip(split, seed, backwards).questions)
    ]


def _frames(item: Item) -> np.ndarray:
    return _clip(item.details["split"], item.details["seed"], item.details["backwards"]).frames


def _judge(item: Item, response: str) -> Verdict:
    word = response.strip()
    return Verdict(float(word == item.options[item.answer]), word or None)


def _aggregate(rows: Sequence[Judged]) -> dict[str, float]:
    kinds = by_kind(rows)
    told = {kind: mean(scores(kinds[kind]), 100) for kind in QUESTION_KINDS if kind in kinds}
    return {"accuracy": mean(scores(rows), 100), **told}


EXACT_WORD = Protocol(
    name="exact word",
    source="mmzoo",
    judge=_judge,
    aggregate=_aggregate,
    headline="accuracy",
    prompt=lambda item: Prompt(item.question),
    frames=Frames("linspace", 8),
    max_new_tokens=4,
)


def _benchmark(name: str, title: str, split: Split, backwards: bool = False) -> Benchmark:
    def read(path: Path | None = None) -> list[Item]:
        return _items(split, backwards)

    return Benchmark(name, title, read, by_name(EXACT_WORD), data="Nothing to download: clips are drawn.", make=_frames)


BENCHMARKS = (
    _benchmark("world", "World", "test"),
    _benchmark("world_reversed", "World, played backwards", "test", backwards=True),
    _benchmark("world_unseen", "World, unseen combinations", "unseen"),
)
