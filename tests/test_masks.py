"""Every rule against its definition, pair by pair, and what all rules have in common.

The references read the layout as plain integers and follow the papers' definitions; they share nothing with the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    MIXED,
    SHORT,
    Token,
    batches,
    clean_and_noisy,
    clips,
    dialogues,
    media,
    packs,
    projections,
    scales,
    tokens,
)
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from mmzoo import masks
from mmzoo.attention import allowed, compact, prefill_cuts
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import Modality, Role, Span, TokenLayout, batch, image, lay_out, pack, text, video
from mmzoo.masks import RULES, Rule
from mmzoo.masks.ccam import query_layout
from mmzoo.masks.rule import Class, Value, after, always, everything, index, itself, not_after, same, see
from mmzoo.masks.rule import text as text_class
from mmzoo.positions import concentric_position

Reference = Callable[[Token, Token, list[Token], list[Token]], bool]
"""Whether the query sees the key; then the queries and the keys of their sample."""
Pair = tuple[TokenLayout, TokenLayout]
"""Queries and keys. In self-attention both are one object."""


def is_visual(token: Token) -> bool:
    return token.modality in (Modality.IMAGE, Modality.VIDEO)


def is_text(token: Token) -> bool:
    return token.modality == Modality.TEXT


def causal(q: Token, k: Token, *_: list[Token]) -> bool:
    return k.place <= q.place


def bidirectional(*_: Any) -> bool:
    return True


def prefix(q: Token, k: Token, *_: list[Token]) -> bool:
    return k.place <= q.place or (q.role == k.role == Role.PROMPT and q.turn == k.turn)


def sliding_window(window: int) -> Reference:
    return lambda q, k, *_: 0 <= q.place - k.place < window


def modality_mutual(q: Token, k: Token, _: list[Token], keys: list[Token]) -> bool:
    """specs/aki.md: j <= i, or i is visual and j is text up to the first assistant marker, which ends the prompt."""
    answers = [token.place for token in keys if is_text(token) and token.role == Role.ANSWER]
    question = is_text(k) and (not answers or k.place < answers[0])
    return k.place <= q.place or (is_visual(q) and question)


def same_picture(q: Token, k: Token) -> bool:
    return is_visual(q) and is_visual(k) and (q.segment, q.frame) == (k.segment, k.frame)


def ring(token: Token, sample: list[Token]) -> int:
    """specs/cca-llava.md: min(i, j, h-1-i, w-1-j)."""
    picture = [other for other in sample if same_picture(token, other)]
    height, width = (1 + max(getattr(other, axis) for other in picture) for axis in ("row", "column"))
    return min(token.row, token.column, height - 1 - token.row, width - 1 - token.column)


def concentric_causal(q: Token, k: Token, sample: list[Token], _: list[Token]) -> bool:
    """specs/cca-llava.md: inside one image ring(k) <= ring(q), elsewhere k <= q in sequence order."""
    return ring(k, sample) <= ring(q, sample) if same_picture(q, k) else k.place <= q.place


def frame_block_causal(q: Token, k: Token, *_: list[Token]) -> bool:
    return k.place <= q.place or same_picture(q, k)


def full_visual(q: Token, k: Token, *_: list[Token]) -> bool:
    return k.place <= q.place or (is_visual(q) and is_visual(k) and q.segment == k.segment)


def ccam(rounding: str) -> Reference:
    """specs/video-ccam.md: query i of N sees frame f of T."""

    def reference(q: Token, k: Token, queries: list[Token], keys: list[Token]) -> bool:
        n, t = len(queries), len({key.frame for key in keys})
        i = q.place - queries[0].place
        if rounding == "ceil":
            return k.frame * n < (i + 1) * t
        return k.frame * n <= i * t if rounding == "floor" else k.frame <= min(i // max(n // t, 1), t - 1)

    return reference


def image_branch(q: Token, k: Token, *_: list[Token]) -> bool:
    """specs/visualchat.md, prefill: image keys for text, only itself for an image token."""
    return k.place == q.place if is_visual(q) else is_visual(k) and k.place <= q.place


def text_branch(q: Token, k: Token, *_: list[Token]) -> bool:
    return is_text(k) and k.place <= q.place


def causal_temporal(q: Token, k: Token, *_: list[Token]) -> bool:
    return k.frame <= q.frame


def causal_qformer(direction: str) -> Reference:
    """specs/favor.md: floor(j/32) >= floor(i/32) as coded, <= as written in the paper."""
    return lambda q, k, *_: k.frame >= q.frame if direction == "future" else k.frame <= q.frame


def block_of(frame: int, size: int, first_frame_alone: bool = False) -> range:
    """The frames of the frame's block, as if the clip went on."""
    start, stop = 0, 1 if first_frame_alone else size
    while frame >= stop:
        start, stop = stop, stop + size
    return range(start, stop)


