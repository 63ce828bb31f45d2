"""POPE: whether an object is in an image, yes or no, with absent objects chosen in three ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmzoo.errors import DatasetError
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, Verdict, by_kind, by_name
from mmzoo_eval.normalise import without_punctuation
from mmzoo_eval.prompts import ONE_WORD
from mmzoo_eval.rows import Row, items, json_lines


def read(path: Path) -> list[Item]:
    """The items of one file such as `coco_pope_random.json`, or of all such files in a folder: JSON lines both."""
    files = [path] if path.is_file() else sorted(path.glob("*_pope_*.json"))
    if not files:
        raise DatasetError(f"{path} has no annotations of POPE:", ["no coco_pope_random.json or its like there"])
    return items(_rows(files), _item)


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        for place, row in json_lines(file):
            yield place, {**row, "set": file.stem} if isinstance(row, dict) else row


def _item(row: Row) -> Item:
    image, kind = row.text("image"), row.text("set")
    return Item(
        id=f"{kind}/{row.text('question_id')}",
        question=row.text("text"),
        answer=row.among("label", ("yes", "no")),
        media=image,
        kind=kind,
        cluster=image,
    )


def _plain_prompt(item: Item) -> Prompt:
    return Prompt(item.question)


def _lmms_eval_prompt(item: Item) -> Prompt:
    return Prompt(f"{item.question}\n{ONE_WORD}")


def no_among_words(said: str) -> str:
    """The official script: "no" if a word before the first period is No, not or no; all else is yes, nothing too."""
    words = said.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def exactly(said: str) -> str | None:
    """lmms-eval: yes or no and nothing else."""
    word = said.lower().strip()
    return word if word in ("yes", "no") else None


def one_of_both(said: str) -> str | None:
    """VLMEvalKit: the one of yes and no that is among the words, if the other is not."""
    found = {"yes", "no"} & set(without_punctuation(said.lower(), "strict").split())
    return found.pop() if len(found) == 1 else None


def _judge(read_word: Callable[[str], str | None]) -> Callable[[Item, str], Verdict]:
    def judge(item: Item, response: str) -> Verdict:
        word = read_word(response)
        return Verdict(float(word == item.answer), word)

    return judge


def _official_judge(item: Item, response: str) -> Verdict:
    """An empty response counts as yes, and as unanswered."""
    word = no_among_words(response)
    return Verdict(float(word == item.answer), word if response.strip() else None)


def _pairs(rows: Sequence[Judged], unread: str | None = None) -> list[tuple[str | None, str]]:
    """(what was read, what is right), with what a response counts as from which nothing was read."""
    return [(row.verdict.parsed or unread, row.item.answer) for row in rows if row.verdict is not None]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _rates(pairs: Sequence[tuple[str | None, str]], negative: Sequence[str | None] = ("no",)) -> dict[str, float]:
    """Counts with yes as positive, and what follows from them; nan where upstream divides by zero."""
    positives = [right for said, right in pairs if said == "yes"]
    negatives = [right for said, right in pairs if said in negative]
    tp, tn = positives.count("yes"), negatives.count("no")
    fp, fn = len(positives) - tp, len(negatives) - tn
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    rates = {"precision": precision, "recall": recall, "f1": _ratio(2 * precision * recall, precision + recall)}
    right = sum(said == answer for said, answer in pairs)
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn} | rates | {"acc": _ratio(right, len(pairs))}


def _official(rows: Sequence[Judged]) -> dict[str, float]:
    """Fractions; yes_ratio is the share of yes among what was said."""
    pairs = _pairs(rows, "yes")
    return _rates(pairs) | {"yes_ratio": _ratio(sum(said == "yes" for said, _ in pairs), len(pairs))}


def _lmms_eval(rows: Sequence[Judged]) -> dict[str, float]:
    """Fractions. What is neither yes nor no is wrong, and no false negative. Upstream's yes_ratio counts the labels."""
    pairs = _pairs(rows)
    values = _rates(pairs)
    labels = _ratio(sum(right == "yes" for _, right in pairs), len(pairs))
    kept = {name: values[name] for name in ("precision", "recall", "f1")}
    return {"accuracy": values["acc"]} | kept | {"yes_ratio_as_upstream": labels}


def _vlmevalkit(rows: Sequence[Judged]) -> dict[str, float]:
    """Percent. What is neither yes nor no is wrong, and not yes."""
    values = _rates(_pairs(rows), ("no", None))
    return {name: 100 * values[name] for name in ("acc", "precision", "recall", "f1")}


def _each(aggregate: Callable[[Sequence[Judged]], dict[str, float]]) -> Callable[[Sequence[Judged]], dict[str, float]]:
    """Of all items together and, where there are several sets of questions, of each, as "set/metric"."""

    def aggregated(rows: Sequence[Judged]) -> dict[str, float]:
        values, kinds = aggregate(rows), by_kind(rows)
        for kind, some in kinds.items() if len(kinds) > 1 else ():
            values |= {f"{kind}/{name}": value for name, value in aggregate(some).items()}
        return values

    return aggregated


BENCHMARKS = (
    Benchmark(
        name="pope",
        title="POPE",
        read=read,
        protocols=by_name(
            Protocol(
                "official",
                "AoiDragon/POPE@08d957b917e5a378a2f99d35b6293c536a66298b, evaluate.py",
                _official_judge,
                _each(_official),
                "acc",
                _plain_prompt,
                unit="fraction",
            ),
            Protocol(
                "lmms_eval",
                "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/pope",
                _judge(exactly),
                _each(_lmms_eval),
                "accuracy",
                _lmms_eval_prompt,
                unit="fraction",
            ),
            Protocol(
                "vlmevalkit",
                "open-compass/VLMEvalKit@e8e78f05f3080fe28154f2130321f17951c3be94, YOrN_Extraction",
                _judge(one_of_both),
                _each(_vlmevalkit),
                "acc",
                _plain_prompt,
            ),
        ),
        media="image",
        data="AoiDragon/POPE: output/coco/coco_pope_random.json and its like. Media: the folder of the images.",
    ),
)
