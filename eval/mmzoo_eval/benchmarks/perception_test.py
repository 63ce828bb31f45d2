"""Perception Test, multiple-choice video question answering: three options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmzoo_eval.aggregates import accuracy, per_detail
from mmzoo_eval.annotations import read_json
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, by_name
from mmzoo_eval.parsing import by_letter, stand_alone_capital
from mmzoo_eval.prompts import LETTER_ONLY, dotted
from mmzoo_eval.rows import Row, items, the_file

_FRAMES = range(10**9)


def read(path: Path) -> list[Item]:
    """The items of `mc_question_valid.json` or its like, or of the folder that holds one such file.

    Some videos give the answer away at their end. Where `cut_frame_mapping*.json` stands beside the file, details hold
    the "cut_frame" at which such a video has to stop; without one it is None.
    """
    file = the_file(path, "mc_question*.json")
    cuts: dict[str, Any] = {}
    for mapping in sorted(file.parent.glob("cut_frame_mapping*.json")):
        cuts |= read_json(mapping, dict)
    return items(_rows(file), partial(_item, cuts))


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    for video, content in read_json(file, dict).items():
        questions = content.get("mc_question") if isinstance(content, dict) else None
        if not isinstance(questions, list):
            yield f"{file}, video {video}", {}  # which lacks the first field that is asked for
            continue
        for i, row in enumerate(questions):
            yield f"{file}, video {video}, mc_question {i}", {**row, "video": video} if isinstance(row, dict) else row


def _item(cuts: dict[str, Any], row: Row) -> Item:
    if not row.values:
        raise row.wrong("mc_question", "a list of questions belongs here")
    options, video = row.texts("options"), row.text("video")
    area = row.text("area")
    return Item(
        id=f"{video}/{row.text('id')}",
        question=row.text("question"),
        answer=row.index("answer_id", options),
        options=options,
        media=f"{video}.mp4",
        kind=area,
        cluster=video,
        details={
            "area": area,
            "reasoning": row.text("reasoning"),
            "tag": row.texts("tag") if row.values.get("tag") else (),
            "cut_frame": Row("cut_frame_mapping", cuts).index(video, _FRAMES) if video in cuts else None,
        },
    )


def _prompt(item: Item) -> Prompt:
    return Prompt("\n".join([item.question, *map(dotted, range(len(item.options)), item.options), LETTER_ONLY]))


def _top1(rows: Sequence[Judged]) -> dict[str, float]:
    """Of all, and by area, reasoning and tag."""
    groups = [per_detail(rows, field, 1.0) for field in ("area", "reasoning", "tag")]
    return {"top1": accuracy(rows, 1.0)} | {name: value for group in groups for name, value in group.items()}


BENCHMARKS = (
    Benchmark(
        name="perception_test",
        title="Perception Test (multiple choice)",
        read=read,
        protocols=by_name(
            Protocol(
                "lmms_eval",
                "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/perceptiontest/val",
                by_letter(lambda item, said: stand_alone_capital(said)),
                _top1,
                "top1",
                _prompt,
                unit="fraction",
            ),
        ),
        data="google-deepmind/perception_test: mc_question_valid.json, and beside it cut_frame_mapping*.json. Media: "
        "the folder with <video_id>.mp4.",
    ),
)
