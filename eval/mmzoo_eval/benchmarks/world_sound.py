"""The synthetic world with sound as a benchmark: it runs offline, and most questions need both sight and sound.

Protocol "exact word", as `world`. A model that does not hear is shown the frames alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from mmzoo.world_sound import NEEDS, SOUND_KINDS, SoundClip, make_sound_clip
from mmzoo_eval.benchmark import Benchmark, Item, Judged, by_kind, by_name, mean, scores
from mmzoo_eval.benchmarks.world import CLIPS, EXACT_WORD, SHOWN_AT


@lru_cache(maxsize=64)
def _clip(seed: int) -> SoundClip:
    return make_sound_clip(seed, split="test", size=SHOWN_AT)


def _read(path: Path | None = None) -> list[Item]:
    return [
        Item(
            id=f"test-{seed}-{number}",
            question=question.text,
            answer=question.options.index(question.answer),
            options=question.options,
            media=f"test-{seed}",
            kind=question.kind,
            cluster=f"test-{seed}",
            details={"seed": seed, "needs": NEEDS[question.kind]},
        )
        for seed in range(CLIPS)
        for number, question in enumerate(_clip(seed).questions)
    ]


def _frames(item: Item) -> np.ndarray:
    return _clip(item.details["seed"]).clip.frames


def _sound(item: Item) -> np.ndarray:
    return _clip(item.details["seed"]).waveform


def _aggregate(rows: Sequence[Judged]) -> dict[str, float]:
    """Accuracy over all questions, over those that need sight, sound or both, and of each kind."""
    kinds = by_kind(rows)
    told = {kind: mean(scores(kinds[kind]), 100) for kind in SOUND_KINDS if kind in kinds}
    needs = {need: [row for row in rows if row.item.details["needs"] == need] for need in ("sight", "sound", "both")}
    by_need = {f"needs {need}": mean(scores(some), 100) for need, some in needs.items() if some}
    return {"accuracy": mean(scores(rows), 100), **by_need, **told}


BENCHMARKS = (
    Benchmark(
        "world_sound",
        "World with sound",
        _read,
        by_name(replace(EXACT_WORD, aggregate=_aggregate)),
        data="Nothing to download: clips are drawn.",
        make=_frames,
        sound=_sound,
    ),
)
