"""Standard errors, intervals, and the comparison of two runs on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from math import atan, cos, inf, pi, sin, sqrt
from typing import NamedTuple

Z_95 = 1.959963984540054


class Paired(NamedTuple):
    """The difference of two runs, with its 95 % interval and the two-sided p value of a paired t-test."""

    mean_diff: float
    se_diff: float
    ci_lower: float
    ci_upper: float
    t_stat: float
    p_value: float
    n: int


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean, by the central limit theorem; nan of fewer than two scores."""
    n = len(scores)
    if n < 2:
        return float("nan")
    centre = sum(scores) / n
    return sqrt(sum((score - centre) ** 2 for score in scores) / (n - 1) / n)


def clustered_standard_error(scores: Sequence[float], clusters: Sequence[str]) -> float:
    """Of the mean where items of a cluster, such as questions on one video, depend on each other.

    Equation 4 of arXiv 2411.00640: with a cluster for each item it is `standard_error`.
    """
    n = len(scores)
    if n < 2:
        return float("nan")
    centre = sum(scores) / n
    groups: dict[str, list[float]] = {}
    for score, cluster in zip(scores, clusters, strict=True):
        groups.setdefault(cluster, []).append(score - centre)
    together = sum(sum(group) ** 2 - sum(one**2 for one in group) for group in groups.values())
    # Clusters that pull against each other may take more away than there is.
    return sqrt(max(0.0, standard_error(scores) ** 2 + together / n**2))


def wilson(right: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of a proportion, which stays inside 0 and 1 and does not vanish there; nan of nothing."""
    if n == 0:
        return float("nan"), float("nan")
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_t_test(scores: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare two runs on the same items, in the same order; nan of fewer than two items."""
    differences = [one - other for one, other in zip(scores, baseline, strict=True)]
    n = len(differences)
    if n < 2:
        nothing = float("nan")
        return Paired(nothing, nothing, nothing, nothing, nothing, nothing, n)
    centre, error = sum(differences) / n, standard_error(differences)
    if error == 0:
        t = 0.0 if centre == 0 else inf * centre
        return Paired(centre, error, centre, centre, t, 1.0 if centre == 0 else 0.0, n)
    t, half = centre / error, _t_quantile(0.95, n - 1) * error
    return Paired(centre, error, centre - half, centre + half, t, max(0.0, 1 - _t_between(abs(t), n - 1)), n)


def _t_between(t: float, degrees: int) -> float:
    """P(-t < T < t) of Student's t with a whole number of degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(degrees))
    square = cos(angle) ** 2
    term = total = 1.0 if degrees % 2 == 0 else cos(angle)
    for i in range(1 + degrees % 2, degrees - 2, 2):
        term *= square * i / (i + 1)
        total += term
    if degrees % 2 == 0:
        return sin(angle) * total
    return 2 / pi * (angle + (sin(angle) * total if degrees > 1 else 0.0))


def _t_quantile(inside: float, degrees: int) -> float:
    """The t with P(-t < T < t) = inside, by bisection."""
    low, high = 0.0, 1.0
    while _t_between(high, degrees) < inside:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_between(middle, degrees) < inside else (low, middle)
    return high
