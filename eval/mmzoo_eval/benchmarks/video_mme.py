"""Video-MME: 900 videos of three lengths with three questions each, options A to D, with and without subtitles."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mmzoo_eval.aggregates import accuracy, per_detail, per_kind
from mmzoo_eval.benchmark import Benchmark, Frames, Item, Judged, Prompt, Protocol, Verdict, by_name, lettered, scores
from mmzoo_eval.parsing import Judge, by_letter, by_priority, first_capital
from mmzoo_eval.prompts import LETTER_ONLY
from mmzoo_eval.rows import Row, items, table_rows, the_file
from mmzoo_eval.statistics import standard_error
from mmzoo_eval.subtitles import each_once, in_font_tags, one_a_frame, subtitled

DURATIONS = ("short", "medium", "long")
DOMAINS = (
    *("Knowledge", "Film & Television", "Sports Competition", "Artistic Performance", "Life Record", "Multilingual"),
)
SUB_CATEGORIES = (
    *("Humanity & History", "Literature & Art", "Biology & Medicine", "Finance & Commerce", "Astronomy", "Geography"),
    *("Law", "Life Tip", "Technology", "Animation", "Movie & TV Show", "Documentary", "News Report", "Esports"),
    *("Basketball", "Football", "Athletics", "Other Sports", "Stage Play", "Magic Show", "Variety Show", "Acrobatics"),
    *("Handicraft", "Food", "Fashion", "Daily Life", "Travel", "Pet & Animal", "Exercise", "Multilingual"),
)
TASK_TYPES = (
    *("Temporal Perception", "Spatial Perception", "Attribute Perception", "Action Recognition", "Object Recognition"),
    *("OCR Problems", "Counting Problem", "Temporal Reasoning", "Spatial Reasoning", "Action Reasoning"),
    *("Object Reasoning", "Information Synopsis"),
)
GROUPS = {"domain": DOMAINS, "sub_category": SUB_CATEGORIES, "task_type": TASK_TYPES}

COLUMNS = ("duration", "domain", "sub_category", "videoID", "question_id", "task_type", "question", "options", "answer")

OFFICIAL_PHRASES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    # Two commas are missing upstream: these four are two, and never occur.
    *("The best option isThe correct option is", "Best answer:Best option:"),
    *("Answer:", "Option:", "The correct answer", "The correct option"),
)
VLMEVALKIT_PHRASES = OFFICIAL_PHRASES[:8]
V2_PHRASES = (
    *("Final Answer:", "The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option is", "The correct option is", "Best answer:", "Best option:", "Answer:", "Option:"),
)

_SELECT = (
    "Select the best answer to the following multiple-choice question based on the video{}. Respond with only the "
    "letter (A, B, C, or D) of the correct option."
)


def read(path: Path) -> list[Item]:
    """The items of the parquet file on the Hub, or of its rows as a JSON list; or of the folder that holds either.

    Subtitles are taken from a folder `subtitle` beside the file or one above, where there is one.
    """
    file = the_file(path, "questions.json", "videomme/*.parquet", "*.parquet")
    folders = (file.parent / "subtitle", file.parent.parent / "subtitle")
    subtitles = next((folder for folder in folders if folder.is_dir()), None)
    return items(table_rows(file, COLUMNS), partial(_item, subtitles))


def _item(subtitles: Path | None, row: Row) -> Item:
    published, video = row.texts("options"), row.text("videoID")
    letters = [lettered(i) for i in range(len(published))]
    srt = subtitles / f"{video}.srt" if subtitles else None
    return Item(
        id=row.text("question_id"),
        question=row.text("question"),
        answer=letters.index(row.among("answer", letters)),
        options=tuple(re.sub(rf"^{letter}\.\s*", "", text) for letter, text in zip(letters, published)),
        media=f"{video}.mp4",
        kind=row.among("duration", DURATIONS),
        cluster=video,
        details={field: row.text(field) for field in GROUPS}
        | {"options": published, "subtitles": str(srt) if srt and srt.is_file() else None},
    )


def _lines(*parts: str) -> str:
    return "\n".join(parts)


def _official_prompt(item: Item, subtitles: str | None = None) -> Prompt:
    before = () if subtitles is None else ("This video's subtitles are listed below:", subtitles)
    asked = (_SELECT.format(""), item.question, *item.details["options"], "The best answer is:")
    return Prompt(_lines(*before, *asked))


def _lmms_eval_prompt(item: Item, subtitles: str | None = None) -> Prompt:
    asked = (_SELECT.format(" and the subtitles"), item.question, *item.details["options"])
    if subtitles is None:
        return Prompt(_lines(*asked, "", LETTER_ONLY))
    return Prompt(_lines("This video's subtitles are listed below: ", subtitles, *asked, "The best answer is:"))


def _vlmevalkit_prompt(item: Item) -> Prompt:
    select = f"\nThese are the frames of a video. {_SELECT.format('')}"
    return Prompt(_lines(select, f"Question: {item.question}", *item.details["options"], "Answer: "))


def video_ccam_prompt(item: Item, subtitles: str | None = None) -> Prompt:
    """Of the protocol "video_ccam"; the options are those published, with letters, in the item's details."""
    before = () if subtitles is None else ("This video's subtitles are listed below:", subtitles)
    return Prompt(_lines(*before, _SELECT.format(""), item.question, *item.details["options"], LETTER_ONLY))


def _capital(phrases: Sequence[str], letters: str = "ABCD") -> Judge:
    return by_letter(lambda item, said: first_capital(said, phrases, letters))


