"""MVBench: 20 tasks of 200 questions on short videos, with two to five options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmzoo.errors import DatasetError
from mmzoo_eval.aggregates import accuracy, per_kind
from mmzoo_eval.benchmark import Benchmark, Frames, Item, Judged, Prompt, Protocol, Verdict, by_name, mean
from mmzoo_eval.parsing import by_letter, by_option, mvbench_letter, two_way, without_prefixes
from mmzoo_eval.prompts import LETTER_ONLY, bracketed, question_block
from mmzoo_eval.rows import Row, items, json_rows

FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "object_interaction": "star/Charades_v1_480",
    "action_localization": "sta/sta_video",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "counterfactual_inference": "clevrer/video_validation",
    "object_shuffle": "perception/videos",
    "action_count": "perception/videos",
    "state_change": "perception/videos",
    "character_order": "perception/videos",
    "scene_transition": "scene_qa/video",
    "fine_grained_pose": "nturgbd",
    "egocentric_navigation": "vlnqa",
}
"""Task -> folder of its videos, below the folder of media; for episodic_reasoning a video is a folder of frames."""

LMMS_EVAL_FOLDERS = {
    "star/Charades_v1_480": "star/Charades_segment",
    "sta/sta_video": "sta/sta_video_segment",
    "tvqa/frames_fps3_hq": "tvqa/video_fps3_hq_segment",
    "nturgbd": "nturgbd_convert",
    "ssv2_video": "ssv2_video_mp4",
}
"""Where lmms-eval takes copies instead, which are cut where the others have a bound. In details: "lmms_eval_media"."""

FRAME_FOLDER, FRAME_FOLDER_FPS = "tvqa/frames_fps3_hq", 3.0

BOUNDED = {"star/Charades_v1_480", "sta/sta_video", FRAME_FOLDER}
"""Folders whose videos are shown from `start` to `end` only."""

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)


def read(path: Path) -> list[Item]:
    """The items of a folder with `json/<task>.json`, of that folder `json` itself, or of one task's file."""
    folder = path / "json" if (path / "json").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.glob("*.json"))
    unknown = [f"{file}: {file.stem!r} is none of {', '.join(FOLDERS)}" for file in files if file.stem not in FOLDERS]
    if unknown or not files:
        raise DatasetError(
            f"{path} is no MVBench, which has a file json/<task>.json for each task:", unknown or ["no such file"]
        )
    return items(_rows(files), _item)


