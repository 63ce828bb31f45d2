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
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        values = row.item.details[field]
        for value in [values] if isinstance(values, str) else values:
            groups.setdefault(f"{prefix}{field}/{value}", []).append(row)
    return {name: accuracy(some, scale) for name, some in groups.items()}