def block_causal(size: int = 1, window: int | None = None, first_frame_alone: bool = False) -> Reference:
    """specs/longlive.md: f_k < e(q) and (no W or f_k >= e(q) - W), plus the diagonal."""

    def reference(q: Token, k: Token, *_: list[Token]) -> bool:
        end = block_of(q.frame, size, first_frame_alone).stop
        near = window is None or k.frame >= end - window
        return k.place == q.place or (k.frame < end and near)

    return reference


def sink_window(window: int, sink: int, size: int = 1) -> Reference:
    """specs/longlive.md: f < e and (f < S or f >= e - (W - S))."""

    def reference(q: Token, k: Token, *_: list[Token]) -> bool:
        end = block_of(q.frame, size).stop
        return k.frame < end and (k.frame < sink or k.frame >= end - (window - sink))

    return reference


def teacher_forcing(size: int = 1) -> Reference:
    """specs/longlive.md: clean to clean up to the own block, noisy to clean before it, noisy to noisy inside it."""

    def reference(q: Token, k: Token, *_: list[Token]) -> bool:
        mine, other = block_of(q.frame, size).start, block_of(k.frame, size).start
        if k.role == Role.PROMPT:
            return other <= mine if q.role == Role.PROMPT else other < mine
        return q.role == Role.ANSWER and other == mine

    return reference


def scale_causal(q: Token, k: Token, *_: list[Token]) -> bool:
    """specs/generation-notes.md: scale(k) <= scale(q); the n-th segment is the n-th scale."""
    return k.segment <= q.segment


def with_itself(samples: st.SearchStrategy[TokenLayout]) -> st.SearchStrategy[Pair]:
    return samples.map(lambda layout: (layout, layout))


TEXT_AND_MEDIA = with_itself(SHORT)


@dataclass(frozen=True)
class Case:
    """A rule with its options, single samples that it is made for, and one reference for each of its softmaxes."""

    name: str
    references: tuple[Reference, ...]
    samples: st.SearchStrategy[Pair] = TEXT_AND_MEDIA
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name

    @property
    def rules(self) -> tuple[Rule, ...]:
        made = masks.rule(self.name, **self.options)
        return made if isinstance(made, tuple) else (made,)


