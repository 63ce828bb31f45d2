"""Position schemes against their formulas, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import GRIDS, MIXED, SHORT, Token, batches, dialogues, media, packs, tokens

from mmzoo import positions
from mmzoo.errors import InputError
from mmzoo.layout import Modality, Role, Span, TokenLayout, batch, image, lay_out, pack, text, video
from mmzoo.positions import Scheme

Formula = Callable[[Token, list[Token]], float]
"""Position of a token from all tokens of its sample."""


def is_visual(token: Token) -> bool:
    return token.modality in (Modality.IMAGE, Modality.VIDEO)


def picture(token: Token) -> tuple[int, int]:
    return token.segment, token.frame


def sequential(token: Token, sample: list[Token]) -> float:
    return sum(other.place < token.place for other in sample)


def size(token: Token, sample: list[Token]) -> tuple[int, int]:
    """Height and width of the token's image or frame."""
    own = [other for other in sample if is_visual(other) and picture(other) == picture(token)]
    return 1 + max(other.row for other in own), 1 + max(other.column for other in own)


def concentric(token: Token, sample: list[Token]) -> float:
    """specs/cca-llava.md: text before costs 1 a token, an image ceil(min(h, w) / 2), and its own ring is added."""
    before = [other for other in sample if other.place < token.place]
    position = sum(not is_visual(other) for other in before)
    own = picture(token) if is_visual(token) else None
    for one in {picture(other) for other in before if is_visual(other)} - {own}:
        height, width = size(next(other for other in before if is_visual(other) and picture(other) == one), sample)
        position += -(-min(height, width) // 2)
    if own:
        height, width = size(token, sample)
        position += min(token.row, token.column, height - 1 - token.row, width - 1 - token.column)
    return position


def temporal(token: Token, sample: list[Token]) -> float:
    """specs/tc-llava.md: text tokens before it, plus frames other than its own that started before it."""
    before = [other for other in sample if other.place < token.place]
    own = picture(token) if is_visual(token) else None
    frames = {picture(other) for other in before if is_visual(other)} - {own}
    return sum(not is_visual(other) for other in before) + len(frames)


def by_formula(formula: Formula, layout: TokenLayout) -> torch.Tensor:
    """Positions [B, L]; padding gets 0."""
    answer = torch.zeros(layout.shape[:2])
    for b, row in enumerate(tokens(layout)):
        for token in row:
            if token.sample != -1:
                answer[b, token.place] = formula(token, [other for other in row if other.sample == token.sample])
    return answer


@given(MIXED)
def test_sequential_counts_inside_each_sample(layout: TokenLayout) -> None:
    assert torch.equal(positions.sequential(layout).float(), by_formula(sequential, layout))


def test_sequential_starts_anew_in_each_sample_and_after_padding() -> None:
    packed = pack([lay_out(text(2), image(1, 2)), lay_out(text(1)), lay_out(text(2))])
    left = batch([packed, lay_out(text(3))], "left")
    assert positions.sequential(left).tolist() == [[0, 1, 2, 3, 0, 0, 1], [0, 0, 0, 0, 0, 1, 2]]
    right = batch([packed, lay_out(text(3))], "right")
    assert positions.sequential(right).tolist() == [[0, 1, 2, 3, 0, 0, 1], [0, 1, 2, 0, 0, 0, 0]]
    assert positions.sequential(left).dtype == torch.int64


@given(MIXED)
def test_concentric_equals_its_formula(layout: TokenLayout) -> None:
    assert torch.equal(positions.concentric(layout).float(), by_formula(concentric, layout))


def test_a_picture_at_a_border_of_packed_samples_starts_anew() -> None:
    layout = pack([lay_out(image(3, 3)), lay_out(image(2, 2)), lay_out(video(1, 1))])
    ring = [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert positions.concentric(layout).tolist() == [[*ring, 0, 0, 0, 0, 0]]
    assert positions.temporal_position(layout).tolist() == [[0] * 14]


@given(st.lists(st.sampled_from(GRIDS), min_size=1, max_size=3), st.integers(0, 2))
def test_concentric_positions_of_several_images(grids: list[tuple[int, int]], words: int) -> None:
    layout = lay_out(*(span for grid in grids for span in (image(*grid), text(words))), text(1))
    assert torch.equal(positions.concentric(layout).float(), by_formula(concentric, layout))


@pytest.mark.parametrize(
    ("rows", "columns", "rings", "following"),
    [
        (1, 1, [0], 1),
        (1, 4, [0, 0, 0, 0], 1),
        (3, 2, [0] * 6, 1),
        (3, 3, [0, 0, 0, 0, 1, 0, 0, 0, 0], 2),
        (3, 4, [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], 2),
        (5, 5, [0] * 6 + [1, 1, 1, 0, 0, 1, 2, 1, 0, 0, 1, 1, 1] + [0] * 6, 3),
    ],
)
def test_rings_of_odd_and_rectangular_images(rows: int, columns: int, rings: list[int], following: int) -> None:
    position = positions.concentric(lay_out(text(2), image(rows, columns), text(2)))[0].tolist()
    assert position == [0, 1, *(2 + ring for ring in rings), 2 + following, 3 + following]


def test_each_frame_of_a_clip_has_rings_of_its_own() -> None:
    layout = lay_out(video(2, 3, 3), text(1))
    frame = [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert positions.concentric(layout).tolist() == [[*frame, *(2 + ring for ring in frame), 4]]


@given(st.integers(1, 9))
def test_concentric_positions_of_text_alone_are_sequential(length: int) -> None:
    layout = lay_out(text(length))
    assert torch.equal(positions.concentric(layout), positions.sequential(layout))
    assert positions.concentric(layout).dtype == torch.int64


@pytest.mark.parametrize("span", [image(4, grid=False), video(2, 2, grid=False)], ids=["image", "video"])
def test_concentric_needs_visual_tokens_on_a_grid(span: Span) -> None:
    with pytest.raises(InputError, match="patch grid"):
        positions.concentric(batch([lay_out(text(9)), lay_out(text(1), span)]))


@given(MIXED)
def test_temporal_equals_its_formula(layout: TokenLayout) -> None:
    assert torch.equal(positions.temporal_position(layout).float(), by_formula(temporal, layout))


@given(MIXED, st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([0.5, 1.0]))
def test_temporal_dual_is_the_weighted_sum(layout: TokenLayout, beta: float, alpha: float) -> None:
    expected = alpha * by_formula(sequential, layout) + beta * by_formula(temporal, layout)
    actual = positions.temporal_dual(alpha, beta)(layout)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_temporal_is_constant_inside_a_frame_and_counts_clips_on() -> None:
    layout = lay_out(text(2), video(2, 2), text(1), image(2), image(1), text(1))
    assert positions.temporal_position(layout).tolist() == [[0, 1, 2, 2, 3, 3, 4, 5, 5, 6, 7]]
    assert positions.temporal_dual()(layout).tolist() == [[0, 2, 4, 5, 7, 8, 10, 12, 13, 15, 17]]


SCHEMES = [
    *(positions.scheme(name) for name in positions.SCHEMES),
    positions.temporal_dual(beta=0.5),
    positions.temporal_dual(alpha=0.5, beta=2.0),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def continued(scheme: Scheme, layout: TokenLayout, count: int) -> torch.Tensor:
    """Positions [B, count] of generated tokens, from the largest one of their sample."""
    own = layout.sample == layout.sample[:, -1:]
    last = [scheme(layout).masked_fill(~own, -1).amax(1, keepdim=True)]
    for _ in range(count):
        last.append(scheme.next(last[-1]))
    return torch.cat(last[1:], 1)


def ending_in_text(samples: st.SearchStrategy[TokenLayout]) -> st.SearchStrategy[TokenLayout]:
    return samples.map(lambda layout: layout.with_answer())


@every_scheme
@given(layout=batches(ending_in_text(dialogues()) | packs(ending_in_text(SHORT)), sides=["left"]))
def test_generated_text_goes_on_by_the_step(scheme: Scheme, layout: TokenLayout) -> None:
    assert torch.equal(scheme(layout.with_answer(3))[:, -3:], continued(scheme, layout, 3))


@every_scheme
@given(layout=batches(st.builds(lay_out, st.builds(text, st.integers(0, 2)), media()), sides=["left"]))
def test_generated_text_goes_on_after_a_picture(scheme: Scheme, layout: TokenLayout) -> None:
    assert torch.equal(scheme(layout.with_answer(3))[:, -3:], continued(scheme, layout, 3))


@every_scheme
@given(layout=batches(dialogues(), sides=["right"]))
def test_generated_text_after_padding_goes_on_where_its_sample_ended(scheme: Scheme, layout: TokenLayout) -> None:
    unpadded = [TokenLayout(layout.data[b : b + 1, layout.valid[b]]) for b in range(layout.shape[0])]
    expected = torch.cat([scheme(row.with_answer(2))[:, -2:] for row in unpadded])
    assert torch.equal(scheme(layout.with_answer(2))[:, -2:], expected)


@every_scheme
@given(layout=batches(dialogues() | packs(SHORT)))
@settings(max_examples=15)
def test_padding_stands_at_zero_and_earlier_tokens_do_not_move(scheme: Scheme, layout: TokenLayout) -> None:
    position = scheme(layout)
    assert not position[~layout.valid].any()
    assert torch.equal(scheme(layout.with_answer(2))[:, : len(layout)], position)


def test_the_step_is_what_one_text_token_adds() -> None:
    last = torch.tensor([[4], [7]])
    assert positions.sequential.next(last).tolist() == [[5], [8]]
    assert positions.concentric.next(last).tolist() == [[5], [8]]
    assert positions.temporal_dual(alpha=1, beta=0.5).next(last).tolist() == [[5.5], [8.5]]


def test_tokens_that_are_neither_text_nor_visual_cost_one_step() -> None:
    """Sound and learned queries are ordinary places in all schemes."""
    layout = lay_out(text(1), Span(Modality.AUDIO, frames=2), Span(Modality.QUERY, rows=1), text(1, Role.ANSWER))
    for scheme in (positions.sequential, positions.concentric):
        assert scheme(layout).tolist() == [[0, 1, 2, 3, 4]]
    assert positions.temporal_position(layout).tolist() == [[0, 1, 2, 3, 4]]


def test_a_scheme_is_found_by_name_with_its_options() -> None:
    layout = lay_out(text(2), video(2, 2))
    by_name = positions.scheme("temporal-dual", alpha=0.5, beta=2.0)
    assert torch.equal(by_name(layout), positions.temporal_dual(0.5, 2.0)(layout))
    assert "alpha=0.5, beta=2.0" in by_name.name
    assert positions.scheme("sequential") is positions.sequential
    assert positions.scheme("concentric") is positions.concentric
    with pytest.raises(InputError, match="'rope'.*sequential, concentric, temporal-dual"):
        positions.scheme("rope")
