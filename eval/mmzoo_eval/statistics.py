"""Intervals and comparisons: standard errors that know about clusters, bootstrap, paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmzoo.errors import InputError, MissingExtra

if TYPE_CHECKING:
    from mmzoo_eval.benchmark import Judged

DRAWS, SEED = 500, 0


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval, in the value's unit; infinite or nan where nothing can be said."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2


def standard_error(scores: Sequence[float], clusters: Sequence[Hashable] = ()) -> float:
    """Standard error of the mean: by the central limit theorem, or clustered (arXiv:2411.00640, equation 4).

    Args:
        scores: one an item.
        clusters: one an item, equal for items that are not independent; none if all are.

    Returns:
        nan for fewer than two items.
    """
    values = np.asarray(scores, dtype=float)
    count = len(values)
    if count < 2:
        return math.nan
    deviations = values - values.mean()
    variance = (deviations**2).sum() / (count - 1) / count
    if len(clusters):
        places = np.unique(np.asarray([str(one) for one in clusters]), return_inverse=True)[1]
        sums, squares = np.bincount(places, deviations), np.bincount(places, deviations**2)
        variance += (sums**2 - squares).sum() / count**2
    return math.sqrt(max(variance, 0.0))


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson for a share of independent items."""
    share, z = right / count, 1.96
    middle, width = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - width) / (1 + z**2 / count), (middle + width) / (1 + z**2 / count)


def interval(
    scores: Sequence[float], clusters: Sequence[Hashable], limits: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's for independent scores of 0 and 1, else by the clustered standard error.

    The normal approximation of the latter knows no limits, so its ends are clipped to them: no share is above 1.

    Args:
        scores: one an item.
        clusters: one an item, equal for items that are not independent.
        limits: that no mean can pass; infinite for scores that are no shares.
    """
    if len(set(clusters)) == len(clusters) and set(scores) <= {0, 1}:
        low, high = wilson(sum(scores), len(scores))
    else:
        mean, margin = sum(scores) / len(scores), 1.96 * standard_error(scores, clusters)
        low, high = mean - margin, mean + margin
    low, high = np.clip((low, high), *limits).tolist()  # which leaves nan as it is
    return low, high


def bootstrap(
    rows: Sequence[Judged], aggregate: Callable[[Sequence[Judged]], Mapping[str, float]], draws: int = DRAWS
) -> dict[str, Estimate]:
    """Every metric with its 95 % percentile interval over resampled clusters; the draws are the same every time.

    A draw in which a metric is not defined, for instance because a kind of question is missing, is left out for it.
    """
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        groups.setdefault(row.item.cluster or row.item.id, []).append(row)
    whole, drawn = aggregate(rows), {}
    generator, clusters = np.random.default_rng(SEED), list(groups.values())
    for _ in range(draws if rows else 0):
        chosen = [row for i in generator.integers(0, len(clusters), len(clusters)) for row in clusters[i]]
        try:
            metrics = aggregate(chosen)
        except (ZeroDivisionError, KeyError):  # as some protocols do where a group is empty
            continue
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and not math.isnan(value):
                drawn.setdefault(name, []).append(value)
    ends = {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in drawn.items()}
    return {name: Estimate(value, *ends.get(name, (math.nan, math.nan))) for name, value in whole.items()}


@dataclass(frozen=True)
class Paired:
    """One run against another on the same items.

    Attributes:
        n: items that both have a score for.
        difference: mean of the first minus mean of the second, in fractions.
        low: end of its 95 % interval: from Student's t, or by the clustered standard error where items share clusters.
        high: the other end.
        t: statistic of the test: the difference over the standard error that the interval is made of.
        p: two-sided, of the same test.
        better: items on which the first scores higher.
        worse: items on which it scores lower.
        stderr_clustered: standard error of the difference, clustered.
        clusters: how many there are; n if all items are independent.
    """

    n: int
    difference: float
    low: float
    high: float
    t: float
    p: float
    better: int
    worse: int
    stderr_clustered: float
    clusters: int


def paired(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] = ()) -> Paired:
    """Two runs item by item.

    Of independent items it is the paired t-test, as lmms-eval compares with a baseline. Where items share clusters,
    that test is too sure of itself; the interval and p are then those of the normal approximation with the clustered
    standard error (arXiv:2411.00640, equation 4), and nan where all items share one.

    Args:
        first: scores of one run, one an item.
        second: of the other, on the same items.
        clusters: one an item, equal for items that are not independent; none if all are.

    Raises:
        InputError: fewer than two items.
        MissingExtra: scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtra("scipy", "eval", "Comparing two runs") from error
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    count = len(differences)
    if count < 2:
        raise InputError(f"Two runs can be compared on two items or more that both answered; there are {count}.")
    groups = len(set(clusters)) if len(clusters) else count
    mean = float(differences.mean())
    # Deviations from the mean add up to 0 within a single cluster, which says nothing of how sure the mean is.
    clustered = standard_error(differences, clusters) if groups > 1 else math.nan
    stderr, law = clustered, stats.norm()
    if groups == count:
        stderr, law = float(differences.std(ddof=1) / math.sqrt(count)), stats.t(count - 1)
    t = mean / stderr if stderr else math.copysign(math.inf, mean) if mean else 0.0
    p = float(2 * law.sf(abs(t))) if stderr else float(mean == 0)
    margin = float(law.ppf(0.975)) * stderr
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return Paired(count, mean, mean - margin, mean + margin, t, p, better, worse, clustered, groups)