LATENT, CLEAN_AND_NOISY = with_itself(clips()), with_itself(clean_and_noisy())
BLOCKS = [
    {},
    {"frames_per_block": 3},
    {"frames_per_block": 3, "window": 3},
    {"frames_per_block": 2, "window": 5},
    {"frames_per_block": 2, "first_frame_alone": True},
    {"frames_per_block": 3, "window": 4, "first_frame_alone": True},
    {"window": 2},
]
SINKS = [(4, 1, 1), (6, 3, 3), (5, 2, 2), (7, 1, 3), (3, 0, 2)]
CASES = [
    Case("causal", (causal,)),
    Case("bidirectional", (bidirectional,)),
    Case("prefix", (prefix,)),
    *(Case("sliding-window", (sliding_window(n),), options={"window": n}, label=str(n)) for n in (1, 4)),
    Case("modality-mutual", (modality_mutual,)),
    Case("concentric-causal", (concentric_causal,), with_itself(dialogues(max_tokens=20))),
    Case("frame-block-causal", (frame_block_causal,)),
    Case("full-visual", (full_visual,)),
    *(Case("ccam", (ccam(name),), projections(name), label=name) for name in ("ceil", "floor", "block")),
    *(
        Case("mmca", (image_branch, text_branch), options={"empty": empty}, label=empty)
        for empty in ("zero", "uniform")
    ),
    *(
        Case("causal-qformer", (causal_qformer(side),), LATENT, {"direction": side}, side)
        for side in ("future", "past")
    ),
    Case("causal-temporal", (causal_temporal,), LATENT),
    *(
        Case(
            "block-causal",
            (block_causal(options.get("frames_per_block", 1), options.get("window"), "first_frame_alone" in options),),
            LATENT,
            options,
            ",".join(map(str, options.values())),
        )
        for options in BLOCKS
    ),
    *(
        Case(
            "sink-window",
            (sink_window(*sizes),),
            LATENT,
            dict(zip(("window", "sink_frames", "frames_per_block"), sizes, strict=True)),
            ",".join(map(str, sizes)),
        )
        for sizes in SINKS
    ),
    *(
        Case("teacher-forcing", (teacher_forcing(n),), CLEAN_AND_NOISY, {"frames_per_block": n}, str(n))
        for n in (1, 2, 3)
    ),
    Case("scale-causal", (scale_causal,), with_itself(scales())),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_self_attention_case = pytest.mark.parametrize("case", [case for case in CASES if case.name != "ccam"], ids=str)


def packed(pairs: list[Pair]) -> Pair:
    queries = pack([queries for queries, _ in pairs])
    return queries, queries if pairs[0][0] is pairs[0][1] else pack([keys for _, keys in pairs])


def batched(pairs: list[Pair], side: str) -> Pair:
    queries = batch([queries for queries, _ in pairs], side)
    return queries, queries if pairs[0][0] is pairs[0][1] else batch([keys for _, keys in pairs], side)


def mixed(samples: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    """Padded batches of packed rows."""
    rows = st.lists(samples, min_size=1, max_size=2).map(packed)
    return st.builds(batched, st.lists(rows, min_size=1, max_size=2), st.sampled_from(["left", "right"]))


def expected(reference: Reference, queries: TokenLayout, keys: TokenLayout) -> Tensor:
    """bool [B, Q, K] by asking the reference about every pair of one sample."""
    answer = torch.zeros(queries.shape[0], len(queries), len(keys), dtype=torch.bool)
    for b, (row_queries, row_keys) in enumerate(zip(tokens(queries), tokens(keys), strict=True)):
        for sample in {token.sample for token in row_queries} - {-1}:
            mine = [token for token in row_queries if token.sample == sample]
            theirs = [token for token in row_keys if token.sample == sample]
            for q in mine:
                for k in theirs:
                    answer[b, q.place, k.place] = reference(q, k, mine, theirs)
    return answer


def self_attention_rules() -> list[Rule]:
    """The rules for text and media, pairs as two."""
    return [rule for case in CASES if case.samples is TEXT_AND_MEDIA for rule in case.rules]


def test_every_registered_rule_has_a_reference() -> None:
    assert {case.name for case in CASES} == set(RULES)


@every_case
@given(st.data())
def test_rule_equals_its_definition(case: Case, data: st.DataObject) -> None:
    queries, keys = data.draw(mixed(case.samples))
    for rule, reference in zip(case.rules, case.references, strict=True):
        assert torch.equal(allowed(rule, queries, keys), expected(reference, queries, keys)), rule


@every_case
@given(st.data())
@settings(max_examples=10)
def test_samples_never_meet_and_padding_is_never_seen(case: Case, data: st.DataObject) -> None:
    queries, keys = data.draw(mixed(case.samples))
    for rule in case.rules:
        mask = allowed(rule, queries, keys)
        assert not mask[queries.sample[:, :, None] != keys.sample[:, None]].any()
        assert not mask[(keys.sample == -1)[:, None].expand_as(mask)].any()


def test_padding_is_never_seen_even_by_a_class_that_takes_it_in() -> None:
    every_slot = Class("every slot", lambda x: torch.ones_like(x.valid))
    layout = batch([lay_out(text(1)), lay_out(text(3))], "left")
    terms = Rule("terms", (see(every_slot, every_slot, always),))
    function = Rule("function", function=lambda q, k: torch.ones(1, len(q), len(k), dtype=torch.bool))
    for mask in (allowed(terms, layout), allowed(function, layout)):
        assert mask[0].nonzero().tolist() == [[2, 2]]
        assert mask[1].all()
    by_pairs = create_mask(compact(terms, layout).mask_mod(), 2, None, 3, 3, device="cpu")
    assert torch.equal(by_pairs[:, 0], allowed(terms, layout))


@every_case
@given(st.data())
@settings(max_examples=10)
def test_packing_equals_separate_samples(case: Case, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(case.samples, min_size=2, max_size=3))
    for rule in case.rules:
        alone = [allowed(rule, *pair)[0] for pair in pairs]
        assert torch.equal(allowed(rule, *packed(pairs))[0], torch.block_diag(*alone).bool())


@every_case
@given(st.data())
@settings(max_examples=10)
def test_padding_on_either_side_leaves_each_sample_as_it_is_alone(case: Case, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(case.samples, min_size=2, max_size=3))
    for rule in case.rules:
        left, right = (allowed(rule, *batched(pairs, side)) for side in ("left", "right"))
        for b, (queries, keys) in enumerate(pairs):
            alone = allowed(rule, queries, keys)[0]
            assert torch.equal(right[b, : len(queries), : len(keys)], alone)
            assert torch.equal(left[b, -len(queries) :, -len(keys) :], alone)
            assert right[b].sum() == left[b].sum() == alone.sum()


@every_case
@given(st.data())
@settings(max_examples=5)
def test_compact_arrays_read_pair_by_pair_give_the_dense_mask(case: Case, data: st.DataObject) -> None:
    queries, keys = data.draw(mixed(case.samples))
    for rule in case.rules:
        arrays = compact(rule, queries, keys)
        by_pairs = create_mask(arrays.mask_mod(), queries.shape[0], None, len(queries), len(keys), device="cpu")
        assert torch.equal(by_pairs[:, 0], arrays.dense())


@every_case
@given(st.data())
@settings(max_examples=10)
def test_a_chunk_of_queries_is_a_slice_of_the_mask(case: Case, data: st.DataObject) -> None:
    queries, keys = data.draw(mixed(case.samples))
    first = data.draw(st.integers(0, len(queries)))
    rows = slice(first, data.draw(st.integers(first, len(queries))))
    for rule in case.rules:
        assert torch.equal(allowed(rule, queries, keys, rows=rows), allowed(rule, queries, keys)[:, rows])
        assert torch.equal(compact(rule, queries, keys).rows(rows).dense(), allowed(rule, queries, keys)[:, rows])


def cuts_by_definition(mask: Tensor) -> list[int]:
    return [c for c in range(1, mask.shape[-1]) if not mask[:, :c, c:].any()]


@every_self_attention_case
@given(st.data())
@settings(max_examples=10)
def test_a_prefill_may_be_cut_where_no_earlier_token_sees_a_later_one(case: Case, data: st.DataObject) -> None:
    layout, _ = data.draw(mixed(case.samples))
    for rule in case.rules:
        seen = allowed(rule, layout)
        if rule.fallback is not None:  # what a query without an open key takes its mean over is read too
            seen = seen | (allowed(rule.fallback, layout) & ~seen.any(-1, keepdim=True))
        assert prefill_cuts(rule, layout) == cuts_by_definition(seen)


def test_prefill_cuts_keep_frames_and_the_question_whole() -> None:
    layout = lay_out(text(2), video(2, 3), text(2), text(1, Role.ANSWER))
    assert prefill_cuts(masks.causal(), layout) == list(range(1, 11))
    assert prefill_cuts(masks.frame_block_causal(), layout) == [1, 2, 5, 8, 9, 10]
    assert prefill_cuts(masks.modality_mutual(), layout) == [1, 2, 10]
    assert prefill_cuts(masks.bidirectional(), layout) == []


# Rules that the papers state for several images, spelled out where a formula could be read in two ways.


def test_images_see_the_question_but_never_the_answer() -> None:
    layout = lay_out(image(2), text(2), text(2, Role.ANSWER), text(1, turn=1))
    seen = allowed(masks.modality_mutual(), layout)[0]
    assert seen[:2, 2:4].all()
    assert not seen[:2, 4:].any()


def test_a_caption_is_plain_causal_under_modality_mutual() -> None:
    layout = lay_out(image(2, 2), text(5, Role.ANSWER))
    assert torch.equal(allowed(masks.modality_mutual(), layout), allowed(masks.causal(), layout))


@pytest.mark.parametrize("rounding", ["ceil", "floor", "block"])
@given(frames=st.integers(1, 6), queries_per_frame=st.integers(1, 4))
def test_roundings_agree_when_frames_divide_queries(rounding: str, frames: int, queries_per_frame: int) -> None:
    queries = query_layout(frames * queries_per_frame, frames, rounding)
    steps = torch.arange(frames).repeat_interleave(queries_per_frame)
    assert torch.equal(queries.frame[0].long(), steps)


@pytest.mark.parametrize("rounding", ["ceil", "floor", "block"])
@given(frames=st.integers(1, 9), num_queries=st.integers(1, 9))
def test_a_query_carries_the_last_frame_that_it_sees(rounding: str, frames: int, num_queries: int) -> None:
    queries = query_layout(num_queries, frames, rounding)
    seen = allowed(masks.causal_cross_attention(), queries, lay_out(video(frames, 1)))[0]
    assert queries.frame[0].tolist() == (seen.sum(-1) - 1).tolist()
    assert (queries.modality == Modality.QUERY).all()


def test_ccam_rejects_what_has_no_meaning() -> None:
    with pytest.raises(InputError, match="'round'.*ceil, floor, block"):
        query_layout(4, 2, "round")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 and 2"):
        query_layout(0, 2)
    with pytest.raises(InputError, match="4 and 0"):
        query_layout(4, 0)


@given(mixed(TEXT_AND_MEDIA))
def test_the_uniform_fallback_of_mmca_is_causal_xor_the_branch(pair: Pair) -> None:
    """specs/visualchat.md: without an open key, the mean goes over [branch closed] + [k > q] == 1."""
    layout, _ = pair

    def closed_once(key_class: Callable[[Token], bool]) -> Reference:
        return lambda q, k, *_: (not key_class(k)) != (k.place > q.place)

    for rule, key_class in zip(masks.multimodal_causal("uniform"), (is_visual, is_text), strict=True):
        assert rule.empty == "uniform"
        assert rule.fallback is not None
        empty = layout.valid & ~allowed(rule, layout).any(-1)
        fallback = expected(closed_once(key_class), layout, layout)
        assert torch.equal(allowed(rule.fallback, layout)[empty], fallback[empty])


def test_mmca_is_zero_by_default() -> None:
    assert all(rule.empty == "zero" and rule.fallback is None for rule in masks.multimodal_causal())


# Rules in general.


@given(MIXED, st.sampled_from(self_attention_rules()), st.sampled_from(self_attention_rules()))
def test_composition_is_the_union(layout: TokenLayout, one: Rule, other: Rule) -> None:
    if one.fallback or other.fallback:
        with pytest.raises(InputError, match="cannot be composed"):
            one | other
        return
    assert torch.equal(allowed(one | other, layout), allowed(one, layout) | allowed(other, layout))
    assert (one | other).name == f"{one.name} | {other.name}"


@every_case
def test_a_rule_reads_as_its_terms(case: Case) -> None:
    for rule in case.rules:
        lines = repr(rule).splitlines()
        assert rule.name in lines[0]
        assert lines[1 : 1 + len(rule.terms)] == [f"  {term}" for term in rule.terms]
        assert len(set(lines)) == len(lines)


def test_a_rule_is_readable() -> None:
    assert repr(masks.modality_mutual()) == (
        "Rule 'modality-mutual': a query sees a key of its sample when\n"
        "  everything -> everything: key index <= query index\n"
        "  visual -> text up to the first answer: always"
    )
    assert repr(masks.sink_window(6, 2, 3)) == (
        "Rule 'sink-window': a query sees a key of its sample when\n"
        "  everything -> first 2 frames: key frame <= query last frame of the block of 3\n"
        "  everything -> everything: key frame <= query last frame of the block of 3, less than 4 apart\n"
        "  everything -> everything: key block of 3 = query block of 3"
    )
    assert "takes the mean over 'mmca-image-fallback'" in repr(masks.multimodal_causal("uniform")[0])


def same_parity(queries: TokenLayout, keys: TokenLayout) -> Tensor:
    return (queries.index[:, :, None] - keys.index[:, None]) % 2 == 0


def test_a_function_is_a_rule_on_its_own_and_beside_terms() -> None:
    layout = batch([pack([lay_out(text(3)), lay_out(image(2))]), lay_out(text(4))])
    parity, window = Rule("parity", function=same_parity), masks.sliding_window(2)
    one_sample = (layout.sample[:, :, None] == layout.sample[:, None]) & layout.valid[:, None]
    said = same_parity(layout, layout) & one_sample
    assert torch.equal(allowed(parity, layout), said)
    assert torch.equal(allowed(parity, layout, rows=slice(2, 4)), said[:, 2:4])
    assert torch.equal(allowed(window | parity, layout), said | allowed(window, layout))
    assert torch.equal(allowed(parity | window, layout), said | allowed(window, layout))
    later = Rule("later", function=lambda q, k: q.index[:, :, None] < k.index[:, None])
    assert torch.equal(allowed(parity | later, layout), said | allowed(later, layout))
    assert "same_parity" in repr(parity)


def test_a_function_reads_the_whole_layout_even_for_a_chunk_of_queries() -> None:
    def nearer_the_centre(queries: TokenLayout, keys: TokenLayout) -> Tensor:
        return concentric_position(keys)[:, None] <= concentric_position(queries)[:, :, None]

    layout, rule = lay_out(text(1), image(3, 3), text(2)), Rule("rings", function=nearer_the_centre)
    assert torch.equal(allowed(rule, layout), allowed(masks.concentric_causal(), layout))
    assert torch.equal(allowed(rule, layout, rows=slice(4, 8)), allowed(rule, layout)[:, 4:8])


@pytest.mark.parametrize("terms", [(), masks.causal().terms], ids=["alone", "beside-terms"])
def test_compact_arrays_refuse_a_function(terms: tuple) -> None:
    with pytest.raises(UnsupportedMask, match="'parity'.*function"):
        compact(Rule("parity", terms, function=same_parity), lay_out(text(2)))


def test_a_rule_that_says_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="opens nothing"):
        Rule("empty")
    with pytest.raises(InputError, match="fallback"):
        Rule("half", masks.causal().terms, empty="uniform")
    with pytest.raises(InputError, match="fallback"):
        Rule("half", masks.causal().terms, fallback=masks.causal())
    with pytest.raises(InputError, match="at least 1, got 0"):
        masks.sliding_window(0)


def test_an_unknown_rule_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="'casual'.*causal, bidirectional"):
        masks.rule("casual")
    assert masks.rule("sliding-window", window=3) == masks.sliding_window(3)


