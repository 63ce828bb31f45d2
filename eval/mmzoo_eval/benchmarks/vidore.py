"""ViDoRe: retrieval of pages, scored as pytrec_eval scores a ranking (illuin-tech/vidore-benchmark, MIT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, log2
from pathlib import Path
from typing import Any

from mmzoo_eval.annotations import read_json, refuse
from mmzoo_eval.benchmark import FileScorer, mean

CUTS = (1, 3, 5, 10)


def ranking(scores: Mapping[str, float]) -> list[str]:
    """Documents from the best to the worst; equal ones by their names, the last first."""
    return sorted(scores, key=lambda document: (scores[document], document), reverse=True)


def per_query(relevances: Mapping[str, int], scores: Mapping[str, float]) -> dict[str, float]:
    """NDCG with linear gain, MAP, recall and precision of one query at 1, 3, 5, 10 documents.

    Args:
        relevances: document -> relevance; above 0 it is relevant.
        scores: document -> score.
    """
    ranked = [relevances.get(document, 0) for document in ranking(scores)]
    ideal = sorted(relevances.values(), reverse=True)
    relevant = sum(value > 0 for value in relevances.values())
    result = {}
    for cut in CUTS:
        hits = [value > 0 for value in ranked[:cut]]
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        best = _gain(ideal[:cut])
        result[f"P_{cut}"] = sum(hits) / cut
        result[f"recall_{cut}"] = sum(hits) / relevant if relevant else 0.0
        result[f"ndcg_cut_{cut}"] = _gain(ranked[:cut]) / best if best else 0.0
        result[f"map_cut_{cut}"] = sum(precisions) / relevant if relevant else 0.0
    return result


def _gain(relevances: Sequence[int]) -> float:
    return sum(max(value, 0) / log2(rank + 1) for rank, value in enumerate(relevances, 1))


def score(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the queries that both have, rounded to five decimals as ViDoRe does, and how many were left out."""
    found = [per_query(qrels[query], run[query]) for query in qrels if query in run]
    names = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
    return {
        f"{name}_at_{cut}": round(mean([one[f"{theirs}_{cut}"] for one in found]), 5)
        for cut in CUTS
        for name, theirs in names.items()
    } | {"skipped_queries": float(len(qrels.keys() ^ run.keys()))}


def _read(path: Path, number: Any) -> dict[str, dict[str, float]]:
    queries: dict[str, Any] = read_json(path, dict)
    problems = [f"{path}: query {query} is no mapping" for query, one in queries.items() if not isinstance(one, dict)]
    refuse(problems)
    refuse(
        [
            f"{path}: query {query}: document {document}: {value!r} is no number"
            for query, documents in queries.items()
            for document, value in documents.items()
            if isinstance(value, bool) or not isinstance(value, number) or not isfinite(value)
        ]
    )
    return queries


def _compute(paths: Sequence[Path], protocol: str) -> dict[str, float]:
    qrels, run = _read(paths[0], int), _read(paths[1], (int, float))
    refuse([] if qrels.keys() & run.keys() else [f"{paths[1]}: no query of {paths[0]}"])
    return score({query: {d: int(value) for d, value in one.items()} for query, one in qrels.items()}, run)


SCORER = FileScorer(
    "vidore",
    "ViDoRe",
    ("vidore",),
    {
        "qrels": "{query: {document: relevance}}",
        "run": "{query: {document: score}}",
    },
    _compute,
    "ndcg_at_5",
    "illuin-tech/vidore-benchmark e0885ea62d3c5777e43cafc3343686f714138909, pytrec_eval-terrier 0.5.11",
    "fraction",
)
