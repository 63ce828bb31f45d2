"""Attention algorithms: the fast form of each equals its definition, and the registry says what is true of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmzoo_kernels import lightning, list_attentions
from mmzoo_kernels.core_context import core_context_attention, core_tokens
from mmzoo_kernels.higher_order import naive_second_order_attention, second_order_attention
from mmzoo_kernels.lightning import lightning_attention, naive_lightning_attention
from mmzoo_kernels.low_rank_bias import low_rank_bias_attention
from mmzoo_kernels.masks import CompactMask
from mmzoo_kernels.mosa import MoSA
from mmzoo_kernels.registry import PATTERNS
from mmzoo_kernels.relay import relay_attention
from mmzoo_kernels.softmax import merge_states, softmax_attention
from mmzoo_kernels.sparse import drop_attention, group_mask, hash_attention, hash_buckets

lengths = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def same(one: Callable[..., Tensor], other: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Outputs and gradients agree in float64."""
    outs, gradients = [], []
    for run in (one, other):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outs.append(run(*leaves))
        gradients.append(torch.autograd.grad(outs[-1].sin().sum(), leaves))
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-8)


@given(tokens=lengths, chunk=st.integers(1, 16), seed=seeds, slope=st.sampled_from([0.0, 0.1, 3.0, 900.0]))
def test_lightning_attention_in_chunks_is_the_definition(tokens: int, chunk: int, seed: int, slope: float) -> None:
    inputs = drawn(seed, (2, 2, tokens, 4), (2, 2, tokens, 4), (2, 2, tokens, 3))
    slopes = torch.tensor([slope, 0.01], dtype=torch.float64)
    same(
        lambda q, k, v: lightning_attention(q, k, v, slopes, chunk=chunk)[0],
        lambda q, k, v: naive_lightning_attention(q, k, v, slopes),
        inputs,
    )


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention; where there is no GPU, as Triton's interpreter can run it."""
    pytest.importorskip("fla")
    if torch.cuda.is_available():
        return
    from triton.runtime import autotuner, interpreter

    # Tuning asks a driver for its clock, and kernels call methods on the numbers of their loops.
    monkeypatch.setattr(autotuner.Autotuner, "_bench", lambda self, *args, **options: [0.0, 0.0, 0.0])
    numbers = lambda *bounds: map(interpreter._implicit_cvt, range(*map(int, bounds)))  # noqa: E731
    monkeypatch.setattr("fla.ops.common.chunk_h.range", numbers, raising=False)