def test_terms_combine_classes_and_relations() -> None:
    layout = lay_out(image(2), text(2), image(1))
    odd = Class("odd", lambda x: x.index % 2 == 1)
    column = Value("row", lambda x: x.row)
    rule = Rule("made", (see(text_class & odd, everything, always), see(everything, odd & text_class, same(column))))
    seen = [[q, k] for q, k in allowed(rule, layout)[0].nonzero().tolist()]
    assert seen == [[2, 3], [3, 0], [3, 1], [3, 2], [3, 3], [3, 4]]
    assert "text and odd -> everything: always" in repr(rule)


def test_relations_between_values() -> None:
    layout = lay_out(text(4))
    place = torch.arange(4)
    back = place[:, None] - place
    relations = {
        after(): back < 0,
        not_after(): back >= 0,
        not_after(window=2): (back >= 0) & (back < 2),
        itself: back == 0,
        always: back == back,
    }
    for relation, open_pairs in relations.items():
        rule = Rule("made", (see(everything, everything, relation),))
        assert torch.equal(allowed(rule, layout)[0], open_pairs), relation


def test_keys_default_to_the_queries() -> None:
    layout = lay_out(text(2), image(2, 2))
    assert torch.equal(allowed(masks.causal(), layout), allowed(masks.causal(), layout, layout))


