"""Sums that several benchmarks share. Rows without a score are in no denominator."""

from __future__ import annotations

from collections.abc import Sequence

from mmzoo_eval.benchmark import Judged, by_kind, mean, scores


def accuracy(rows: Sequence[Judged], scale: float = 100.0) -> float:
    """The mean score of all rows together."""
    return mean(scores(rows), scale)


def per_kind(rows: Sequence[Judged], scale: float = 100.0) -> dict[str, float]:
    """The mean score of each kind."""
    return {kind: accuracy(some, scale) for kind, some in by_kind(rows).items()}


def per_detail(rows: Sequence[Judged], field: str, scale: float = 100.0, prefix: str = "") -> dict[str, float]:
    """The mean score of each value of a detail, as "field/value"; a row belongs to every value of a list."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        score = None if row.verdict is None else row.verdict.score
        values = row.item.details[field]
        for value in [values] if isinstance(values, str) else values:
            group = groups.setdefault(value, [])
            if score is not None:
                group.append(score)
    return {f"{prefix}{field}/{value}": mean(some, scale) for value, some in groups.items()}
