"""Rules as calls of flash kernels: the calls against the masks, the kernels' arguments, and transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from layouts import MIXED, batches, clips, packs, projections, scales
from torch import Tensor
from torch.nn.attention import varlen as torchs

from mmzoo import masks
from mmzoo.attention import allowed, attend, backend, backends, compact, varlen
from mmzoo.attention import transformers as plug
from mmzoo.attention.varlen import Call, calls, opened
from mmzoo.errors import MissingExtra, UnsupportedMask
from mmzoo.layout import Role, image, lay_out, pack, text, video
from mmzoo.masks import Rule, see
from mmzoo.masks.ccam import query_layout
from mmzoo.masks.rule import everything, not_after, segment

CUDA = torch.device("cuda")
SAYABLE = {
    "causal": (masks.causal(), MIXED),
    "bidirectional": (masks.bidirectional(), MIXED),
    "sliding-window": (masks.sliding_window(3), MIXED),
    "frame-block-causal": (masks.frame_block_causal(), MIXED),
    "concentric-causal": (masks.concentric_causal(), MIXED),
    "mmca, text": (masks.multimodal_causal()[0], MIXED),
    "mmca, images": (masks.multimodal_causal()[1], MIXED),
    "causal-temporal": (masks.causal_temporal(), batches(packs(clips()))),
    "block-causal": (masks.block_causal(3, window=4), batches(packs(clips()))),
    "scale-causal": (masks.scale_causal(), batches(packs(scales()))),
}


def by_definition(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> Tensor:
    """A flash kernel written out: the mask of each run ends in its last query and its last key."""
    groups, outputs = query.shape[1] // key.shape[1], []
    for (start, end), (first, last) in zip(pairwise(call.query_starts), pairwise(call.key_starts), strict=True):
        rows = query[start:end]
        keys, values = (x[first:last].repeat_interleave(groups, 1) for x in (key, value))
        distance = torch.arange(len(rows))[:, None] + len(keys) - len(rows) - torch.arange(len(keys))
        left, right = call.window
        closed = (right >= 0) & (distance < -right) | (left >= 0) & (distance > left)
        scores = torch.einsum("qhd,khd->hqk", rows, keys) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(closed, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", SAYABLE)
def test_calls_open_the_pairs_of_the_rule(name: str) -> None:
    rule, layouts = SAYABLE[name]

    @given(layouts)
    def check(layout: Any) -> None:
        mask = allowed(rule, layout)
        assert torch.equal(opened(calls(compact(rule, layout), name), mask.shape), mask)

    check()


@pytest.mark.parametrize("rounding", ["ceil", "floor", "block"])
def test_calls_open_the_pairs_of_cross_attention(rounding: str) -> None:
    rule = masks.causal_cross_attention()

    @given(projections(rounding))
    def check(sides: Any) -> None:
        mask = allowed(rule, *sides)
        assert torch.equal(opened(calls(compact(rule, *sides), "ccam"), mask.shape), mask)

    check()


@given(MIXED)
def test_the_last_queries_over_all_keys(layout: Any) -> None:
    rule, rows = masks.frame_block_causal(), slice(len(layout) // 2, len(layout))
    mask = allowed(rule, layout, rows=rows)
    assert torch.equal(opened(calls(compact(rule, layout).rows(rows), "rows"), mask.shape), mask)


def test_many_queries_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, rule = pack([lay_out(text(9), video(3, 3), text(5)), lay_out(text(4))]), masks.frame_block_causal()
    whole = calls(compact(rule, layout), "whole")
    monkeypatch.setattr(varlen, "ROWS", 4)
    for one, other in zip(calls(compact(rule, layout), "parts"), whole, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_ordinary_rules_take_few_runs() -> None:
    """Text is one growing run, a frame one run over the same keys, a full window one moving run."""
    layout = lay_out(text(9), video(3, 2, 2), text(5))
    runs = {
        "causal": {(-1, 0): 1},
        "frame-block-causal": {(-1, -1): 3, (-1, 0): 2},
        "sliding-window": {(-1, 0): 1, (3, 0): 1},
    }
    for name, expected in runs.items():
        rule = masks.sliding_window(4) if name == "sliding-window" else masks.rule(name)
        assert {one.window: len(one.query_starts) - 1 for one in calls(compact(rule, layout), name)} == expected


@pytest.mark.parametrize("name", ["modality-mutual", "teacher-forcing"])
def test_keys_in_two_runs_are_refused_before_anything_runs(name: str) -> None:
    flash = backends.BACKENDS["varlen"]
    assert flash.refuses(masks.rule(name), CUDA) == "a query sees keys that do not form one run"


def test_keys_in_two_runs_are_refused_where_the_layout_shows_it() -> None:
    layout, rule = lay_out(video(9, 1)), masks.sink_window(3, 1, 1)
    with pytest.raises(UnsupportedMask, match=r"'flash'.*'sink-window'.*one run"):
        calls(compact(rule, layout), rule.name)


# Attention by calls, with the kernel written out.


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flash with the kernel of this file, which runs on a CPU and in any precision."""
    flash = backends.Flash("varlen", by_definition)
    refuses = flash.refuses
    monkeypatch.setattr(flash, "refuses", lambda rule, device, head_dim=None: refuses(rule, CUDA, head_dim))
    monkeypatch.setattr(backends.Flash, "DTYPES", (torch.float32, torch.float64))
    monkeypatch.setitem(backends.BACKENDS, "varlen", flash)
    yield


