"""Tiles and block masks: nothing open is skipped, nothing closed is called full, and FlexAttention agrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import MIXED, Samples, clean_and_noisy, clips, projections, scales
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from mmzoo import masks
from mmzoo.attention import allowed, attend, backends, compact
from mmzoo.attention import transformers as plug
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import Role, TokenLayout, batch, image, lay_out, pack, text, video
from mmzoo.masks import Rule
from mmzoo_kernels.masks import CompactMask

RULES: dict[str, tuple[Rule, Samples]] = {
    **{rule.name: (rule, MIXED) for rule in (
        masks.causal(), masks.bidirectional(), masks.prefix(), masks.sliding_window(5), masks.modality_mutual(),
        masks.concentric_causal(), masks.frame_block_causal(), masks.full_visual(), *masks.multimodal_causal(),
    )},
    **{rule.name: (rule, clips()) for rule in (
        masks.causal_temporal(), masks.block_causal(3, window=4), masks.sink_window(5, 2, 2),
    )},
    "teacher-forcing": (masks.teacher_forcing(2), clean_and_noisy()),
    "scale-causal": (masks.scale_causal(), scales()),
}  # fmt: skip
every_rule = pytest.mark.parametrize("name", RULES)


def in_tiles(dense: Tensor, size: int) -> Tensor:
    """bool [B, Q', K', size * size] of a mask whose sides are multiples of size."""
    return dense.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3)


def check(mask: CompactMask, size: int) -> None:
    tiles, pairs = mask.tiles(size), in_tiles(mask.padded(size).dense(), size)
    assert not (pairs.any(-1) & ~tiles.visited).any(), "an open pair is skipped"
    assert not (tiles.full & ~pairs.all(-1)).any(), "a tile with a closed pair is called full"
    assert not (tiles.full & ~tiles.visited).any()


@every_rule
@given(data=st.data(), size=st.sampled_from([2, 3, 4, 8]))
def test_tiles_are_sound(name: str, data: st.DataObject, size: int) -> None:
    rule, samples = RULES[name]
    check(compact(rule, data.draw(samples)), size)


@given(pair=projections("ceil"), size=st.sampled_from([2, 4]))
def test_tiles_of_cross_attention_are_sound(pair: tuple[TokenLayout, TokenLayout], size: int) -> None:
    check(compact(masks.causal_cross_attention(), *pair), size)


ORDINARY = batch(
    [
        pack(
            [
                lay_out(text(30), video(6, 5, 5), text(40), text(20, Role.ANSWER)),
                lay_out(text(50), image(9, 9), text(30)),
            ]
        ),
        lay_out(text(100)),
    ],
    "left",
)


@pytest.mark.parametrize("name", [name for name, (_, samples) in RULES.items() if samples is MIXED])
def test_ordinary_layouts_visit_no_tile_in_vain_and_prove_the_full_ones(name: str) -> None:
    mask = compact(RULES[name][0], ORDINARY)
    tiles, pairs = mask.tiles(16), in_tiles(mask.padded(16).dense(), 16)
    assert torch.equal(tiles.visited, pairs.any(-1))
    assert torch.equal(tiles.full, pairs.all(-1))
    assert tiles.full.any() or name == "sliding-window(5)"


@pytest.mark.parametrize("side", ["query_sample", "key_sample"])
def test_a_tile_with_padding_is_not_full_whatever_its_numbers_say(side: str) -> None:
    mask = compact(masks.bidirectional(), lay_out(text(8)))
    sample = getattr(mask, side).clone()
    sample[0, 2] = -1
    assert mask.tiles(4).full.all()
    assert replace(mask, **{side: sample}).tiles(4).full.sum() == 2


def test_a_block_mask_holds_other_numbers_of_queries_and_keys() -> None:
    mask = compact(masks.causal(), lay_out(text(20))).rows(slice(15, 20))
    assert mask.block_mask(8).shape == (1, 1, 5, 20)


@every_rule
@given(data=st.data())
@settings(max_examples=10)
def test_a_block_mask_holds_what_the_dense_mask_holds(name: str, data: st.DataObject) -> None:
    rule, samples = RULES[name]
    layout = data.draw(samples)
    mask = compact(rule, layout)
    blocks = mask.block_mask(8)
    length = -(-len(layout) // 8) * 8
    rebuilt = torch.zeros(layout.shape[0], length, length, dtype=torch.bool)
    dense = mask.padded(8).dense()
    for count, columns, full in (
        (blocks.kv_num_blocks, blocks.kv_indices, False),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, True),
    ):
        for b in range(layout.shape[0]):
            for q in range(length // 8):
                for k in columns[b, 0, q, : count[b, 0, q]].tolist():
                    tile = (b, slice(8 * q, 8 * q + 8), slice(8 * k, 8 * k + 8))
                    rebuilt[tile] = True if full else dense[tile]
    assert torch.equal(rebuilt, dense)
    by_key = blocks.q_num_blocks.sum() + blocks.full_q_num_blocks.sum()
    assert by_key == blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()


@every_rule
@given(data=st.data(), query_tiles=st.integers(1, 3))
@settings(max_examples=5)
def test_flash_attn_4_is_told_what_the_dense_mask_holds(name: str, data: st.DataObject, query_tiles: int) -> None:
    rule, samples = RULES[name]
    mask = compact(rule, data.draw(samples))
    dense, (by_query, by_key) = mask.padded(8 * query_tiles).dense(), mask.block_sparse(8, query_tiles)
    rows, columns = by_query.block_size
    assert (rows, columns) == (8 * query_tiles, 8)
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[2] % 8)).unflatten(2, (-1, columns))
    pairs = padded.unflatten(1, (-1, rows)).transpose(2, 3)[:, :, : by_query[1].shape[-1]]  # [B, Q', K', rows, columns]
    partial, full = listed(*by_query[:2]), listed(*by_query[2:4])
    assert not (partial & full).any()
    assert not (pairs.flatten(3).any(-1) & ~(partial | full)).any()
    assert not (full & ~pairs.flatten(3).all(-1)).any()
    assert torch.equal(listed(*by_key[:2]), partial.mT)
    assert torch.equal(listed(*by_key[2:4]), full.mT)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [B, Q', K'] of lists with an axis of one head."""
    chosen = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(chosen).scatter(-1, indices.long(), chosen)[:, 0]