def test_a_slice_of_queries_over_cached_keys_knows_where_it_stands() -> None:
    layout = lay_out(text(2), image(2, 2), text(3))
    for rule in (masks.causal(), masks.modality_mutual(), masks.frame_block_causal(), masks.sliding_window(3)):
        assert torch.equal(allowed(rule, layout[5:], layout), allowed(rule, layout)[:, 5:])


# Decoding.


def sees_its_whole_sample(rule: Rule, layout: TokenLayout) -> bool:
    """Whether the token that is generated next sees exactly the valid keys of its sample."""
    longer = layout.with_answer()
    row = allowed(rule, longer)[:, -1]
    return torch.equal(row, (longer.sample == longer.sample[:, -1:]) & longer.valid)


DECODING = [rule for case in CASES for rule in case.rules if rule.decodes_causally]
SLOWLY = [rule for case in CASES for rule in case.rules if not rule.decodes_causally]
PICTURE_AND_TEXT = lay_out(image(2), text(3))
NOT_FULL = {
    "sliding-window(1)": PICTURE_AND_TEXT,
    "sliding-window(4)": PICTURE_AND_TEXT,
    "mmca-image": PICTURE_AND_TEXT,
    "mmca-text": PICTURE_AND_TEXT,
    "causal-temporal": PICTURE_AND_TEXT,
    "ccam": PICTURE_AND_TEXT,
    "block-causal": lay_out(video(9, 1), text(1)),
    "sink-window": lay_out(video(9, 1), text(1)),
    "teacher-forcing": PICTURE_AND_TEXT,
}
NOT_APPLICABLE = {
    "scale-causal": "it generates scales, not text; text after them is one more segment, and sees all earlier ones",
}