@pytest.mark.parametrize("carried", [False, True])
def test_lightning_attention_by_fla_is_the_definition(fla: None, carried: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    slopes = torch.tensor([0.1, 0.7])
    inputs = [x / 2 for x in drawn(0, (2, 2, 70, 16), (2, 2, 70, 16), (2, 2, 70, 16))]
    inputs += drawn(1, (2, 2, 16, 16)) if carried else []
    leaves = [x.float().to(device).requires_grad_() for x in inputs]
    exact = [x.requires_grad_() for x in inputs]
    found = lightning_attention(*leaves[:3], slopes.to(device), *leaves[3:], backend="fla")
    right = lightning_attention(*exact[:3], slopes.double(), *exact[3:])
    rounding = 2e-2 if device == "cuda" else 2e-5
    gradients = [
        torch.autograd.grad(out.sin().sum() + last.cos().sum(), to)
        for (out, last), to in ((found, leaves), (right, exact))
    ]
    for one, other in zip((*found, *gradients[0]), (*right, *gradients[1]), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, atol=rounding, rtol=rounding)


def test_what_fla_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, slopes = [x.float() for x in drawn(0, *[(1, 1, 3, 4)] * 3)], torch.tensor([0.1])
    with pytest.raises(ValueError, match="'triton'.*torch, fla"):
        lightning_attention(*inputs, slopes, backend="triton")
    monkeypatch.setattr(lightning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mmzoo\[linear\]"):
        lightning_attention(*inputs, slopes, backend="fla")
    monkeypatch.setattr(lightning.importlib.util, "find_spec", lambda name: name)
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(ValueError, match="not torch.float64"):
        lightning_attention(*(x.double() for x in inputs), slopes, backend="fla")
    with pytest.raises(ValueError, match="chunks of 64 tokens, not 16"):
        lightning_attention(*inputs, slopes, chunk=16, backend="fla")
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs a GPU.*cpu"):
        lightning_attention(*inputs, slopes, backend="fla")


@given(tokens=lengths, chunk=st.integers(1, 16), seed=seeds)
def test_second_order_attention_in_chunks_is_the_masked_product(tokens: int, chunk: int, seed: int) -> None:
    inputs = drawn(seed, (1, 2, tokens, 3), (1, 2, tokens, 3), (1, 2, tokens, 2))
    same(lambda *x: second_order_attention(*x, chunk=chunk)[0], naive_second_order_attention, inputs)


def algorithm_one(query: Tensor, key: Tensor, value: Tensor, gamma: float, ridge: float, eps: float) -> Tensor:
    """The paper's steps for one head, [N, D] and [N, E]."""
    d, e = query.shape[1], value.shape[1]
    S, C, G, m, h = (query.new_zeros(shape) for shape in ((d, d), (d, e), (d, e), (d,), (d,)))
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        G, h = gamma * G + k[:, None] * (k @ C), gamma * h + k * (k @ m)
        S, C, m = gamma * S + k[:, None] * k, gamma * C + q[:, None] * v, gamma * m + q
        u = q @ (S + ridge * torch.eye(d, dtype=S.dtype))
        rows.append((u @ C - q @ G) / (u @ m - q @ h + eps))
    return torch.stack(rows)


@given(tokens=lengths, chunk=st.integers(1, 16), seed=seeds, gamma=st.sampled_from([0.0, 0.5, 0.97, 1.0]))
def test_second_order_attention_with_decay_is_algorithm_one(tokens: int, chunk: int, seed: int, gamma: float) -> None:
    # Positive: a normaliser near 0 would show rounding alone.
    query, key, value = (x.abs() + 0.1 for x in drawn(seed, (tokens, 3), (tokens, 3), (tokens, 2)))
    out, _ = second_order_attention(
        *(x[None, None] for x in (query, key, value)), gamma=gamma, ridge=0.3, normalize=True, eps=1e-3, chunk=chunk
    )
    torch.testing.assert_close(out[0, 0], algorithm_one(query, key, value, gamma, 0.3, 1e-3), rtol=1e-9, atol=1e-9)


@given(tokens=st.integers(2, 40), cut=st.integers(1, 39), seed=seeds)
def test_states_carry_on(tokens: int, cut: int, seed: int) -> None:
    query, key, value = drawn(seed, (1, 2, tokens, 3), (1, 2, tokens, 3), (1, 2, tokens, 2))
    slopes = torch.tensor([0.2, 0.0], dtype=torch.float64)
    for whole in (
        lambda *x, state=None: lightning_attention(*x, slopes, state),
        lambda *x, state=None: second_order_attention(*x, gamma=0.9, state=state),
    ):
        expected, last = whole(query, key, value)
        first, state = whole(*(x[:, :, :cut] for x in (query, key, value)))
        second, state = whole(*(x[:, :, cut:] for x in (query, key, value)), state=state)
        torch.testing.assert_close(torch.cat([first, second], 2), expected)
        torch.testing.assert_close(state, last)


@given(tokens=lengths, keep=st.floats(0, 1), seed=seeds)
def test_dropped_queries_and_keys(tokens: int, keep: float, seed: int) -> None:
    inputs = drawn(seed, *[(2, 3, tokens, 4)] * 3)
    keep_query, keep_key = (x < keep for x in torch.rand(2, 2, 3, tokens))
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = keep_query[..., None] & keep_key[..., None, :] & causal
    same(
        lambda q, k, v: drop_attention(q, k, v, keep_query, keep_key),
        lambda q, k, v: softmax_attention(q, k, v, mask)[0],
        inputs,
    )


@given(tokens=lengths, per_head=st.booleans(), seed=seeds)
def test_hash_buckets_meet_earlier_keys_only(tokens: int, per_head: bool, seed: int) -> None:
    *inputs, projection = drawn(seed, *[(2, 3, tokens, 4)] * 3, (1, 3 if per_head else 1, 4, 2))
    query, key = (hash_buckets(x, projection) for x in inputs[:2])
    mask = (query[..., None] == key[..., None, :]) & torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)
    same(
        lambda q, k, v: hash_attention(q, k, v, projection),
        lambda q, k, v: softmax_attention(q, k, v, mask)[0],
        inputs,
    )


def test_sorting_leaves_few_tiles() -> None:
    tiles = []

    def counted(query: Tensor, key: Tensor, value: Tensor, mask: CompactMask) -> Tensor:
        tiles.append(mask.tiles(16).visited.sum())
        return softmax_attention(query, key, value, mask.dense()[:, None])[0]

    query, key, value = drawn(0, *[(1, 1, 512, 8)] * 3)
    projection = drawn(1, (1, 1, 8, 4))[0]
    hash_attention(query, key, value, projection, counted)
    unsorted = group_mask(*(hash_buckets(x, projection)[0] for x in (query, key)), 1).tiles(16).visited.sum()
    assert tiles[0] < unsorted / 2


@given(tokens=lengths, rank=st.integers(1, 9), causal=st.booleans(), seed=seeds)
def test_a_low_rank_bias(tokens: int, rank: int, causal: bool, seed: int) -> None:
    inputs = drawn(seed, *[(2, 3, tokens, 4)] * 3, *[(1, 3, tokens, rank)] * 2)

    def naive(query: Tensor, key: Tensor, value: Tensor, query_bias: Tensor, key_bias: Tensor) -> Tensor:
        scores = query @ key.mT / 2 + query_bias @ key_bias.mT
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1) @ value

    same(lambda *x: low_rank_bias_attention(*x, causal=causal), naive, inputs)