def test_tiles_of_queries_taken_together_are_few_and_full_where_both_are() -> None:
    mask = compact(masks.causal(), lay_out(text(64)))
    by_query, _ = mask.block_sparse(16, 2)
    assert by_query.mask_block_cnt.tolist() == [[[2, 2]]]
    assert by_query.full_block_cnt.tolist() == [[[0, 2]]]
    assert by_query.mask_block_idx[0, 0, 1, :2].tolist() == [2, 3]


@every_rule
def test_a_compiled_mask_is_the_same_mask(name: str) -> None:
    rule, samples = RULES[name]
    layout = ORDINARY if samples is MIXED else lay_out(video(9, 3, grid=False))
    torch._dynamo.reset()
    compiled = torch.compile(lambda data: allowed(rule, TokenLayout(data)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(layout.data), allowed(rule, layout))


def test_the_lists_by_key_are_the_lists_by_query_as_kernels_read_them() -> None:
    """Gradients of keys and values are summed over the lists by key; kernels take their memory as it lies."""
    layout = batch([lay_out(text(300), video(5, 9, 9), text(300)), lay_out(text(450))], "left")
    blocks = compact(masks.modality_mutual(), layout).block_mask()
    lists = {
        "partial": [(blocks.kv_num_blocks, blocks.kv_indices), (blocks.q_num_blocks, blocks.q_indices)],
        "full": [
            (blocks.full_kv_num_blocks, blocks.full_kv_indices),
            (blocks.full_q_num_blocks, blocks.full_q_indices),
        ],
    }
    for by_query, by_key in lists.values():
        visited = []
        for counts, indices in (by_query, by_key):
            memory = torch.empty(0, dtype=torch.int32).set_(indices.untyped_storage()).reshape(indices.shape)
            dense = torch.zeros(indices.shape, dtype=torch.bool)
            for where in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
                dense[(*where, memory[(*where, slice(counts[tuple(where)]))].long())] = True
            visited.append(dense)
        assert visited[0].any()
        assert torch.equal(visited[0], visited[1].mT)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention's own reference on a CPU: forward only, and not compiled, since compiled it is wrong there."""
    monkeypatch.setattr(backends, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(backends.Flex, "refuses", lambda self, rule, device, head_dim=None: None)
    yield


@every_rule
def test_flex_attention_agrees_with_eager(name: str, uncompiled: None) -> None:
    rule, samples = RULES[name]
    layout = ORDINARY if samples is MIXED else lay_out(video(9, 3))
    if name == "teacher-forcing":
        clip = lay_out(video(6, 2))
        noisy = clip.field("role", torch.full_like(clip.role, Role.ANSWER))
        layout = TokenLayout(torch.cat([clip.data, noisy.data], 1)).field("index", torch.arange(24)[None])
    rows, length = layout.shape[:2]
    query, key, value = (torch.randn(rows, heads, length, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        flex, eager = (
            attend(query, key, value, rule, layout, attention=attention) for attention in ("flex_attention", "eager")
        )
    torch.testing.assert_close(flex, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["modality-mutual", "frame-block-causal", "sliding-window", "mmca"])
def test_a_language_model_prefills_under_a_block_mask_and_decodes_with_sdpa(rule: str, uncompiled: None) -> None:
    from test_language import GREEDY, a_batch, a_model

    model = a_model(rule=rule)
    ids, layout, _ = a_batch()
    expected, tokens = model(ids, layout).logits, model.generate(ids, layout, **GREEDY)
    model.set_attention("flex_attention")
    with torch.no_grad():
        logits = model(ids, layout).logits
    torch.testing.assert_close(logits[layout.valid], expected[layout.valid], atol=1e-4, rtol=1e-4)
    assert model.generate(ids, layout, **GREEDY).tolist() == tokens.tolist()
    with pytest.raises(UnsupportedMask, match="static or sliding"):
        model.generate(ids, layout, cache_implementation="static", **GREEDY)


def test_sliding_layers_and_block_masks_do_not_meet(uncompiled: None) -> None:
    from test_language import a_batch, a_model

    model = a_model("qwen2, sliding layers")
    model.set_attention("flex_attention")
    ids, layout, _ = a_batch()
    with pytest.raises(UnsupportedMask, match="sliding layer"):
        model(ids, layout)


def test_flex_attention_refuses_what_a_block_mask_cannot_say(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rule = Rule("by hand", function=lambda q, k: q.valid[:, :, None] & k.valid[:, None])
    flex = backends.BACKENDS["flex_attention"]
    assert "function" in (flex.refuses(rule, torch.device("cuda")) or "")
    assert "CPU" in (flex.refuses(masks.causal(), torch.device("cpu")) or "")
    assert flex.refuses(masks.causal(), torch.device("cuda")) is None


def test_flex_attention_takes_no_dense_mask() -> None:
    query = torch.zeros(1, 1, 2, 16)
    for mask in (None, torch.ones(1, 1, 2, 2, dtype=torch.bool)):
        with pytest.raises(UnsupportedMask, match="dense mask or none"):
            plug._mmzoo_flex(torch.nn.Identity(), query, query, query, mask)


@pytest.mark.parametrize("extra", ["softcap", "s_aux", "position_bias"])
@pytest.mark.parametrize("attention", [plug._mmzoo_eager, plug._mmzoo_flex])
def test_attention_that_needs_more_than_a_mask_is_refused(attention: object, extra: str) -> None:
    module = torch.nn.Identity()
    query = torch.zeros(1, 1, 2, 4)
    mask = compact(masks.causal(), lay_out(text(2))).block_mask()
    with pytest.raises(UnsupportedMask, match=extra):
        attention(module, query, query, query, mask, **{extra: torch.ones(1)})  # type: ignore[operator]