def _rows(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        for i, (place, row) in enumerate(json_rows(file)):
            yield place, {**row, "task": file.stem, "id": f"{file.stem}/{i}"} if isinstance(row, dict) else row


def _item(row: Row) -> Item:
    options, task = row.texts("candidates"), row.text("task")
    folder, video = FOLDERS[task], row.text("video")
    return Item(
        id=row.text("id"),
        question=row.text("question"),
        answer=options.index(row.among("answer", options)),
        options=options,
        media=f"{folder}/{video}",
        kind=task,
        cluster=f"{folder}/{video}",
        bound=(row.seconds("start"), row.seconds("end")) if folder in BOUNDED else None,
        details={"lmms_eval_media": f"{LMMS_EVAL_FOLDERS.get(folder, folder)}/{video}"}
        | ({"video_fps": FRAME_FOLDER_FPS} if folder == FRAME_FOLDER else {}),
    )


def _official_prompt(item: Item) -> Prompt:
    words = f"{SYSTEM}{question_block(item.question, item.options)}\nOnly give the best option."
    return Prompt(words, system=SYSTEM, start="Best option:(")


def _vlmevalkit_prompt(item: Item) -> Prompt:
    words = f"{question_block(item.question, item.options)}\nOnly give the best option."
    return Prompt(words, system=SYSTEM, start="Best option:(")


def _lmms_eval_prompt(item: Item) -> Prompt:
    options = "\n".join(map(bracketed, range(len(item.options)), item.options))
    return Prompt(f"Question:{item.question}\nOption:\n{options}\nOnly give the best option.\n")


def _video_ccam_prompt(item: Item) -> Prompt:
    return Prompt(f"{question_block(item.question, item.options)}\n{LETTER_ONLY}")


def with_bracket(said: str) -> str:
    """The first line after the "(" that the answer was started with, as the notebook reads it."""
    return "(" + said.strip().split("\n")[0]


def _after_the_start(said: str, reference: str) -> bool:
    """The notebook's test. An empty answer is right, since "(" is part of "(a)"."""
    return two_way(with_bracket(said), reference)


def _quoted(said: str, reference: str) -> bool:
    """check_ans_advanced: also right if the option's text occurs, whatever letter is named."""
    text = reference.partition(" ")[2].lower().removesuffix(".")
    text = {str(i): word for i, word in enumerate(_WORDS)}.get(text, text).strip(". \n")
    return two_way(said.strip(), reference) or text in said.lower()


_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_read_letter = by_letter(lambda item, said: mvbench_letter(said))


def _lmms_eval_judge(item: Item, response: str) -> Verdict:
    """An answer that is exactly empty leaves the denominator."""
    return Verdict(None) if response == "" else _read_letter(item, response)


def _with_average(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each task; Avg over all items; macro_avg over the tasks, which is the same for the 20 x 200 items."""
    tasks = per_kind(rows)
    return tasks | {"Avg": accuracy(rows), "macro_avg": mean(list(tasks.values()))}


def _without_average(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each task. lmms-eval publishes no overall figure; macro_avg is ours."""
    tasks = per_kind(rows)
    return tasks | {"macro_avg": mean(list(tasks.values()))}


_NOTEBOOK = "OpenGVLab/Ask-Anything@4dd8210b030374bb0c510a57dfbe916f70d3ef71, video_chat2/mvbench.ipynb"
_VLMEVALKIT = "open-compass/VLMEvalKit@e8e78f05f3080fe28154f2130321f17951c3be94"

BENCHMARKS = (
    Benchmark(
        name="mvbench",
        title="MVBench",
        read=read,
        protocols=by_name(
            Protocol(
                "official",
                _NOTEBOOK,
                by_option(_after_the_start),
                _with_average,
                "Avg",
                _official_prompt,
                Frames("mvbench", 16),
                100,
            ),
            Protocol(
                "official_no_prefix",
                f"{_NOTEBOOK}, its test on the answer as it is",
                by_option(two_way),
                _with_average,
                "Avg",
                _official_prompt,
                Frames("mvbench", 16),
                100,
            ),
            Protocol(
                "vlmevalkit",
                f"{_VLMEVALKIT}, check_ans, without the judge that its classes ask about what it calls wrong",
                by_option(lambda said, reference: two_way(said.strip(), reference)),
                _with_average,
                "Avg",
                _vlmevalkit_prompt,
                Frames("mvbench", 8),
                100,
            ),
            Protocol(
                "vlmevalkit_mp4",
                f"{_VLMEVALKIT}, check_ans_advanced, which none of its classes calls",
                by_option(_quoted),
                _with_average,
                "Avg",
                _vlmevalkit_prompt,
                Frames("vlmevalkit_mp4", 8),
                100,
            ),
            Protocol(
                "video_ccam",
                "QQ-MM/Video-CCAM@5f36c04446c1ac24f8df9cd698c108f1e845f3ed, eval/mvbench.py",
                by_option(without_prefixes),
                _with_average,
                "Avg",
                _video_ccam_prompt,
                Frames("mvbench", 32),
                100,
            ),
            Protocol(
                "lmms_eval",
                "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/mvbench",
                _lmms_eval_judge,
                _without_average,
                "macro_avg",
                _lmms_eval_prompt,
                own=lambda item: replace(item, media=item.details["lmms_eval_media"], bound=None),
            ),
        ),
        data="OpenGVLab/MVBench on the Hub: the folder with json/<task>.json. Media: its folder video, unpacked.",
    ),
)
