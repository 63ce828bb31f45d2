"""MLVU dev: long videos, seven tasks of multiple choice, and two of free answers that a judge reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmzoo.errors import DatasetError
from mmzoo_eval.aggregates import accuracy, per_kind
from mmzoo_eval.benchmark import (
    Benchmark,
    Frames,
    Item,
    Judge,
    Judged,
    Message,
    Prompt,
    Protocol,
    Verdict,
    by_kind,
    by_name,
    mean,
)
from mmzoo_eval.parsing import PREFIXES, before_bracket, by_letter, by_option, by_priority, without_prefixes
from mmzoo_eval.prompts import LETTER_ONLY, bracketed, question_block
from mmzoo_eval.rows import Row, items, json_rows

TASKS = {
    "1_plotQA": "plotQA",
    "2_needle": "needle",
    "3_ego": "ego",
    "4_count": "count",
    "5_order": "order",
    "6_anomaly_reco": "anomaly_reco",
    "7_topic_reasoning": "topic_reasoning",
}
GENERATION = {"8_sub_scene": "sub_scene", "9_summary": "summary"}
"""File -> task. The videos of a task lie in a folder of the file's name."""

SCORES = {
    "sub_scene": ("score_accuracy", "score_relevance"),
    "summary": ("score_completeness", "score_reliability"),
}
"""What the judge gives, from 1 to 5 each."""

_WATCH = "Carefully watch this video and pay attention to every detail. Based on your observations, "


def read(path: Path) -> list[Item]:
    """The multiple-choice items of a folder with `json/<number>_<task>.json`, or of that folder `json` itself."""
    return items(_rows(path, TASKS), _choice)


def read_generation(path: Path) -> list[Item]:
    """The items with free answers: those of `8_sub_scene.json` and `9_summary.json`."""
    return items(_rows(path, GENERATION), _free)


