"""MME: two questions on each image, one to be answered yes and one no, in 14 categories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, Verdict, by_kind, by_name, mean, scores
from mmzoo_eval.prompts import ONE_WORD
from mmzoo_eval.rows import Row, items, table_rows, the_file

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read(path: Path) -> list[Item]:
    """The items of the parquet file on the Hub, or of its rows as a JSON list; or of the folder that holds either.

    The images are files named by the rows' question_id.
    """
    file = the_file(path, "questions.json", "data/*.parquet", "*.parquet")
    return items(table_rows(file, ("question_id", "category", "question", "answer")), _item)


def _item(row: Row) -> Item:
    image, answer = row.text("question_id"), row.among("answer", ("Yes", "No"))
    return Item(
        id=f"{image}/{answer}",
        question=row.text("question"),
        answer=answer.lower(),
        media=image,
        kind=row.among("category", [*PERCEPTION, *COGNITION]),
        cluster=image,
    )


def _prompt(item: Item) -> Prompt:
    return Prompt(f"{item.question.replace(' Please answer yes or no.', '')}\n{ONE_WORD}")


def yes_or_no(said: str) -> str | None:
    """A word, a letter, or what the first four characters hold: "know" and "Noted" are no."""
    text = said.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return next((word for word in ("yes", "no") if word in text[:4]), None)


def _judge(item: Item, response: str) -> Verdict:
    word = yes_or_no(response)
    return Verdict(float(word == item.answer), word)


def _points(rows: Sequence[Judged]) -> float:
    """A category's score out of 200: over its images, the mean of accuracy and of 100 where both answers are right."""
    images: dict[str, list[Judged]] = {}
    for row in rows:
        images.setdefault(row.item.cluster, []).append(row)
    points: list[float] = []
    for right in map(scores, images.values()):
        value = mean(right, 100) + 100 * (len(right) > 1 and all(right))
        points += [value] * max(1, len(right) // 2)  # an image counts as often as it was drawn, in a resampled set
    return mean(points)


def _summed(rows: Sequence[Judged]) -> dict[str, float]:
    """Sums over the categories that occur: perception out of 2,000, cognition out of 800; and each category."""
    categories = {kind: _points(some) for kind, some in by_kind(rows).items()}
    return {
        "mme_perception_score": sum(categories.get(kind, 0.0) for kind in PERCEPTION),
        "mme_cognition_score": sum(categories.get(kind, 0.0) for kind in COGNITION),
    } | categories


BENCHMARKS = (
    Benchmark(
        name="mme",
        title="MME",
        read=read,
        protocols=by_name(
            Protocol(
                "lmms_eval",
                "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/mme; the rule of the "
                "benchmark's calculation.py",
                _judge,
                _summed,
                "mme_perception_score",
                _prompt,
                unit="points",
            ),
        ),
        media="image",
        data="lmms-lab/MME on the Hub: its parquet file, with pyarrow, or its rows as questions.json. Media: the "
        "folder of the images, under their question_id.",
    ),
)