def assert_equal_to_eager(rule: Rule, queries: Any, keys: Any, groups: int) -> None:
    shapes = [(4, len(queries)), (groups, len(keys)), (groups, len(keys))]
    tensors = [torch.randn(len(keys.data), *shape, 8, dtype=torch.float64, requires_grad=True) for shape in shapes]
    results = []
    for attention in ("varlen", "eager"):
        output = attend(*tensors, rule, queries, keys, attention=attention)
        loss = (output * torch.linspace(-1, 1, 8)).sum() + 0 * sum(x.sum() for x in tensors)  # no call, no gradient
        results.append((output, *torch.autograd.grad(loss, tensors)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "groups"), [("causal", 1), ("causal", 4), *((name, 2) for name in SAYABLE)])
def test_outputs_and_gradients_equal_eager(name: str, groups: int, on_a_cpu: None) -> None:
    rule, layouts = SAYABLE[name]

    @given(layouts)
    def check(layout: Any) -> None:
        assert_equal_to_eager(rule, layout, layout, groups)

    check()


def test_cross_attention_equals_eager(on_a_cpu: None) -> None:
    queries = pack([query_layout(6, 7), query_layout(3, 2)])
    assert_equal_to_eager(
        masks.causal_cross_attention(), queries, pack([lay_out(video(7, 2)), lay_out(video(2, 3))]), 4
    )


@pytest.mark.parametrize("rule", ["frame-block-causal", "concentric-causal", "mmca"])
def test_a_language_model_prefills_by_calls_and_decodes_with_sdpa(rule: str, on_a_cpu: None) -> None:
    from test_language import GREEDY, a_batch, a_model

    model = a_model(rule=rule)
    ids, layout, _ = a_batch()
    expected, tokens = model(ids, layout).logits, model.generate(ids, layout, **GREEDY)
    model.set_attention("varlen")
    made = model.mask(layout, len(layout))
    assert all(isinstance(one, Call) for calls in getattr(made, "branches", [made]) for one in calls)
    for inputs in ({"layout": layout}, {"attention_mask": made, "position_ids": model.scheme(layout)}):
        logits = model(ids, **inputs).logits
        torch.testing.assert_close(logits[layout.valid], expected[layout.valid], atol=1e-4, rtol=1e-4)
    assert model.generate(ids, layout, **GREEDY).tolist() == tokens.tolist()
    with pytest.raises(UnsupportedMask, match=r"'varlen'.*static or sliding"):
        model.generate(ids, layout, cache_implementation="static", **GREEDY)


def test_a_sliding_layer_and_calls_do_not_meet(on_a_cpu: None) -> None:
    from test_language import a_batch, a_model

    model = a_model("qwen2, sliding layers", rule="frame-block-causal")
    model.set_attention("varlen")
    ids, layout, _ = a_batch()
    with pytest.raises(UnsupportedMask, match=r"'varlen'.*sliding layer"):
        model(ids, layout)


# Refusals.


