"""TokenLayout: what it says about each token, and how one is built, packed, padded, spliced and prolonged."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from layouts import MIXED, SHORT, packs, tokens

from mmzoo.errors import InputError
from mmzoo.layout import FIELDS, Modality, Role, Span, TokenLayout, batch, image, lay_out, pack, splice, text, video

TEXT, IMAGE, VIDEO = Modality.TEXT, Modality.IMAGE, Modality.VIDEO
PROMPT, ANSWER = Role.PROMPT, Role.ANSWER


def column(layout: TokenLayout, name: str, row: int = 0) -> list[int]:
    return getattr(layout, name)[row].tolist()


# Spans and lay_out.


def test_text_has_no_frame_and_no_place() -> None:
    layout = lay_out(text(2), text(1, ANSWER, turn=3))
    assert layout.shape == (1, 3, len(FIELDS))
    assert layout.data.dtype == torch.int32
    expected = {
        "index": [0, 1, 2],
        "sample": [0, 0, 0],
        "modality": [TEXT] * 3,
        "segment": [0, 0, 1],
        "turn": [0, 0, 3],
        "role": [PROMPT, PROMPT, ANSWER],
        "frame": [-1] * 3,
        "row": [-1] * 3,
        "column": [-1] * 3,
    }
    assert {name: column(layout, name) for name in FIELDS} == expected


def test_an_image_is_one_frame_in_raster_order() -> None:
    layout = lay_out(text(1), image(2, 3))
    assert column(layout, "modality") == [TEXT] + [IMAGE] * 6
    assert column(layout, "segment") == [0] + [1] * 6
    assert column(layout, "frame") == [-1] + [0] * 6
    assert column(layout, "row") == [-1, 0, 0, 0, 1, 1, 1]
    assert column(layout, "column") == [-1, 0, 1, 2, 0, 1, 2]
    assert column(layout, "role") == [PROMPT] * 7


def test_a_clip_is_frame_major() -> None:
    layout = lay_out(video(3, 1, 2))
    assert column(layout, "modality") == [VIDEO] * 6
    assert column(layout, "segment") == [0] * 6
    assert column(layout, "frame") == [0, 0, 1, 1, 2, 2]
    assert column(layout, "row") == [0] * 6
    assert column(layout, "column") == [0, 1] * 3


def test_resampled_tokens_have_a_frame_but_no_place() -> None:
    layout = lay_out(video(2, 2, grid=False), image(2, grid=False))
    assert column(layout, "frame") == [0, 0, 1, 1, 0, 0]
    assert column(layout, "row") == column(layout, "column") == [-1] * 6


@pytest.mark.parametrize("modality", list(Modality))
def test_a_span_of_any_modality_is_laid_out(modality: Modality) -> None:
    span = Span(modality, frames=2, rows=2, columns=1, role=ANSWER, turn=1)
    layout = lay_out(span)
    assert len(span) == len(layout) == 4
    assert column(layout, "modality") == [modality] * 4
    assert column(layout, "role") == [ANSWER] * 4
    assert column(layout, "turn") == [1] * 4
    assert column(layout, "frame") == ([-1] * 4 if modality == TEXT else [0, 0, 1, 1])


def test_empty_spans_leave_no_trace() -> None:
    assert torch.equal(lay_out(text(0), text(2), image(0), text(1)).data, lay_out(text(2), text(1)).data)
    assert lay_out().shape == lay_out(text(0)).shape == (1, 0, len(FIELDS))


@pytest.mark.parametrize("sizes", [{"frames": -1}, {"rows": -1}, {"columns": -1}, {"turn": -1}])
def test_a_span_of_negative_size_is_an_error(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="negative"):
        Span(IMAGE, **sizes)


# The object.


@pytest.mark.parametrize(
    "data",
    [
        torch.zeros(1, 2, len(FIELDS)),
        torch.zeros(1, 2, len(FIELDS), dtype=torch.int64),
        torch.zeros(2, len(FIELDS), dtype=torch.int32),
        torch.zeros(1, 2, len(FIELDS) - 1, dtype=torch.int32),
    ],
)
def test_a_layout_holds_one_int32_tensor_of_all_fields(data: torch.Tensor) -> None:
    with pytest.raises(InputError, match="int32 tensor"):
        TokenLayout(data)


def test_an_unknown_field_is_named_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="no field 'colour'.*index, sample, modality"):
        _ = lay_out(text(1)).colour


def test_fields_are_views_of_the_one_tensor() -> None:
    layout = lay_out(text(3))
    layout.data[0, 1, FIELDS.index("turn")] = 7
    assert column(layout, "turn") == [0, 7, 0]
    assert layout.turn.data_ptr() != layout.data.data_ptr()
    assert layout.turn.untyped_storage().data_ptr() == layout.data.untyped_storage().data_ptr()


def test_field_replaces_one_field_in_a_copy() -> None:
    layout = lay_out(text(3))
    changed = layout.field("frame", torch.tensor([[4, 5, 6]]))
    assert column(changed, "frame") == [4, 5, 6]
    assert column(layout, "frame") == [-1, -1, -1]
    assert torch.equal(changed.field("frame", layout.frame).data, layout.data)
    assert changed.data.dtype == torch.int32


def test_a_slice_keeps_the_places_in_the_whole_sequence() -> None:
    layout = lay_out(text(2), image(2), text(3))
    part = layout[2:5]
    assert len(part) == 3
    assert column(part, "index") == [2, 3, 4]
    assert column(part, "modality") == [IMAGE, IMAGE, TEXT]
    assert column(layout[-1:], "index") == [6]


def test_masks_of_tokens() -> None:
    layout = batch([lay_out(text(1), image(1), video(1, 1), Span(Modality.AUDIO)), lay_out(text(2))])
    assert layout.valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert layout.visual.tolist() == [[False, True, True, False], [False] * 4]
    assert layout.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert layout.attention_mask.dtype == torch.int64


def test_runs_number_contiguous_tokens_alike() -> None:
    layout = pack([lay_out(text(2), video(2, 2)), lay_out(text(1))])
    assert layout.runs("sample").tolist() == [[0, 0, 0, 0, 0, 0, 1]]
    assert layout.runs("segment").tolist() == [[0, 0, 1, 1, 1, 1, 2]]
    assert layout.runs("segment", "frame").tolist() == [[0, 0, 1, 1, 2, 2, 3]]
    assert layout.runs("role").tolist() == [[0] * 7]


def test_repr_counts_the_runs_of_each_row() -> None:
    layout = batch([lay_out(text(2), image(2, 2), text(1, ANSWER)), lay_out(video(3, 1))], "left")
    expected = "TokenLayout(batch=2, tokens=7: text x2 | image x4 | text x1; padding x4 | video x3)"
    assert repr(layout) == expected
    assert repr(lay_out()) == "TokenLayout(batch=1, tokens=0: )"


def test_a_layout_moves_and_copies_whole() -> None:
    layout = lay_out(text(1), image(2))
    assert layout.to("meta").data.is_meta
    assert torch.equal(layout.to("cpu").data, layout.data)
    twin = copy.deepcopy(layout)
    twin.data.zero_()
    assert column(layout, "modality") == [TEXT, IMAGE, IMAGE]


# Batches and packs.


def test_padding_goes_to_the_side_that_was_asked_for() -> None:
    rows = [lay_out(text(1), image(2)), lay_out(text(5))]
    right, left = batch(rows), batch(rows, "left")
    assert right.sample.tolist() == [[0, 0, 0, -1, -1], [0] * 5]
    assert left.sample.tolist() == [[-1, -1, 0, 0, 0], [0] * 5]
    assert right.index.tolist() == left.index.tolist() == [[0, 1, 2, 3, 4]] * 2
    padding = right.data[0, 3:, 1:]
    assert bool((padding == -1).all())
    assert torch.equal(left.data[0, 2:, 1:], rows[0].data[0, :, 1:])
    assert torch.equal(right.data[0, :3, 1:], rows[0].data[0, :, 1:])


def test_a_batch_needs_rows_and_a_known_side() -> None:
    with pytest.raises(InputError, match="at least one"):
        batch([])
    with pytest.raises(InputError, match="'left' or 'right', got 'middle'"):
        batch([lay_out(text(1))], "middle")


def test_batches_can_be_batched() -> None:
    inner = batch([lay_out(text(1)), lay_out(text(2))])
    assert batch([inner, lay_out(text(3))]).sample.tolist() == [[0, -1, -1], [0, 0, -1], [0, 0, 0]]


def test_packing_numbers_the_samples_and_the_places_anew() -> None:
    layout = pack([lay_out(text(2)), lay_out(image(1), text(1)), lay_out(text(1))])
    assert column(layout, "sample") == [0, 0, 1, 1, 2]
    assert column(layout, "index") == [0, 1, 2, 3, 4]
    assert column(layout, "segment") == [0, 0, 0, 1, 0]


def test_packs_can_be_packed_and_padding_stays_padding() -> None:
    padded = lay_out(text(1)).padded_to(2)
    layout = pack([pack([lay_out(text(1)), lay_out(text(1))]), padded, lay_out(), lay_out(text(1))])
    assert column(layout, "sample") == [0, 1, 2, -1, 3]
    assert column(layout, "index") == [0, 1, 2, 3, 4]


def test_padding_to_the_slots_of_a_cache() -> None:
    layout = lay_out(text(2)).padded_to(4)
    assert column(layout, "sample") == [0, 0, -1, -1]
    assert column(layout, "index") == [0, 1, 2, 3]
    assert torch.equal(layout.padded_to(4).data, layout.data)
    with pytest.raises(InputError, match="Cannot pad 4 tokens to 3"):
        layout.padded_to(3)


# Splicing.

USER, ASSISTANT, PLACE = 90, 91, 92


def spliced(ids: list[int], media: list[Span]) -> tuple[list[int], TokenLayout]:
    return splice(ids, media, place_id=PLACE, answer_marker=ASSISTANT, turn_marker=USER)


def test_a_place_becomes_the_tokens_of_its_medium() -> None:
    ids, layout = spliced([USER, PLACE, 1, 2, ASSISTANT, 3], [image(2, 2)])
    assert ids == [USER] + [PLACE] * 4 + [1, 2, ASSISTANT, 3]
    assert column(layout, "modality") == [TEXT] + [IMAGE] * 4 + [TEXT] * 4
    assert column(layout, "row") == [-1, 0, 0, 1, 1, -1, -1, -1, -1]
    assert column(layout, "segment") == [0] + [1] * 4 + [2] * 3 + [3]
    assert column(layout, "index") == list(range(9))


def test_the_answer_begins_after_its_marker_and_ends_before_the_next_turn() -> None:
    ids, layout = spliced([USER, 1, ASSISTANT, 2, 3, USER, 4, ASSISTANT, 5], [])
    assert ids == [USER, 1, ASSISTANT, 2, 3, USER, 4, ASSISTANT, 5]
    assert column(layout, "role") == [PROMPT] * 3 + [ANSWER] * 2 + [PROMPT] * 3 + [ANSWER]
    assert column(layout, "turn") == [0] * 5 + [1] * 4
    assert column(layout, "segment") == [0] * 3 + [1] * 2 + [2] * 3 + [3]


def test_a_prompt_ends_with_its_marker() -> None:
    _, layout = spliced([USER, 1, ASSISTANT], [])
    assert column(layout, "role") == [PROMPT] * 3


def test_a_second_marker_inside_an_answer_is_answer() -> None:
    _, layout = spliced([1, ASSISTANT, 2, ASSISTANT, 3], [])
    assert column(layout, "role") == [PROMPT, PROMPT, ANSWER, ANSWER, ANSWER]
    assert column(layout, "turn") == [0] * 5


def test_the_turn_marker_that_opens_the_first_turn_counts_no_turn() -> None:
    _, layout = spliced([USER, USER, 1, ASSISTANT, 2], [])
    assert column(layout, "turn") == [0] * 5


def test_after_an_empty_answer_the_next_prompt_is_a_turn_of_its_own() -> None:
    _, layout = spliced([USER, ASSISTANT, USER, 1, ASSISTANT], [])
    assert column(layout, "role") == [PROMPT] * 5
    assert column(layout, "turn") == column(layout, "segment") == [0, 0, 1, 1, 1]


def test_a_caption_without_a_marker_is_all_answer() -> None:
    _, layout = spliced([PLACE, 1, USER, 2], [image(2)])
    assert column(layout, "role")[2:] == [ANSWER] * 3
    assert column(layout, "turn") == [0] * 5
    _, layout = splice([1, 2], [], place_id=PLACE)
    assert column(layout, "role") == [ANSWER] * 2


def test_without_a_turn_marker_everything_after_the_first_answer_marker_is_answer() -> None:
    _, layout = splice([1, ASSISTANT, 2, USER, 3, ASSISTANT, 4], [], place_id=PLACE, answer_marker=ASSISTANT)
    assert column(layout, "role") == [PROMPT] * 2 + [ANSWER] * 5


def test_several_media_keep_their_order_and_are_segments_of_their_own() -> None:
    ids, layout = spliced([PLACE, PLACE, 1, PLACE, ASSISTANT], [image(1, 2), video(2, 1), image(3)])
    assert ids == [PLACE] * 4 + [1] + [PLACE] * 3 + [ASSISTANT]
    assert column(layout, "segment") == [0, 0, 1, 1, 2, 3, 3, 3, 4]
    assert column(layout, "modality") == [IMAGE] * 2 + [VIDEO] * 2 + [TEXT] + [IMAGE] * 3 + [TEXT]
    assert column(layout, "frame") == [0, 0, 0, 1, -1, 0, 0, 0, -1]


def test_media_are_prompt_even_inside_an_answer() -> None:
    _, layout = spliced([1, ASSISTANT, 2, PLACE, 3], [image(1)])
    assert column(layout, "role") == [PROMPT, PROMPT, ANSWER, PROMPT, ANSWER]


def test_media_belong_to_the_turn_that_they_stand_in() -> None:
    _, layout = spliced([USER, PLACE, ASSISTANT, 1, USER, PLACE, 2, ASSISTANT, 3], [image(1), image(1)])
    assert column(layout, "turn") == [0] * 4 + [1] * 5


@pytest.mark.parametrize(("places", "media"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_more_places_than_media_or_fewer_is_an_error(places: int, media: int) -> None:
    with pytest.raises(InputError, match=rf"{places} media places \(token id 92\), but {media} media"):
        spliced([1, *[PLACE] * places], [image(1)] * media)


def test_media_may_come_from_any_iterable() -> None:
    ids, _ = splice([PLACE, 1], (image(side) for side in [3]), place_id=PLACE)
    assert ids == [PLACE] * 3 + [1]


# Generated text.


def test_generated_text_prolongs_the_answer() -> None:
    layout = lay_out(text(2), image(1, 2), text(1, ANSWER, turn=2)).with_answer(2)
    assert column(layout, "index") == list(range(7))
    assert column(layout, "modality") == [TEXT] * 2 + [IMAGE] * 2 + [TEXT] * 3
    assert column(layout, "role")[-2:] == [ANSWER] * 2
    assert column(layout, "segment") == [0, 0, 1, 1, 2, 2, 2]
    assert column(layout, "turn")[-2:] == [2, 2]


@pytest.mark.parametrize(
    "last",
    [text(2), image(2, 2), video(2, 1), Span(IMAGE, role=ANSWER)],
    ids=["prompt", "image", "video", "image in an answer"],
)
def test_generated_text_is_a_new_segment_after_anything_else(last: Span) -> None:
    layout = lay_out(text(1, ANSWER), last).with_answer()
    new = tokens(layout)[0][-1]
    assert (new.modality, new.role, new.segment, new.sample) == (TEXT, ANSWER, 2, 0)
    assert (new.frame, new.row, new.column) == (-1, -1, -1)


def test_generated_text_equals_the_text_that_was_laid_out() -> None:
    whole = lay_out(text(2), image(2, 2), text(2), text(3, ANSWER))
    assert torch.equal(whole[:8].with_answer(3).data, whole.data)
    assert torch.equal(whole[:9].with_answer(1).with_answer(1).data, whole.data)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generated_text_continues_the_last_valid_token_of_each_row(side: str) -> None:
    layout = batch([lay_out(text(1), text(1, ANSWER, turn=1)), lay_out(text(4))], side).with_answer(2)
    new = layout[-2:]
    assert layout.shape[1] == 6
    assert new.index.tolist() == [[4, 5]] * 2
    assert new.sample.tolist() == [[0, 0]] * 2
    assert new.segment.tolist() == [[1, 1]] * 2
    assert new.turn.tolist() == [[1, 1], [0, 0]]


def test_in_a_packed_row_the_last_sample_goes_on() -> None:
    layout = batch([pack([lay_out(text(2)), lay_out(text(1))]), lay_out(text(5))], "left").with_answer()
    assert layout.sample.tolist() == [[-1, -1, 0, 0, 1, 1], [0] * 6]


def test_a_slice_goes_on_where_it_ends() -> None:
    assert column(lay_out(text(5))[2:4].with_answer(2), "index") == [2, 3, 4, 5]


@given(MIXED)
def test_generating_many_tokens_is_generating_one_many_times(layout: TokenLayout) -> None:
    assert torch.equal(layout.with_answer(3).data, layout.with_answer().with_answer().with_answer().data)
    assert torch.equal(layout.with_answer(3).data[:, : len(layout)], layout.data)


@given(packs(SHORT))
def test_padding_keeps_a_row_as_it_is(layout: TokenLayout) -> None:
    longer = layout.padded_to(len(layout) + 3)
    assert torch.equal(longer.data[:, : len(layout)], layout.data)
    assert not longer.valid[:, len(layout) :].any()
