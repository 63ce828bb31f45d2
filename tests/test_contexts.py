"""Mixture of Contexts: routing by the formula, and runs of variable length that equal the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmzoo_kernels.contexts import (
    TEXT,
    Chunks,
    mixture_of_contexts,
    naive_mixture_of_contexts,
    naive_varlen,
    route,
    torch_varlen,
)

pieces = st.lists(st.tuples(st.integers(1, 5), st.integers(TEXT, 3)), min_size=1, max_size=8)


def a_stream(parts: list[tuple[int, int]], seed: int = 0) -> tuple[Chunks, list[Tensor]]:
    lengths, shots = (torch.tensor(column) for column in zip(*parts, strict=True))
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, int(lengths.sum()), 4)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    return Chunks(lengths, shots), inputs


@given(parts=pieces, top_k=st.integers(0, 4), seed=st.integers(0, 99))
def test_routing_is_the_formula(parts: list[tuple[int, int]], top_k: int, seed: int) -> None:
    chunks, (query, key, _) = a_stream(parts, seed)
    chosen, chunk = route(query, key, chunks, top_k), chunks.of_tokens()
    first = [int(chunks.lengths[:c].sum()) for c in range(len(parts) + 1)]
    for i in range(query.shape[2]):
        own = int(chunk[i])
        means = [key[1, 0, first[c] : first[c + 1]].mean(0) for c in range(own)]
        ranked = sorted(range(own), key=lambda c: -(query[1, 0, i] @ means[c]).item())
        expected = {c for c, (_, shot) in enumerate(parts) if shot in (TEXT, parts[own][1])} | set(ranked[:top_k])
        assert set(chosen[1, 0, i].nonzero().flatten().tolist()) == expected


def test_a_long_chunk_is_not_better_for_being_long() -> None:
    chunks = Chunks(torch.tensor([1, 5, 1]), torch.tensor([0, 1, 2]))
    key = torch.tensor([2.0, 1, 1, 1, 1, 1, 0])[None, None, :, None]
    assert route(torch.ones_like(key), key, chunks, 1)[0, 0, -1].tolist() == [True, False, True]


@given(parts=pieces, top_k=st.integers(0, 4), seed=st.integers(0, 99))
def test_runs_equal_the_mask(parts: list[tuple[int, int]], top_k: int, seed: int) -> None:
    chunks, inputs = a_stream(parts, seed)
    chosen = route(*inputs[:2], chunks, top_k)
    found, expected = (run(*inputs, chunks, chosen) for run in (mixture_of_contexts, naive_mixture_of_contexts))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.sin().sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_query_that_chose_nothing_gives_zero() -> None:
    chunks, inputs = a_stream([(3, 0), (2, 1)])
    chosen = route(*inputs[:2], chunks, 1)
    chosen[0, 1, 4] = False
    found = mixture_of_contexts(*inputs, chunks, chosen)
    assert (found[0, 1, 4] == 0).all()
    torch.testing.assert_close(found, naive_mixture_of_contexts(*inputs, chunks, chosen))
    assert all(one.isfinite().all() for one in torch.autograd.grad(found.sum(), inputs))


def test_only_chosen_pairs_are_worked_on() -> None:
    chunks, inputs = a_stream([(4, shot) for shot in range(12)])
    seen = []

    def counting(query: Tensor, key: Tensor, value: Tensor, *borders: Tensor) -> tuple[Tensor, Tensor]:
        lengths = [one.diff() for one in borders]
        seen.append(int((lengths[0] * lengths[1]).sum()))
        return query * 0, query[:, 0] * 0

    chosen = route(*inputs[:2], chunks, 2)
    mixture_of_contexts(*inputs, chunks, chosen, counting)
    assert seen == [int((chosen.sum(-1) * 4).sum())]
    assert seen[0] < 48 * 48 * 4 * 3 / 12 + 1


def test_chunks_that_are_not_all_alike_in_size() -> None:
    chunks, _ = a_stream([(1, 0), (3, TEXT), (2, 1)])
    assert chunks.of_tokens().tolist() == [0, 1, 1, 1, 2, 2]


class OnGPU(torch.Tensor):
    """A tensor that says so."""

    device = torch.device("cuda")


def test_torchs_kernel_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, inputs = a_stream([(3, 0), (2, TEXT), (4, 1), (1, 2)])
    inputs = [x.detach().half() for x in inputs]
    chosen = route(*inputs[:2], chunks, 1)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *borders: Any, return_aux: Any) -> tuple[Tensor, Tensor]:
        """[T, heads, D] in and out, log-sum-exps [heads, T]."""
        assert q.shape[1] == k.shape[1] == v.shape[1] == 1
        assert borders[2:] == tuple(int(one.diff().max()) for one in borders[:2])
        assert return_aux.lse
        plain = (x[:, 0].as_subclass(torch.Tensor) for x in (q, k, v))
        out, lse = naive_varlen(*plain, *(one.as_subclass(torch.Tensor) for one in borders[:2]))
        return out[:, None], lse[None]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)

    def there(*given: Tensor) -> tuple[Tensor, Tensor]:
        return torch_varlen(*(x.as_subclass(OnGPU) for x in given))

    found = mixture_of_contexts(*inputs, chunks, chosen, there)
    torch.testing.assert_close(found, mixture_of_contexts(*inputs, chunks, chosen))
    halves = [x.as_subclass(OnGPU) for x in (torch.zeros(2, 4).half(), *[torch.zeros(2, 4).half()] * 2)]
    with pytest.raises(ValueError, match="no backward"):
        torch_varlen(halves[0].requires_grad_(), *halves[1:], *[torch.tensor([0, 2])] * 2)
    with pytest.raises(ValueError, match="not torch.float64 on cpu"):
        torch_varlen(*(x.double().as_subclass(torch.Tensor) for x in halves), *[torch.tensor([0, 2])] * 2)
