"""From judged items to a score: metrics with intervals, counted states, and the line that names the protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmzoo.errors import DatasetError
from mmzoo_eval.asking import has_system
from mmzoo_eval.benchmark import ANSWERED, STATES, UNANSWERED, Benchmark, Frames, Judged, Prompt, Protocol, scores
from mmzoo_eval.statistics import Estimate, bootstrap, interval


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Id -> line of a results file, or of any lines of JSON with `id` and `response`.

    Raises:
        DatasetError: a line is no such object, or an id stands twice.
    """
    path = path / "results.jsonl" if path.is_dir() else path
    rows, problems = {}, []
    try:
        lines = path.read_text().split("\n")
    except (OSError, ValueError) as error:
        raise DatasetError(f"Cannot read {path}: {error}.", []) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            problems.append(f"line {number}: no JSON: {error}")
            continue
        if row is None:
            continue
        if not (isinstance(row, dict) and {"id", "response"} <= row.keys()):
            problems.append(f"line {number}: no object with id and response")
        elif str(row["id"]) in rows:
            problems.append(f"line {number}: the id {row['id']!r} stands twice")
        else:
            rows[str(row["id"])] = row
    if problems:
        raise DatasetError(f"{path} is no file of responses:", problems)
    return rows


def scored(benchmark: Benchmark, protocol: Protocol, results: Sequence[Judged]) -> dict[str, Any]:
    """Every metric with its interval, the counts of states, and the line to print (without the label)."""
    counted = [row for row in results if row.verdict is not None]
    estimates = bootstrap(counted, protocol.aggregate) if counted else {}
    counts = {state: sum(row.state == state for row in results) for state in STATES}
    headline, stderr = _headline(protocol, counted, estimates)
    value = "no item was scored" if headline is None else _shown(headline, protocol)
    metrics = {name: asdict(estimate) for name, estimate in estimates.items()}
    if headline is not None:
        metrics[protocol.headline] = {**asdict(headline), "stderr": stderr, "n": len(counted)}
    others = [
        f"{counts[state]} {state}" for state in STATES if state == UNANSWERED or counts[state] and state != ANSWERED
    ]
    return {
        "benchmark": benchmark.name,
        "protocol": protocol.name,
        "source": protocol.source,
        "headline": protocol.headline,
        "unit": protocol.unit,
        "dataset_id": benchmark.dataset_id,
        "n": len(results),
        "counts": counts,
        "scores": metrics,
        "text": ", ".join([value, *others]),
    }


def _headline(
    protocol: Protocol, rows: Sequence[Judged], metrics: dict[str, Estimate]
) -> tuple[Estimate | None, float]:
    """The first metric with its standard error, which knows no limits; where it is a mean of scores, with the interval
    of a mean in place of the resampled one.
    """
    if protocol.headline not in metrics:
        return None, math.nan
    found, scale = metrics[protocol.headline], 100 if protocol.unit == "percent" else 1
    counted = [row for row in rows if row.verdict is not None and row.verdict.score is not None]
    values = scores(counted)
    if not values or abs(scale * sum(values) / len(values) - found.value) > 1e-9 * scale:
        return found, found.margin / 1.96
    clusters = [row.item.cluster or row.item.id for row in counted]
    low, high = interval(values, clusters, limits=(-math.inf, math.inf))
    stderr = scale * (high - low) / 2 / 1.96
    if protocol.unit != "points":
        low, high = interval(values, clusters)
    return replace(found, low=scale * low, high=scale * high), stderr


def _shown(estimate: Estimate, protocol: Protocol) -> str:
    """With its margin; with both ends where that would speak of more than everything, or of less than nothing."""
    digits = 3 if protocol.unit == "fraction" else 1
    most = {"percent": 100.0, "fraction": 1.0, "points": math.inf}[protocol.unit]
    if estimate.value - estimate.margin < 0 or estimate.value + estimate.margin > most:
        return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
    return f"{estimate.value:.{digits}f} ± {estimate.margin:.{digits}f}"


def label(
    benchmark: Benchmark,
    protocol: Protocol,
    frames: Frames,
    decoders: Sequence[str],
    processor: Any,
    prompts: Sequence[Prompt] = (),
) -> str:
    """What stands before a score: "MVBench (official, 16 frames, decord 0.6.0)"."""
    parts = [protocol.name]
    if benchmark.media == "video":
        parts.append(str(frames.of(processor)))
        parts += [" and ".join(decoders)] if decoders else []
    if any(prompt.system is not None for prompt in prompts) and not has_system(processor):
        parts.append("system text in the question")
    return f"{benchmark.title} ({', '.join(parts)})"