IN_CONNECTORS = {"causal-qformer"}
"""Nothing is decoded there."""


def test_the_rules_that_decode_causally_are_known() -> None:
    names = {"causal", "bidirectional", "prefix", "modality-mutual", "concentric-causal"}
    names |= {"frame-block-causal", "full-visual"}
    assert {rule.name for rule in DECODING} == names
    assert {rule.name for rule in SLOWLY} == set(NOT_FULL) | set(NOT_APPLICABLE) | IN_CONNECTORS


@pytest.mark.parametrize("rule", DECODING, ids=lambda rule: rule.name)
@given(layout=batches(dialogues() | packs(SHORT), sides=["left"]))
def test_a_rule_that_decodes_causally_shows_a_new_token_its_whole_sample(rule: Rule, layout: TokenLayout) -> None:
    assert sees_its_whole_sample(rule, layout)


@pytest.mark.parametrize("rule", DECODING, ids=lambda rule: rule.name)
@given(layout=batches(dialogues() | packs(SHORT), sides=["right"]))
def test_a_new_token_after_padding_sees_its_whole_sample(rule: Rule, layout: TokenLayout) -> None:
    assert sees_its_whole_sample(rule, layout)


@pytest.mark.parametrize("rule", [rule for rule in SLOWLY if rule.name in NOT_FULL], ids=lambda rule: rule.name)
def test_a_rule_that_does_not_decode_causally_hides_something(rule: Rule) -> None:
    assert not sees_its_whole_sample(rule, NOT_FULL[rule.name])