@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_flash_says_what_it_cannot(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash = backends.BACKENDS[attention]
    by_hand = Rule("by hand", function=lambda q, k: q.valid[:, :, None] & k.valid[:, None])
    assert "function" in flash.refuses(by_hand, CUDA)
    assert "GPU" in flash.refuses(masks.causal(), torch.device("cpu"))
    for head_dim in (4, 12, 264):
        assert str(head_dim) in flash.refuses(masks.causal(), CUDA, head_dim)
    assert flash.refuses(masks.causal(), CUDA, 256) is None
    query = torch.zeros(1, 1, 2, 8)
    with pytest.raises(UnsupportedMask, match=r"float16 and bfloat16, not torch.float32"):
        flash(query, query, query, backends.Mask(masks.causal(), lay_out(text(2)), lay_out(text(2)), slice(None)), 1.0)


@pytest.mark.parametrize(
    ("attention", "package"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_a_package_that_is_not_installed(attention: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingExtra, match=rf"'{attention}' needs the package '{package}'.*mmzoo\[flash\]"):
        backend(attention, masks.causal(), device="cuda")


def test_an_old_torch_has_no_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedMask, match="no varlen_attn"):
        backend("varlen", masks.causal(), device="cuda")


def test_a_backbone_that_loses_the_calls_is_an_error() -> None:
    run, query = plug._flash_function("varlen"), torch.zeros(1, 1, 3, 8)
    with pytest.raises(UnsupportedMask, match="dense mask or none"):
        run(torch.nn.Identity(), query, query, query, None)
    module, made = torch.nn.Identity().train(), calls(compact(masks.causal(), lay_out(text(3))), "causal")
    with pytest.raises(UnsupportedMask, match="dropout"):
        run(module, query, query, query, None, dropout=0.1, flash_calls=made)


def test_flex_attention_takes_no_small_heads() -> None:
    assert "8" in backends.BACKENDS["flex_attention"].refuses(masks.causal(), CUDA, 8)
    assert backends.BACKENDS["flex_attention"].refuses(masks.causal(), CUDA, 16) is None


# What the three libraries are called with.


def a_call() -> tuple[list[Tensor], tuple[Call, ...]]:
    layout = lay_out(text(3), video(2, 2), text(2, Role.ANSWER))
    rule = masks.frame_block_causal()
    return [torch.randn(1, heads, len(layout), 8) for heads in (4, 2, 2)], calls(compact(rule, layout), "calls")


def attended(kernel: Any) -> Tensor:
    tensors, made = a_call()
    return varlen.attend_by_calls(*tensors, made, 0.5, kernel)


def as_flash_attn(q: Tensor, k: Tensor, v: Tensor, *lengths: Any, **options: Any) -> Tensor:
    window = options["window_size"] if not options["causal"] else (options["window_size"][0], 0)
    return by_definition(q, k, v, Call(q, k, *lengths, window), options["softmax_scale"])


def test_flash_attn_2_is_called_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=as_flash_attn))
    torch.manual_seed(1)
    expected = attended(by_definition)
    torch.manual_seed(1)
    torch.testing.assert_close(attended(varlen.flash_attn_2), expected)


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attn_3_is_called_rightly(with_sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(*args: Any, **options: Any) -> Any:
        output = as_flash_attn(*args, **options)
        return (output, None) if with_sums else output

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_varlen_func=function))
    torch.manual_seed(1)
    expected = attended(by_definition)
    torch.manual_seed(1)
    torch.testing.assert_close(attended(varlen.flash_attn_3), expected)


@pytest.mark.parametrize("grouped", [True, False])
def test_torchs_kernel_is_called_rightly(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With grouped heads where this torch takes them, with repeated keys where it does not."""

    def as_torch(
        q: Tensor, k: Tensor, v: Tensor, *lengths: Any, scale: float, window_size: tuple, enable_gqa: bool = False
    ) -> Tensor:
        assert enable_gqa == (q.shape[1] != k.shape[1]) == grouped
        return by_definition(q, k, v, Call(q, k, *lengths, window_size), scale)

    monkeypatch.setattr(torchs, "varlen_attn", as_torch)
    monkeypatch.setattr(varlen, "_takes_grouped_heads", lambda: grouped)
    torch.manual_seed(1)
    expected = attended(by_definition)
    torch.manual_seed(1)
    torch.testing.assert_close(attended(varlen.torch_varlen), expected)


def test_values_that_are_no_order_along_the_sequence() -> None:
    """One term is sorted by its value, whatever the places."""
    rule = Rule("later segments first", (see(everything, everything, not_after(segment)),))
    layout = lay_out(image(2, 2), text(2), image(1, 2))
    mask = allowed(rule, layout)
    assert torch.equal(opened(calls(compact(rule, layout), rule.name), mask.shape), mask)
