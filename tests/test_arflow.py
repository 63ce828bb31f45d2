"""ARFlow's attention: by its formula, and in parts with the state carried."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.models.arflow import GateRetention

TOKENS = 5


def a_module(seed: int = 0, dtype: torch.dtype = torch.float64) -> GateRetention:
    torch.manual_seed(seed)
    module = GateRetention(12, 3, TOKENS, gate_normalizer=2).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def given_images(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, count * TOKENS, 12, dtype=dtype, requires_grad=True) for _ in range(2))


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def by_definition(module: GateRetention, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Image by image and head by head."""
    names = ("q", "k", "v", "g", "gt", "out")
    weight = {name: getattr(module, f"{name}_proj").weight for name in names}
    q, k, v = (normed(x @ weight[name].T) for name in "qkv")
    gates = F.logsigmoid((x + c) @ weight["gt"].T) / module.gate_normalizer
    out, last = torch.zeros_like(x), []
    for b in range(len(x)):
        for head in range(3):
            part, state = slice(4 * head, 4 * head + 4), torch.zeros(4, 4, dtype=x.dtype)
            for start in range(0, x.shape[1], TOKENS):
                rows = slice(start, start + TOKENS)
                query, key, value = q[b, rows, part], k[b, rows, part] * 4**-0.5, v[b, rows, part]
                gate = gates[b, rows, head]
                inner = (query @ key.T).softmax(-1) @ value
                cross = (query * gate.cumsum(0)[:, None].exp()) @ state
                out[b, rows, part] = normed(inner + cross)
                state = gate.mean().exp() * state + key.T @ value
            last.append(state)
    return (F.silu(x @ weight["g"].T) * out) @ weight["out"].T, torch.stack(last).view(-1, 3, 4, 4)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_is_its_formula_and_so_are_its_gradients(count: int) -> None:
    module, (x, c) = a_module(), given_images(count)
    parameters = [x, *module.parameters()] + ([c] if count > 1 else [])
    (out, last), (expected, state) = module(x, c), by_definition(module, x, c)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, state)
    weights = torch.randn_like(out), torch.randn_like(last)
    ours, theirs = (
        torch.autograd.grad((a * weights[0]).sum() + (b * weights[1]).sum(), parameters, allow_unused=True)
        for a, b in ((out, last), (expected, state))
    )
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 5))
def test_in_parts_with_the_state_carried_it_gives_the_same(parts: list[int], seed: int) -> None:
    module = a_module(seed)
    x, c = given_images(sum(parts))
    whole, last = module(x, c)
    state, outputs = None, []
    for one, two in zip(*(y.split([n * TOKENS for n in parts], 1) for y in (x, c))):
        out, state = module(one, two, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


def test_later_images_do_not_change_earlier_ones_nor_rows_each_other() -> None:
    module, (x, c) = a_module(), given_images(3)
    before = module(x, c)[0]
    other = x.detach().clone()
    other[0, TOKENS : 2 * TOKENS] += 1
    changed = (module(other, c)[0] != before).any(-1).view(2, 3, TOKENS).any(-1)
    assert changed.tolist() == [[False, True, True], [False, False, False]]


def test_at_half_precision_the_state_is_kept_in_float32() -> None:
    module, (x, c) = a_module(dtype=torch.float32), given_images(3, torch.float32)
    full, _ = module(x, c)
    half, state = module.to(torch.bfloat16)(x.bfloat16(), c.bfloat16())
    assert half.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="7 tokens are not whole images of 5"):
        a_module()(torch.zeros(1, 7, 12).double(), torch.zeros(1, 7, 12).double())
    with pytest.raises(InputError, match="not whole"):
        a_module()(torch.zeros(1, 0, 12).double(), torch.zeros(1, 0, 12).double())
    with pytest.raises(InputError, match="5 heads"):
        GateRetention(12, 5, 4)
