"""NExT-GQA: does a model that answers right also know when it happens (doc-doc/NExT-GQA, MIT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from mmzoo_eval.annotations import read_json, refuse, require
from mmzoo_eval.benchmark import FileScorer, mean

Span = tuple[float, float]
"""Start and end in seconds."""


class Overlap(NamedTuple):
    """Of a predicted span with the annotated ones: intersection over union, and over the prediction's length."""

    iou: float
    iop: float


def overlap(predicted: Span, segments: Sequence[Span]) -> Overlap:
    """The best over the segments, each measure for itself, and never below 0.

    A span without length has IoU 0, and IoP 1 inside a segment, ends included.
    """
    start, end = predicted
    if start == end:
        return Overlap(0.0, float(any(first <= start <= last for first, last in segments)))
    iou, iop = 0.0, 0.0
    for first, last in segments:
        shared = min(end, last) - max(start, first)
        iou = max(iou, shared / (max(end, last) - min(start, first)))
        iop = max(iop, shared / (end - start))
    return Overlap(iou, iop)


def in_seconds(fractions: Span, duration: float) -> Span:
    """Fractions of a video as upstream turns them into seconds: rounded to tenths."""
    return round(fractions[0] * duration, 1), round(fractions[1] * duration, 1)


def score(
    segments: Mapping[str, Sequence[Span]],
    spans: Mapping[str, Span],
    answers: Mapping[str, bool],
    strict: bool = False,
) -> dict[str, float]:
    """Percent, and the number of questions without a span.

    Args:
        segments: "video_qid" -> annotated spans.
        spans: "video_qid" -> predicted span.
        answers: "video_qid" -> whether the answer was right, of every question with a span.
        strict: count a question without a span as 0. Upstream leaves it out of the denominator, which flatters a model
            that abstains.
    """
    asked = [key for key in segments if strict or key in spans]
    found = [overlap(spans[key], segments[key]) if key in spans else Overlap(0.0, 0.0) for key in asked]
    result = {"mIoU": mean([one.iou for one in found], 100), "mIoP": mean([one.iop for one in found], 100)}
    for least in (0.3, 0.5):
        result[f"TIoU@{least}"] = mean([float(one.iou >= least) for one in found], 100)
        result[f"TIoP@{least}"] = mean([float(one.iop >= least) for one in found], 100)
    grounded = [one.iop >= 0.5 and answers.get(key, False) for key, one in zip(asked, found, strict=True)]
    return {
        "Acc@GQA": mean([float(one) for one in grounded], 100),
        **result,
        "Acc@QA": mean([float(right) for right in answers.values()], 100),
        "missing_spans": float(sum(key not in spans for key in segments)),
    }


def read_annotations(path: Path) -> tuple[dict[str, list[Span]], dict[str, float]]:
    """gsub_{val,test}.json -> ("video_qid" -> spans, "video_qid" -> duration). Raises DatasetError."""
    videos = read_json(path, dict)
    require(path, videos.items(), {"duration": (int, float), "location": dict}, "video")
    segments: dict[str, list[Span]] = {}
    durations: dict[str, float] = {}
    for video, entry in videos.items():
        for number, location in entry["location"].items():
            where = f"{path}: video {video}: location {number}"
            refuse([] if isinstance(location, list) and location else [f"{where} is no list of spans"])
            segments[f"{video}_{number}"] = [_span(where, one) for one in location]
            durations[f"{video}_{number}"] = float(entry["duration"])
    return segments, durations


def read_spans(path: Path) -> dict[str, Span]:
    """{"video_qid": [start, end]}. Raises DatasetError."""
    return {key: _span(f"{path}: {key}", span) for key, span in read_json(path, dict).items()}


def _span(where: str, value: Any) -> Span:
    numbers = isinstance(value, list) and all(isinstance(one, int | float) and isfinite(one) for one in value)
    refuse([] if numbers and len(value) == 2 and value[0] <= value[1] else [f"{where}: {value!r} is no [start, end]"])
    return float(value[0]), float(value[1])


def read_answers(path: Path) -> dict[str, bool]:
    """{"video_qid": {answer, prediction}} -> whether it was right. Raises DatasetError."""
    answers = read_json(path, dict)
    require(path, answers.items(), {"answer": (int, str), "prediction": (int, str)})
    return {key: one["answer"] == one["prediction"] for key, one in answers.items()}


def _compute(paths: Sequence[Path], protocol: str) -> dict[str, float]:
    segments, durations = read_annotations(paths[0])
    spans, answers = read_spans(paths[1]), read_answers(paths[2])
    spans = {key: span for key, span in spans.items() if key in segments}
    refuse([f"{paths[2]}: no answer {key}, which has a span" for key in spans if key not in answers])
    rule, _, fractions = protocol.partition("_")
    if fractions:
        spans = {key: in_seconds(span, durations[key]) for key, span in spans.items()}
    return score(segments, spans, answers, strict=rule == "strict")


SCORER = FileScorer(
    "next_gqa",
    "NExT-GQA",
    ("official", "strict", "official_fractions", "strict_fractions"),
    {
        "annotations": "gsub_test.json or gsub_val.json",
        "spans": '{"video_qid": [start, end]}, in seconds, or in fractions of the video for the protocols that say so',
        "answers": '{"video_qid": {"answer": option, "prediction": option}}',
    },
    _compute,
    "Acc@GQA",
    "doc-doc/NExT-GQA 63772e0256ad9e34b83d6a108f1ba2041b924607; strict is ours: a missing span counts as 0",
)