def _official_judge(item: Item, response: str) -> Verdict:
    """An answer that is not found is dropped from the denominator, so a model that refuses is flattered."""
    verdict = _capital(OFFICIAL_PHRASES)(item, response)
    return verdict if verdict.parsed is not None else Verdict(None)


def _details(rows: Sequence[Judged]) -> dict[str, float]:
    """Of each duration; of each domain, sub-category and task type, over all and in each duration."""
    values = per_kind(rows)
    for field in GROUPS:
        values |= per_detail(rows, field)
    for duration in DURATIONS:
        some = [row for row in rows if row.item.kind == duration]
        for field in GROUPS:
            values |= per_detail(some, field, prefix=f"{duration}/")
    return values


def _official(rows: Sequence[Judged]) -> dict[str, float]:
    counted = scores(rows)
    return {"overall": accuracy(rows), "correct": sum(counted), "answered": len(counted)} | _details(rows)


def _micro(rows: Sequence[Judged]) -> dict[str, float]:
    return {"overall": accuracy(rows)} | _details(rows)


def _lmms_eval(rows: Sequence[Judged]) -> dict[str, float]:
    """The errors are those of the fraction, as upstream prints them, not of the percentage."""
    counted, clusters = scores(rows), [row.item.cluster for row in rows]
    errors = {
        "stderr_clt": standard_error(counted),
        "stderr_clustered_by_videoID": standard_error(counted, clusters),
    }
    return _micro(rows) | errors


def printed_report(rows: Sequence[Judged]) -> str:
    """What the official script prints: a part for each duration and one for all. A group without answers has 0.0 %."""
    parts = [(f"Evaluation on video Type: {name}", "Video Categories", name) for name in DURATIONS]
    parts.append(("Evaluation on the entire dataset", "Video Domains", ""))
    lines: list[str] = []
    for title, domains, duration in parts:
        some = [row for row in rows if not duration or row.item.kind == duration]
        lines += ["=" * 37, title, "=" * 37]
        for heading, (field, names) in zip((domains, "Video Sub Categories", "Task Categories"), GROUPS.items()):
            values = per_detail(some, field)
            lines += ["-" * 37, heading, "-" * 37]
            lines += [_share(name, values.get(f"{field}/{name}", 0.0)) for name in names]
        lines += ["-" * 37, "Overall Performance", "-" * 37, _share("Overall", accuracy(some)), "", ""]
    return "\n".join(lines[:-1])


def _share(name: str, value: float) -> str:
    return f"{name}:  {0.0 if value != value else value:.1f}%"


_OFFICIAL = "thanku-all/parse_answer@afd52cfe3dde5b3685e0d4f760c10c756860c758, eval_your_results.py"
_LMMS_EVAL = "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/videomme"
_VLMEVALKIT = "open-compass/VLMEvalKit@e8e78f05f3080fe28154f2130321f17951c3be94"
_VIDEO_CCAM = "QQ-MM/Video-CCAM@5f36c04446c1ac24f8df9cd698c108f1e845f3ed, eval/videomme.py"

_priority = by_letter(lambda item, said: by_priority(said))
_heard: dict[str, Callable[[Item], Prompt]] = {
    "official": subtitled(_official_prompt, lambda cues, seen: each_once(cues, seen.times)),
    "lmms_eval": subtitled(_lmms_eval_prompt, in_font_tags),
    "video_ccam": subtitled(video_ccam_prompt, lambda cues, seen: one_a_frame(cues, seen.times)),
}
_UNIFORM_96 = Frames("ccam_uniform", 96)

BENCHMARKS = (
    Benchmark(
        name="video_mme",
        title="Video-MME",
        read=read,
        protocols=by_name(
            Protocol("official", _OFFICIAL, _official_judge, _official, "overall", _official_prompt),
            Protocol("official_subtitles", _OFFICIAL, _official_judge, _official, "overall", _heard["official"]),
            Protocol(
                "vlmevalkit",
                f"{_VLMEVALKIT}, exact matching",
                _capital(VLMEVALKIT_PHRASES),
                _micro,
                "overall",
                _vlmevalkit_prompt,
                Frames("vlmevalkit_nframe", 8),
            ),
            Protocol(
                "videomme_v2",
                f"{_VLMEVALKIT}, its version for letters A to H",
                _capital(V2_PHRASES, "ABCDEFGH"),
                _micro,
                "overall",
                _vlmevalkit_prompt,
                Frames("vlmevalkit_nframe", 8),
            ),
            Protocol("lmms_eval", _LMMS_EVAL, _priority, _lmms_eval, "overall", _lmms_eval_prompt),
            Protocol("lmms_eval_subtitles", _LMMS_EVAL, _priority, _lmms_eval, "overall", _heard["lmms_eval"]),
            Protocol(
                "video_ccam",
                f"{_VIDEO_CCAM}, scored by the official script",
                _official_judge,
                _official,
                "overall",
                video_ccam_prompt,
                _UNIFORM_96,
                100,
            ),
            Protocol(
                "video_ccam_subtitles",
                f"{_VIDEO_CCAM}, scored by the official script",
                _official_judge,
                _official,
                "overall",
                _heard["video_ccam"],
                _UNIFORM_96,
                100,
            ),
        ),
        data="Video-MME as a dataset of the Hub: videomme/test-*.parquet (with pyarrow) or its rows as questions.json; "
        "beside that folder subtitle/<videoID>.srt. Media: the folder with <videoID>.mp4.",
    ),
)