@given(tokens=lengths, group=st.integers(1, 5), window=st.integers(1, 9), seed=seeds)
def test_core_context_sees_every_token_so_far(tokens: int, group: int, window: int, seed: int) -> None:
    """Every token so far reaches the output, raw or in a core token, and no later one."""
    query, key, value = (
        x.requires_grad_() for x in drawn(seed, (1, 2, tokens, 4), (1, 1, tokens, 4), (1, 1, tokens, 3))
    )
    out = core_context_attention(query, key, value, group=group, window=window)
    for t in range(tokens):
        seen = torch.autograd.grad(out[0, :, t].sin().sum(), value, retain_graph=True)[0][0, 0].abs().sum(-1) > 0
        assert seen[: t + 1].all()
        assert not seen[t + 1 :].any()


@given(tokens=st.integers(2, 40), pooling=st.sampled_from(["cca", "mean", "max"]), seed=seeds)
def test_core_context_token_by_token(tokens: int, pooling: str, seed: int) -> None:
    inputs = drawn(seed, (1, 2, tokens, 4), (1, 1, tokens, 4), (1, 1, tokens, 4))
    whole = core_context_attention(*inputs, group=3, window=5, pooling=pooling)
    for t in range(tokens):
        last = core_context_attention(*(x[:, :, : t + 1] for x in inputs), group=3, window=5, pooling=pooling)
        torch.testing.assert_close(last[:, :, -1], whole[:, :, t])


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="'sum'.*cca, mean, max"):
        core_tokens(*drawn(0, *[(1, 1, 9, 4)] * 3), group=2, window=2, pooling="sum")


def test_mosa_takes_the_first_token_if_told() -> None:
    x = torch.randn(2, 24, 8)
    layer = MoSA(8, 4, 3, sparsity=6, include_first=True)
    scores, places = layer.route(x)
    assert places.shape == (2, 3, 4)
    assert (places[..., 0] == 0).all()
    assert (places.sort(-1).values.diff(dim=-1) > 0).all(), "a token is taken once"
    torch.testing.assert_close(scores, layer.r(x).mT.gather(-1, places))


@given(parts=st.tuples(lengths, lengths), masked=st.booleans(), seed=seeds)
def test_merged_parts_are_the_whole(parts: tuple[int, int], masked: bool, seed: int) -> None:
    query, key, value = drawn(seed, (2, 4, 5, 3), (2, 2, sum(parts), 3), (2, 2, sum(parts), 6))
    mask = torch.rand(2, 1, 5, sum(parts)) < 0.3 if masked else torch.ones(2, 1, 5, sum(parts), dtype=torch.bool)

    def merged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pieces = [
            softmax_attention(query, *part)
            for part in zip(key.split(parts, 2), value.split(parts, 2), mask.split(parts, 3), strict=True)
        ]
        out, lse = merge_states(*pieces[0], *pieces[1])
        torch.testing.assert_close(lse, softmax_attention(query, key, value, mask)[1])
        return out

    same(merged, lambda q, k, v: softmax_attention(q, k, v, mask)[0], [query, key, value])