def _rows(path: Path, tasks: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    folder = path / "json" if (path / "json").is_dir() else path
    files = [file for name in tasks if (file := folder / f"{name}.json").is_file()]
    if not files:
        raise DatasetError(f"{folder} has no annotations of MLVU:", [f"no {name}.json there" for name in tasks])
    for file in files:
        for i, (place, row) in enumerate(json_rows(file)):
            known = {"file": file.stem, "task": tasks[file.stem], "id": f"{tasks[file.stem]}/{i}"}
            yield place, row | known if isinstance(row, dict) else row


def _item(row: Row, **given: Any) -> Item:
    media = f"{row.text('file')}/{row.text('video')}"
    return Item(row.text("id"), row.text("question"), media=media, kind=row.text("task"), cluster=media, **given)


def _choice(row: Row) -> Item:
    options = row.texts("candidates")
    return _item(row, options=options, answer=options.index(row.among("answer", options)))


def _free(row: Row) -> Item:
    details = {"scoring_points": row.get("scoring_points")} if row.text("task") == "sub_scene" else {}
    return _item(row, answer=row.text("answer"), details=details)


def _official_prompt(item: Item) -> Prompt:
    # No line break stands before "Only".
    words = f"{question_block(item.question, item.options)}Only give the best option."
    system = f"{_WATCH}select the best option that accurately addresses the question."
    return Prompt(words, system=system, start="Best Option: (")


def _lmms_eval_prompt(item: Item) -> Prompt:
    asked = "\n".join([item.question, *map(bracketed, range(len(item.options)), item.options)])
    return Prompt(f"{asked}\nOnly give the best option.\nBest option: (")


def _video_ccam_prompt(item: Item) -> Prompt:
    return Prompt(f"{question_block(item.question, item.options)}\n{LETTER_ONLY}")


def _official_judge(item: Item, response: str) -> Verdict:
    said = before_bracket(response)
    letters = [chr(ord("A") + i) for i in range(len(item.options))]
    number = letters.index(said) if said in letters else None
    return Verdict(float(number == item.answer), number)


def _official(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each task, and Avg: the mean of the tasks, called M-Avg."""
    tasks = per_kind(rows)
    return tasks | {"Avg": mean(list(tasks.values()))}


def _lmms_eval(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each task, and m_avg: the mean of all seven, of which one without items counts 0."""
    tasks = per_kind(rows)
    return tasks | {"m_avg": mean([tasks.get(task, 0.0) for task in TASKS.values()])}


def _video_ccam(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each task, and over all items, which upstream prints as Avg although it is not M-Avg."""
    return per_kind(rows) | {"Avg_micro_as_upstream": accuracy(rows)}


# Free answers


def _free_prompt(item: Item) -> Prompt:
    return Prompt(item.question, system=f"{_WATCH}answer the given questions.")


def judge_messages(item: Item, response: str) -> list[Message]:
    """What a judge is asked. The scales and the keys are upstream's, the wording is ours."""
    if item.kind == "sub_scene":
        system = (
            "You grade a description of a scene in a video. ACCURACY, from 1 to 5, is the mean over the scoring points "
            "of 1 (missed), 3 (mentioned, not entirely correct) or 5 (accurate). RELEVANCE, an integer from 1 to 5, is "
            "how far the description answers the question, whether or not it is correct."
        )
        given = f"Scoring points: {item.details['scoring_points']}\nStandard answer: {item.answer}"
    else:
        system = (
            "You grade a summary of a video against the standard answer. COMPLETENESS, an integer from 1 to 5, is how "
            "much of the standard answer it covers. RELIABILITY, an integer from 1 to 5, is how free it is of errors."
        )
        given = f"Standard answer: {item.answer}"
    first, second = SCORES[item.kind]
    asked = f"Question: {item.question}\n{given}\nAnswer to grade: {response}\n"
    ending = f"End with a dictionary of the scores and their sum: {{'{first}': 3, '{second}': 4, 'total_score': 7}}"
    return [{"role": "system", "content": system}, {"role": "user", "content": asked + ending}]


def judge_scores(reply: str, kind: str) -> tuple[float, float]:
    """The two scores of a judge's reply: what stands between a key's ": " and the next ",".

    Upstream's rules: a reply without scores counts 0 and 0; one with a single key counts that as the first of the two
    and 0 for the other.
    """
    found = (re.search(rf"{key}[^:]*: ([^,]*)", reply) for key in SCORES[kind])
    values = [float(number[0]) for one in found if one and (number := re.search(r"\d+(\.\d+)?", one[1]))]
    first, second, *_ = [*values, 0.0, 0.0]
    return first, second


def _generation(rows: Sequence[Judged]) -> dict[str, float]:
    """The two mean scores of each task; SSC and VS: their sums, out of 10; G-Avg: the mean of the two."""
    values: dict[str, float] = {}
    for kind, name in (("sub_scene", "SSC"), ("summary", "VS")):
        pairs = [row.verdict.parsed for row in by_kind(rows).get(kind, []) if row.verdict is not None]
        means = [mean([pair[i] for pair in pairs]) for i in range(2)]
        values |= {name: sum(means)} | dict(zip(SCORES[kind], means))
    return {"G-Avg": (values["SSC"] + values["VS"]) / 2} | values


def generation(judge: Judge, name: str) -> dict[str, Protocol]:
    """The protocols of the tasks with free answers; the judge's name is part of theirs.

    Video-CCAM's script searches with five beams, which is the generation's affair.

    Args:
        judge: upstream's is gpt-4-turbo at temperature 0.
        name: of the judge, with its version.
    """

    def graded(item: Item, response: str) -> Verdict:
        given = judge_scores(judge(judge_messages(item, response)), item.kind)
        return Verdict(sum(given), given)

    prompts = {"official": (_free_prompt, Frames()), "video_ccam": (lambda item: Prompt(item.question), _UNIFORM_96)}
    return by_name(
        *(
            Protocol(f"{one} ({name})", _OFFICIAL, graded, _generation, "G-Avg", prompt, frames, 512, "points")
            for one, (prompt, frames) in prompts.items()
        )
    )


_OFFICIAL = "JUNJIE99/MLVU@fd060c10a43ea48a35100a22688a927b8e531199"
_DATA = "The dev release of MLVU: the folder with json/1_plotQA.json and so on. Media: its folder video."
_UNIFORM_96 = Frames("ccam_uniform", 96)
_known = PREFIXES[:2]
_ccam_judge = by_option(lambda said, reference: without_prefixes(said, reference, _known))

BENCHMARKS = (
    Benchmark(
        name="mlvu",
        title="MLVU",
        read=read,
        protocols=by_name(
            Protocol("official", f"{_OFFICIAL}, choice_bench.py", _official_judge, _official, "Avg", _official_prompt),
            Protocol(
                "lmms_eval",
                "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/mlvu",
                by_letter(lambda item, said: by_priority(said)),
                _lmms_eval,
                "m_avg",
                _lmms_eval_prompt,
            ),
            Protocol(
                "video_ccam",
                "QQ-MM/Video-CCAM@5f36c04446c1ac24f8df9cd698c108f1e845f3ed, eval/mlvu.py",
                _ccam_judge,
                _video_ccam,
                "Avg_micro_as_upstream",
                _video_ccam_prompt,
                _UNIFORM_96,
                100,
            ),
        ),
        data=_DATA,
    ),
    Benchmark("mlvu_generation", "MLVU generation", read_generation, {}, data=_DATA, judged_by=generation),
)
