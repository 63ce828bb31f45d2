"""NExT-QA, multiple choice: why, how and when questions on everyday videos, five options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmzoo_eval.aggregates import accuracy
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, by_name
from mmzoo_eval.parsing import by_letter, last_named
from mmzoo_eval.prompts import dotted
from mmzoo_eval.rows import Row, csv_rows, items, the_file

TYPES = {"CW": "Why", "CH": "How", "TN": "Bef&Aft", "TC": "When", "DC": "Cnt", "DL": "Loc", "DO": "Other"}
"""Type of a question -> its name in the official table. TP, before and after too, is counted as TN."""

GROUPS = {"Acc_C": ("CW", "CH"), "Acc_T": ("TN", "TC"), "Acc_D": ("DC", "DL", "DO")}

FIELDS = ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")


def read(path: Path) -> list[Item]:
    """The items of `val.csv` or `test.csv`, or of the one CSV file in a folder."""
    return items(csv_rows(the_file(path, "*.csv"), FIELDS), _item)


def _item(row: Row) -> Item:
    options = tuple(row.text(f"a{i}") for i in range(5))
    video, kind = row.text("video"), row.among("type", [*TYPES, "TP"])
    return Item(
        id=f"{video}_{row.text('qid')}",
        question=row.text("question"),
        answer=row.index("answer", options),
        options=options,
        media=f"{video}.mp4",
        kind={"TP": "TN"}.get(kind, kind),
        cluster=video,
    )


def _prompt(item: Item) -> Prompt:
    options = (dotted(i, option.strip()) for i, option in enumerate(item.options))
    return Prompt("\n".join([item.question.strip(), *options]))


def _official(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each type, of the causal, temporal and descriptive ones, and of all. A type that does not occur has nan."""
    by_type = {name: accuracy([row for row in rows if row.item.kind == kind]) for kind, name in TYPES.items()}
    groups = {name: accuracy([row for row in rows if row.item.kind in kinds]) for name, kinds in GROUPS.items()}
    return by_type | groups | {"Acc": accuracy(rows)}


def printed(values: Mapping[str, float]) -> str:
    """What the official script prints of its aggregate."""
    names = [*TYPES.values(), *GROUPS]
    heading, line = ("".join(f"{one}\t" for one in row) for row in (names, [f"{values[name]:.2f}" for name in names]))
    return f"{heading}\n{line}\nAcc: {values['Acc']:.2f}\n"


_LMMS_EVAL = "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/nextqa"
_OFFICIAL = "doc-doc/NExT-QA@6b92588ab4496268fa1caab9414a8b998ee063c5, eval_mc.py"
_judge = by_letter(lambda item, said: last_named(said, item.options))

BENCHMARKS = (
    Benchmark(
        name="next_qa",
        title="NExT-QA (multiple choice)",
        read=read,
        protocols=by_name(
            Protocol(
                "lmms_eval", _LMMS_EVAL, _judge, lambda rows: {"exact_match": accuracy(rows)}, "exact_match", _prompt
            ),
            # The official script knows classifiers only: no prompt, no words to read.
            Protocol(
                "official", f"{_OFFICIAL}, summed up; asked and read as {_LMMS_EVAL}", _judge, _official, "Acc", _prompt
            ),
        ),
        data="doc-doc/NExT-QA: dataset/nextqa/val.csv or test.csv. Media: the folder with <video>.mp4.",
    ),
)
