"""Multiple choice as the scripts of Video-CCAM ask and judge it: protocol "video_ccam".

Other scripts put the same questions in other words and read answers by other rules, which moves scores by tens of
percent. So these are the rules of one protocol, and a score has to name it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PROTOCOL = "video_ccam"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
PREFIXES = ("Answer:", "The answer is", "Answer is")
"""What may stand before an answer. MLVU's script does not know the last one."""

_VIDEO_MME = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)


def lettered(number: int, text: str) -> str:
    """An option with its letter, "(A) text"; the number -1, of an answer that is no option, gives "(@) text"."""
    return f"({chr(ord('A') + number)}) {text}"


def question_block(question: str, options: Sequence[str]) -> str:
    """The question and its options, in MVBench and MLVU."""
    return "\n".join([f"Question: {question}", "Options:", *map(lettered, range(len(options)), options)]).rstrip()


def videovista_block(question: str, options: Sequence[str]) -> str:
    """The question and its options, in VideoVista: it ends in a line break."""
    return "\n".join([question, "Options:", *map(lettered, range(len(options)), options), ""])


def video_mme_block(question: str, options: Sequence[str], subtitles: str | None = None) -> str:
    """The question and its options "A. ...", in Video-MME; subtitles come first."""
    heard = [] if subtitles is None else [f"This video's subtitles are listed below:\n{subtitles}"]
    return "\n".join([*heard, _VIDEO_MME, question, *options])


def user_turn(block: str) -> str:
    """What the user says, the clip's place included."""
    return f"<video>\n{block}\n{INSTRUCTION}"


def is_right(said: str, answer: str, prefixes: Iterable[str] = PREFIXES) -> bool:
    """Whether an answer counts as right.

    The first word of each, in lower case and without full stops, is compared: either may hold the other. So ")" alone
    counts as right, and so does any part of "(a)"; this is the protocol, not a mistake here.

    Args:
        said: the model's words, as they are.
        answer: the right answer, such as "(B) Tidied up the blanket."
        prefixes: each is taken away once, in this order, where `said` begins with it.
    """
    for prefix in prefixes:
        said = said.removeprefix(prefix).strip()
    one, other = (text.split(" ")[0].lower().replace(".", "") for text in (said, answer))
    return bool(one) and (one in other or other in one)


class Cue(NamedTuple):
    """One subtitle, in seconds."""

    start: float
    end: float
    text: str


def read_srt(content: str) -> list[Cue]:
    r"""The cues of a SubRip file by start time; line breaks become `\N` and italics `{\i1}`, as pysubs2 writes them."""
    cues = []
    for block in re.split(r"\n\s*\n", content.replace("\r\n", "\n").strip()):
        lines = block.split("\n")
        times = [re.findall(r"(\d+):(\d\d):(\d\d)[,.](\d+)", line) if "-->" in line else [] for line in lines]
        at = next((i for i, found in enumerate(times) if len(found) == 2), None)
        if at is not None:
            text = r"\N".join(line.strip() for line in lines[at + 1 :])
            cues.append(Cue(*map(_seconds, times[at]), re.sub(r"<(/?)([bisu])>", _as_override, text)))
    return sorted(cues, key=lambda cue: cue.start)


def _seconds(time: tuple[str, str, str, str]) -> float:
    hours, minutes, seconds, fraction = time
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds) + float(f"0.{fraction}")


def _as_override(tag: re.Match[str]) -> str:
    return rf"{{\{tag[2]}{0 if tag[1] else 1}}}"


def subtitles_at(cues: Sequence[Cue], times: Iterable[float]) -> str:
    """The subtitles of sampled frames, one a line: at each time the first cue that has not ended, if it has begun.

    A cue is repeated for every frame that it spans. Times ascend: a cue that ended is not looked at again.
    """
    lines, place = [], 0
    for time in times:
        while place < len(cues) and cues[place].end < time:
            place += 1
        if place < len(cues) and cues[place].start < time:
            lines.append(cues[place].text.replace(r"\N", " "))
    return "\n".join(line for line in lines if line.strip())