@pytest.mark.parametrize("rule", [rule for rule in SLOWLY if rule.name in NOT_APPLICABLE], ids=lambda rule: rule.name)
@given(layout=scales())
def test_a_rule_without_text_might_as_well_decode_causally(rule: Rule, layout: TokenLayout) -> None:
    assert sees_its_whole_sample(rule, layout)


SOMETHING = Class("something", lambda x: x.valid)
SAMPLED = Value("sample", lambda x: x.sample)


@pytest.mark.parametrize(
    ("term", "causally"),
    [
        (see(everything, everything, not_after(index)), True),
        (see(text_class, everything, not_after(index)), True),
        (see(text_class & everything, everything, always), True),
        (see(text_class & SOMETHING, everything, always), False),
        (see(everything, text_class, always), False),
        (see(SOMETHING, everything, always), False),
        (see(everything, everything, not_after(SAMPLED)), False),
        (see(everything, everything, not_after(index, window=99)), False),
        (see(everything, everything, same(index)), False),
        (see(everything, everything, not_after(SAMPLED, index)), False),
        (see(everything, everything, not_after(index, SAMPLED)), False),
    ],
    ids=str,
)
def test_decoding_is_causal_only_where_a_term_says_so_without_a_doubt(term: masks.Term, causally: bool) -> None:
    assert Rule("made", (term,)).decodes_causally is causally
    window = masks.sliding_window(2)
    assert (window | Rule("made", (term,))).decodes_causally is causally


def test_a_function_never_decodes_causally() -> None:
    rule = Rule("all", function=lambda q, k: q.valid[:, :, None] & k.valid[:, None])
    assert not rule.decodes_causally


# The strategies themselves: a reference that meets nothing but text proves nothing.


def test_the_strategies_reach_what_the_rules_differ_in() -> None:
    met: set[str] = set()

    @given(MIXED, media())
    @settings(max_examples=60)
    def look(layout: TokenLayout, span: Span) -> None:
        met.update({f"{span.modality.name}"} if len(span) > 1 else set())
        for row in tokens(layout):
            met.update({"padding" for token in row if token.sample == -1})
            met.update({"packed" for token in row if token.sample > 0})
            met.update({"second turn" for token in row if token.turn > 0})
            met.update({"inner ring" for token in row if min(token.row, token.column) == 1})
            met.update({"second frame" for token in row if token.frame > 0})
            met.update({"answer then picture" for a, b in zip(row, row[1:]) if a.role == 1 and is_visual(b)})

    look()
    expected_to_meet = {"IMAGE", "VIDEO", "padding", "packed", "second turn", "inner ring", "second frame"}
    assert met >= expected_to_meet | {"answer then picture"}
