"""Random token layouts, and a view of them as plain integers for the references of the tests.

A sample is a layout [1, L, K] of at most about 25 tokens; packing and batching make at most about 40 of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from hypothesis import strategies as st

from mmzoo.layout import Modality, Role, Span, TokenLayout, batch, image, lay_out, pack, text, video
from mmzoo.masks.ccam import query_layout

GRIDS = [(1, 1), (1, 4), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3), (3, 5), (4, 4), (5, 3)]
FRAME_GRIDS = [(1, 1), (1, 3), (2, 2), (3, 3)]
Samples = st.SearchStrategy[TokenLayout]


class Token(NamedTuple):
    """One token. `place` is counted here; the others are the layout's fields."""

    place: int
    sample: int
    modality: int
    segment: int
    turn: int
    role: int
    frame: int
    row: int
    column: int


def tokens(layout: TokenLayout) -> list[list[Token]]:
    """Every batch row as a list of tokens, padding included."""
    return [[Token(place, *fields[1:]) for place, fields in enumerate(row)] for row in layout.data.tolist()]


@st.composite
def media(draw: st.DrawFn, *, grid: bool = True) -> Span:
    if draw(st.booleans()):
        return image(*draw(st.sampled_from(GRIDS)), grid=grid)
    return video(draw(st.integers(1, 3)), *draw(st.sampled_from(FRAME_GRIDS)), grid=grid)


ANSWER, LATER = Role.ANSWER, 1
TELLING = [
    lay_out(text(2), image(3, 3), text(2), text(1, ANSWER)),
    lay_out(image(1, 2), text(2), image(2, 2), text(1), text(2, ANSWER), text(2, turn=LATER)),
    lay_out(text(1), video(2, 2, 2), text(1), text(2, ANSWER)),
    lay_out(
        text(1), image(2), text(1, ANSWER), text(2, turn=LATER), replace(image(3), turn=LATER), text(1, turn=LATER)
    ),
    lay_out(text(1), image(2, 1), image(1, 3), video(2, 1), text(2)),
    lay_out(image(2, 2), text(3, ANSWER)),
    lay_out(text(3), text(2, ANSWER), text(2, turn=LATER), text(1, ANSWER, LATER)),
    lay_out(text(2), video(3, 1, 3)),
]
"""Samples of at most 14 tokens that tell the rules apart: chance alone draws such seldom."""


def dialogues(*, max_tokens: int = 24) -> Samples:
    """Single samples of text and media."""
    return st.sampled_from(TELLING) | made_up_dialogues(max_tokens)


@st.composite
def made_up_dialogues(draw: st.DrawFn, max_tokens: int) -> TokenLayout:
    """Turns of a prompt and an answer, or a caption, which is all answer. It may end anywhere, as a prompt does."""
    parts = st.lists(st.integers(1, 3) | media(), min_size=1, max_size=3)
    spans: list[Span] = []
    if draw(st.integers(0, 4)) == 0:
        spans = [part if isinstance(part, Span) else text(part, ANSWER) for part in draw(parts)]
    else:
        for turn in range(draw(st.integers(1, 3))):
            prompt = [part if isinstance(part, Span) else text(part) for part in [*draw(parts), 1]]
            spans += [replace(span, turn=turn) for span in prompt]
            spans.append(text(draw(st.integers(1, 3)), ANSWER, turn))
    ends = accumulate(map(len, spans))
    fitting = [span for span, end in zip(spans, ends, strict=True) if end <= max_tokens] or [text(1)]
    return lay_out(*fitting[: draw(st.sampled_from([len(fitting), *range(1, len(fitting))]))])


@st.composite
def clips(draw: st.DrawFn, *, max_frames: int = 9) -> TokenLayout:
    """One sample of latent frames."""
    return lay_out(Span(Modality.LATENT, draw(st.integers(1, max_frames)), draw(st.integers(1, 2))))


@st.composite
def clean_and_noisy(draw: st.DrawFn) -> TokenLayout:
    """One clip twice: clean (PROMPT), then as it is denoised (ANSWER)."""
    frames, rows = draw(st.integers(1, 7)), draw(st.integers(1, 2))
    halves = [Span(Modality.LATENT, frames, rows, role=role) for role in (Role.PROMPT, Role.ANSWER)]
    return lay_out(*halves)


@st.composite
def scales(draw: st.DrawFn) -> TokenLayout:
    """One token map at growing scales, a segment each."""
    sides = sorted(draw(st.sets(st.integers(1, 4), min_size=1, max_size=3)))
    return lay_out(*(Span(Modality.LATENT, rows=side, columns=side) for side in sides))


@st.composite
def projections(draw: st.DrawFn, rounding: str) -> tuple[TokenLayout, TokenLayout]:
    """Learned queries and the frames that they read: two layouts of one sample."""
    frames, queries = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    return query_layout(queries, frames, rounding), lay_out(video(frames, draw(st.integers(1, 3))))


def packs(samples: Samples, max_samples: int = 3) -> Samples:
    """Rows of up to `max_samples` packed samples."""
    return st.lists(samples, min_size=1, max_size=max_samples).map(pack)


@st.composite
def batches(draw: st.DrawFn, rows: Samples, sides: Sequence[str] = ("left", "right")) -> TokenLayout:
    """Up to three rows, padded on one of the sides."""
    return batch(draw(st.lists(rows, min_size=1, max_size=3)), draw(st.sampled_from(sides)))


SHORT = dialogues(max_tokens=14)
"""Samples short enough to be packed."""
MIXED = batches(dialogues() | packs(SHORT))
"""Padded batches of single and packed samples."""
