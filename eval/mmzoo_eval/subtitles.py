r"""Subtitles of a video, and which of them stand beside the frames that are shown.

A prompt that quotes them can be written only once the frames are known, so it is given `shown(item, video)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mmzoo.errors import InputError
from mmzoo.media import Video, sample_indices
from mmzoo_eval.annotations import read_text
from mmzoo_eval.benchmark import Item, Prompt


class Cue(NamedTuple):
    """One subtitle, in seconds."""

    start: float
    end: float
    text: str


class Shown(NamedTuple):
    """What is known of a video once it was read: when the frames shown are, in seconds; frames in all; their rate."""

    times: tuple[float, ...]
    num_total: int
    fps: float


def shown(item: Item, video: Video | None) -> Item:
    """The item with what its prompt may have to know of the video that was read.

    None stands for a video that was not read yet: the prompt then quotes all subtitles. So it is no prompt to ask with,
    but holds all that can decide one together with the video and the choice of frames, as a digest of it needs.
    """
    return replace(item, details={**item.details, "shown": video})


def subtitled(
    prompt: Callable[[Item, str | None], Prompt], choose: Callable[[Sequence[Cue], Shown], str]
) -> Callable[[Item], Prompt]:
    """A prompt with subtitles, which are chosen by what is shown; None where the video has no subtitle file.

    Raises InputError for an item without `shown` and for a video without a rate, DatasetError for an unreadable file.
    """

    def with_subtitles(item: Item) -> Prompt:
        path = item.details.get("subtitles")
        if path is None:
            return prompt(item, None)
        if "shown" not in item.details:
            raise InputError(
                f"Which subtitles of {item.media} are quoted depends on the frames that are shown. Read the video, and "
                "give the item to mmzoo_eval.subtitles.shown."
            )
        cues, video = read_srt(read_text(Path(path))), item.details["shown"]
        return prompt(item, _all(cues) if video is None else choose(cues, _seen(video)))

    return with_subtitles


def _all(cues: Iterable[Cue]) -> str:
    return "\n".join(cue.text for cue in cues)


def _seen(video: Video) -> Shown:
    if not video.fps:
        raise InputError(f"{video.source} has no frame rate, so which of its subtitles stand beside frames is unknown.")
    return Shown(tuple(index / video.fps for index in video.indices), video.num_total, video.fps)


def read_srt(content: str) -> list[Cue]:
    r"""The cues of a SubRip file by start time; line breaks become `\N` and italics `{\i1}`, as pysubs2 writes them."""
    cues = []
    for block in re.split(r"\n\s*\n", content.replace("\r\n", "\n").strip()):
        lines = block.split("\n")
        times = [re.findall(r"(\d+):(\d\d):(\d\d)[,.](\d+)", line) if "-->" in line else [] for line in lines]
        at = next((i for i, found in enumerate(times) if len(found) == 2), None)
        if at is not None:
            text = r"\N".join(line.strip() for line in lines[at + 1 :])
            start, end = map(_seconds, times[at])
            cues.append(Cue(start, end, re.sub(r"<(/?)([bisu])>", _as_override, text)))
    return sorted(cues, key=lambda cue: cue.start)


def _seconds(time: tuple[str, str, str, str]) -> float:
    hours, minutes, seconds, fraction = time
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds) + float(f"0.{fraction}")


def _as_override(tag: re.Match[str]) -> str:
    return rf"{{\{tag[2]}{0 if tag[1] else 1}}}"


def one_a_frame(cues: Sequence[Cue], times: Iterable[float]) -> str:
    """Video-CCAM's choice, one a line: at each time the first cue that has not ended, if it has begun.

    A cue is repeated for every frame that it spans. Times ascend: a cue that ended is not looked at again.
    """
    lines, place = [], 0
    for time in times:
        while place < len(cues) and cues[place].end < time:
            place += 1
        if place < len(cues) and cues[place].start < time:
            lines.append(cues[place].text.replace(r"\N", " "))
    return "\n".join(line for line in lines if line.strip())


def each_once(cues: Sequence[Cue], times: Sequence[float]) -> str:
    """Every cue that stands at one of these times, once, one a line, in the order of the video."""
    lines = [cue.text.replace(r"\N", " ") for cue in cues if any(cue.start <= time <= cue.end for time in times)]
    return "\n".join(line for line in lines if line.strip())


def in_font_tags(cues: Sequence[Cue], seen: Shown, num_frames: int = 32) -> str:
    """lmms-eval's choice: what `<font ...>` holds in the cues at evenly spaced frames, whatever the model is shown.

    Upstream joins a set, whose order differs from run to run; here it is the order of the video.
    """
    times = [i / seen.fps for i in sample_indices("linspace", num_total=seen.num_total, num_frames=num_frames)]
    marked = [cue._replace(text=" ".join(re.findall(r"<font[^>]*>(.*?)</font>", cue.text))) for cue in cues]
    return "\n".join(dict.fromkeys(each_once(marked, times).split("\n")))
