"""EgoSchema: one question on each three-minute video, five options; 500 answers are public, a server has the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmzoo.files import replacing
from mmzoo_eval.aggregates import accuracy
from mmzoo_eval.annotations import read_json
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, by_name
from mmzoo_eval.parsing import by_letter, first_named
from mmzoo_eval.prompts import LETTER_ONLY, dotted
from mmzoo_eval.rows import Row, items, json_rows, the_file


def read(path: Path) -> list[Item]:
    """The items of `questions.json`, or of the folder that holds it.

    Answers come from `subset_answers.json` beside it; an item without a public answer has None and no score.
    """
    file = the_file(path, "questions.json")
    public = file.parent / "subset_answers.json"
    answers = read_json(public, dict) if public.is_file() else {}
    return items(json_rows(file), partial(_item, answers, public))


def _item(answers: dict[str, Any], public: Path, row: Row) -> Item:
    options = tuple(row.text(f"option {i}") for i in range(5))
    name = row.text("q_uid")
    return Item(
        id=name,
        question=row.text("question"),
        answer=Row(str(public), answers).index(name, options) if name in answers else None,
        options=options,
        media=f"{name}.mp4",
        cluster=name,
    )


def submission(rows: Sequence[Judged]) -> dict[str, int]:
    """What the server takes, {q_uid: index}; -1 where there is no answer."""
    parsed = {row.item.id: row.verdict.parsed if row.verdict else None for row in rows}
    return {name: -1 if index is None else index for name, index in parsed.items()}


def write_submission(rows: Sequence[Judged], path: Path) -> None:
    """The submission as a JSON file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(submission(rows), indent=1), encoding="utf-8")


def _prompt(item: Item) -> Prompt:
    return Prompt("\n".join([item.question, *map(dotted, range(len(item.options)), item.options), LETTER_ONLY]))


BENCHMARKS = (
    Benchmark(
        name="egoschema",
        title="EgoSchema",
        read=read,
        protocols=by_name(
            Protocol(
                "lmms_eval",
                "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/egoschema; what it draws "
                "at random is wrong here",
                by_letter(lambda item, said: first_named(said, item.options)),
                lambda rows: {"accuracy_random_draws_wrong": accuracy(rows, 1.0)},
                "accuracy_random_draws_wrong",
                _prompt,
                unit="fraction",
            ),
        ),
        data="egoschema/EgoSchema: questions.json and subset_answers.json. Media: the folder with <q_uid>.mp4.",
    ),
)
