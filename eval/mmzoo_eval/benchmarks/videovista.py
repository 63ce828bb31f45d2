"""VideoVista: 27 types of questions, 19 of understanding and 8 of reasoning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmzoo_eval.aggregates import accuracy, per_kind
from mmzoo_eval.benchmark import Benchmark, Frames, Item, Judged, Prompt, Protocol, by_name
from mmzoo_eval.parsing import by_option, without_prefixes
from mmzoo_eval.prompts import LETTER_ONLY, bracketed
from mmzoo_eval.rows import Row, items, json_rows, the_file

UNDERSTANDING = (
    *("Objects Existence", "Objects Count", "Action Count", "Detailed Description", "Brief Description"),
    *("Event Description", "Event Sequence", "Optical Character Recognition", "Action Recognition", "Action Sequence"),
    *("Action Location", "Event Location", "Objects Temporal Location", "Objects Temporal Relation"),
    *("Objects Spatial Location", "Objects Spatial Relation", "Objects Spatial Tracking", "Human Activity Analysis"),
    "Anomaly Detection",
)
REASONING = (
    *("Relation Reasoning-Image", "Relation Reasoning-Video", "Event Prediction", "Action Prediction"),
    *("Causal Reasoning", "Counterfactual Reasoning", "Commonsense Reasoning", "Logic Reasoning"),
)


def read(path: Path) -> list[Item]:
    """The items of `VideoVista.json`, or of the folder that holds it.

    A few videos lie under another category than the one that their row names; details hold the pattern that finds
    them, as "media_pattern".
    """
    return items(_rows(the_file(path, "VideoVista.json")), _item)


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    for i, (place, row) in enumerate(json_rows(file)):
        yield place, {**row, "id": i} if isinstance(row, dict) else row


def _item(row: Row) -> Item:
    options, name = row.texts("Answer_Choices"), row.text("video_name")
    parts = name.split(".")
    if len(parts) < 2:
        raise row.wrong("video_name", f"{name!r} has no second part between dots, which is its folder")
    return Item(
        id=row.text("id"),
        question=row.text("Question"),
        answer=row.index("Answer", options),
        options=options,
        media=f"merged/{row.text('category')}/{parts[1]}/{name}",
        kind=row.among("Type", [*UNDERSTANDING, *REASONING]),
        cluster=name,
        details={"media_pattern": f"merged/*/{parts[1]}/{name}"},
    )


def question_block(question: str, options: Sequence[str]) -> str:
    """The question and its options; it ends in a line break."""
    return "\n".join([question, "Options:", *map(bracketed, range(len(options)), options), ""])


def _prompt(item: Item) -> Prompt:
    return Prompt(f"{question_block(item.question, item.options)}\n{LETTER_ONLY}")


def _rounded(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each type, and over the items of understanding, of reasoning and of both, to two decimals."""
    parts = {"understanding": UNDERSTANDING, "reasoning": REASONING}
    values = per_kind(rows)
    values |= {name: accuracy([row for row in rows if row.item.kind in kinds]) for name, kinds in parts.items()}
    return {name: round(value, 2) for name, value in (values | {"avg": accuracy(rows)}).items()}


BENCHMARKS = (
    Benchmark(
        name="videovista",
        title="VideoVista",
        read=read,
        protocols=by_name(
            Protocol(
                "video_ccam",
                "QQ-MM/Video-CCAM@5f36c04446c1ac24f8df9cd698c108f1e845f3ed, eval/videovista.py",
                by_option(without_prefixes),
                _rounded,
                "avg",
                _prompt,
                Frames("ccam_uniform", 96),
                100,
            ),
        ),
        data="The release of VideoVista: VideoVista.json. Media: the folder that holds merged/.",
    ),
)
