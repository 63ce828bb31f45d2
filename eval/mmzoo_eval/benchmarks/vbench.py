"""VBench's total score from the scores of its dimensions (Vchitect/VBench, Apache-2.0).

The dimensions themselves need other models' weights and are not computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from mmzoo_eval.annotations import read_json, refuse
from mmzoo_eval.benchmark import FileScorer


class Dimension(NamedTuple):
    """How the score of a dimension is normalised, and its weight in its part."""

    least: float = 0.0
    most: float = 1.0
    weight: float = 1.0

    def normalised(self, value: float) -> float:
        """Weighted, and not clipped: below the least it is negative."""
        return (value - self.least) / (self.most - self.least) * self.weight


QUALITY = {
    "subject consistency": Dimension(0.1462),
    "background consistency": Dimension(0.2615),
    "temporal flickering": Dimension(0.6293),
    "motion smoothness": Dimension(0.706, 0.9975),
    "dynamic degree": Dimension(weight=0.5),
    "aesthetic quality": Dimension(),
    "imaging quality": Dimension(),
}
SEMANTIC = {
    "object class": Dimension(),
    "multiple objects": Dimension(),
    "human action": Dimension(),
    "color": Dimension(),
    "spatial relationship": Dimension(),
    "scene": Dimension(most=0.8222),
    "appearance style": Dimension(0.0009, 0.2855),
    "temporal style": Dimension(most=0.364),
    "overall consistency": Dimension(most=0.364),
}
IMAGE_TO_VIDEO = {
    "video-text camera motion": Dimension(weight=0.1),
    "video-image subject consistency": Dimension(0.1462),
    "video-image background consistency": Dimension(0.2615),
}
IMAGE_TO_VIDEO_QUALITY = {name: one for name, one in QUALITY.items() if name != "temporal flickering"}


def _part(dimensions: Mapping[str, Dimension], raw: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """The normalised, weighted dimensions, and their sum over the sum of the weights."""
    found = {name: one.normalised(raw.get(name, 0.0)) for name, one in dimensions.items()}
    return found, sum(found.values()) / sum(one.weight for one in dimensions.values())


def score(raw: Mapping[str, float]) -> dict[str, float]:
    """The total score of a text-to-video model, as fractions: (4 quality + semantic) / 5.

    Args:
        raw: dimension -> score. A missing one counts as a score of 0, and is counted.
    """
    (first, quality), (second, semantic) = _part(QUALITY, raw), _part(SEMANTIC, raw)
    missing = float(len((QUALITY | SEMANTIC).keys() - raw.keys()))
    total = (4 * quality + semantic) / 5
    return {"total": total, "quality": quality, "semantic": semantic, **first, **second, "missing_dimensions": missing}


def score_image_to_video(raw: Mapping[str, float]) -> dict[str, float]:
    """The total score of an image-to-video model, as fractions: the mean of its two parts."""
    (first, quality), (second, i2v) = _part(IMAGE_TO_VIDEO_QUALITY, raw), _part(IMAGE_TO_VIDEO, raw)
    missing = float(len((IMAGE_TO_VIDEO_QUALITY | IMAGE_TO_VIDEO).keys() - raw.keys()))
    return {
        "total": (quality + i2v) / 2,
        "i2v": i2v,
        "quality": quality,
        **second,
        **first,
        "missing_dimensions": missing,
    }


def read_results(path: Path, known: Mapping[str, Dimension]) -> dict[str, float]:
    """A result file: dimension -> [score, scores of the videos], or the score alone. Raises DatasetError."""
    results = {name.replace("_", " "): value for name, value in read_json(path, dict).items()}
    raw = {name: value[0] if isinstance(value, list) and value else value for name, value in results.items()}
    refuse(
        [f"{path}: {name!r} is none of {', '.join(known)}" for name in raw if name not in known]
        + [
            f"{path}: {name}: {value!r} is no number"
            for name, value in raw.items()
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value)
        ]
    )
    return {name: float(value) for name, value in raw.items()}


def _compute(paths: Sequence[Path], protocol: str) -> dict[str, float]:
    if protocol == "official":
        return score(read_results(paths[0], QUALITY | SEMANTIC))
    return score_image_to_video(read_results(paths[0], IMAGE_TO_VIDEO_QUALITY | IMAGE_TO_VIDEO))


SCORER = FileScorer(
    "vbench",
    "VBench",
    ("official", "official_i2v"),
    {"results": "{dimension: [score, scores of the videos]}"},
    _compute,
    "total",
    "Vchitect/VBench 45e79ec14e69a2187202c675d2dbce1a71843d53, scripts/cal_final_score.py",
    "fraction",
)
