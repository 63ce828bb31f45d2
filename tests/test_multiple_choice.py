"""The protocol "video_ccam": what its recorded data, in the parity cases, does not hold."""

from __future__ import annotations

import pytest

from mmzoo_eval.multiple_choice import PREFIXES, Cue, is_right, lettered, question_block, read_srt, subtitles_at

SRT = """2
00:00:04,250 --> 00:00:05,000
<b>later</b>
second line

1
00:00:01,000 --> 00:00:02,500
first

a block without times
"""


@pytest.mark.parametrize("content", [SRT, SRT.replace("\n", "\r\n"), SRT.replace("\n\n", "\n \n")])
def test_cues_come_in_time_whatever_the_line_ends(content: str) -> None:
    first, later = read_srt(content)
    assert first == Cue(1.0, 2.5, "first")
    assert later == Cue(4.25, 5.0, r"{\b1}later{\b0}\Nsecond line")
    assert read_srt("") == []


def test_subtitles_stand_where_frames_are() -> None:
    cues = [Cue(1, 2, "one"), Cue(3, 6, r"two\Nlines"), Cue(4, 5, "hidden by the one before"), Cue(7, 8, " ")]
    assert subtitles_at(cues, [0, 1]) == ""  # a cue that begins at the frame has not begun
    assert subtitles_at(cues, [1.5, 2, 2.5, 3.5]) == "one\none\ntwo lines"
    assert subtitles_at(cues, [4.5, 6.5, 7.5, 9]) == "two lines"


def test_an_answer_is_its_first_word() -> None:
    assert is_right("Answer: (B) because", "(B) Tidied up.")
    assert is_right("The answer is b.", "(B) Tidied up.")
    assert not is_right("", "(B) x")
    assert not is_right("Because B", "(B) x")
    assert is_right("Answer is B", "(B) x") and not is_right("Answer is B", "(B) x", PREFIXES[:2])


def test_options_get_letters() -> None:
    assert question_block("why?", ["so", "not "]) == "Question: why?\nOptions:\n(A) so\n(B) not"
    assert lettered(-1, "none") == "(@) none"