def test_a_part_without_open_keys_adds_nothing_whatever_it_holds() -> None:
    out, lse = softmax_attention(*drawn(0, *[(1, 1, 3, 4)] * 3))
    poison, closed = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for merged, merged_lse in (merge_states(out, lse, poison, closed), merge_states(poison, closed, out, lse)):
        torch.testing.assert_close((merged, merged_lse), (out, lse))
    nothing, nothing_lse = merge_states(poison, closed, poison, closed)
    assert (nothing == 0).all()
    assert nothing_lse.isneginf().all()


@given(batch=st.integers(1, 3), queries=st.integers(1, 4), seed=seeds)
def test_relay_attention_is_attention_to_prefix_and_own(batch: int, queries: int, seed: int) -> None:
    query, *rest = drawn(seed, (batch, 4, queries, 3), *[(1, 2, 7, 3)] * 2, *[(batch, 2, 5, 3)] * 2)
    opened = torch.rand(batch, 1, queries, 12) < 0.5
    whole = [torch.cat([prefix.expand(batch, -1, -1, -1), own], 2) for prefix, own in zip(rest[:2], rest[2:])]
    prefix_mask, mask = opened.split([7, 5], 3)
    found = relay_attention(query, tuple(rest[:2]), tuple(rest[2:]), mask, 0.3, prefix_mask)
    torch.testing.assert_close(found, softmax_attention(query, *whole, opened, 0.3))
    found = relay_attention(query, tuple(rest[:2]), tuple(rest[2:]))
    torch.testing.assert_close(found, softmax_attention(query, *whole))


@pytest.mark.parametrize("one", list_attentions(), ids=lambda one: one.name)
def test_the_registry_names_code_that_is_there(one) -> None:
    assert callable(one.load())
    assert one.patterns
    assert set(one.patterns) <= set(PATTERNS)
    assert one.causal == any("causal" in pattern for pattern in one.patterns)
    if one.path.startswith("mmzoo_kernels"):
        assert inspect.getdoc(inspect.getmodule(one.load()))


def test_the_registry_names_nothing_twice() -> None:
    names = [one.name for one in list_attentions()]
    assert len(set(names)) == len(names)


HEADS = (1, 2, 24, 4)
SELF_CAUSAL = {
    "lightning-2": lambda q, k, v: lightning_attention(q, k, v, torch.tensor([0.1, 0.2]).double())[0],
    "second-order-hla": lambda q, k, v: second_order_attention(q, k, v, gamma=0.9)[0],
    "core-context": lambda q, k, v: core_context_attention(q, k, v, group=3, window=4),
    "query-key-drop": lambda q, k, v: drop_attention(q, k, v, *torch.ones(2, *HEADS[:3], dtype=torch.bool)),
    "hash-sparse": lambda q, k, v: hash_attention(q, k, v, torch.eye(4).double()[None, None, :, :2]),
    "low-rank-bias": lambda q, k, v: low_rank_bias_attention(q, k, v, q[..., :1], k[..., :1], causal=True),
}


@pytest.mark.parametrize("name", SELF_CAUSAL)
def test_what_is_called_causal_sees_nothing_later(name: str) -> None:
    assert next(one for one in list_attentions() if one.name == name).causal
    inputs = drawn(3, *[HEADS] * 3)
    changed = [torch.cat([x[:, :, :15], x[:, :, 15:] + 1], 2) for x in inputs]
    before, after = SELF_CAUSAL[name](*inputs), SELF_CAUSAL[name](*changed)
    torch.testing.assert_close(before[:, :, :15], after[:, :, :15])
    assert not torch.allclose(before[:, :, 15:], after[:, :, 15:])


def test_mosa_is_not_called_causal_and_is_not() -> None:
    assert not next(one for one in list_attentions() if one.name == "mosa").causal
    layer, x = MoSA(8, 4, 3, sparsity=4), torch.randn(1, 24, 8)
    changed = torch.cat([x[:, :15], x[:, 15:] * 3], 1)
    assert not torch.allclose(layer(x)[:, :15], layer(changed)[:, :15])
