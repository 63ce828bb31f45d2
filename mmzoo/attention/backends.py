"""Backends: how a rule is executed. Each says whether it can express a rule and, if not, why.

Shape legend: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmzoo.attention.compiler import allowed, compact
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import TokenLayout
from mmzoo.masks.rule import Rule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Rules = Rule | tuple[Rule, Rule]
"""One softmax, or the pair of a two-softmax attention."""

WORKING = ("sdpa", "eager")


@dataclass(frozen=True)
class Mask:
    """A rule on two layouts, in the form that a backend asks for."""

    rule: Rule
    queries: TokenLayout
    keys: TokenLayout
    rows: slice

    def dense(self) -> Tensor:
        """bool [B, Q, K]."""
        return allowed(self.rule, self.queries, self.keys, rows=self.rows)

    def blocks(self) -> BlockMask:
        """FlexAttention's block mask."""
        return compact(self.rule, self.queries, self.keys).rows(self.rows).block_mask()


class Backend(Protocol):
    """What runs `softmax(scale * query key^T over the open pairs) value`."""

    name: str

    def refuses(self, rule: Rule, device: torch.device) -> str | None:
        """Why this backend cannot express the rule there, or None."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        """[B, H, Q, D] from query [B, H, Q, D], key and value [B, G, K, D]."""


class Eager:
    """Softmax written out: the slow twin that every other backend is compared with."""

    name = "eager"

    def refuses(self, rule: Rule, device: torch.device) -> str | None:
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        return eager_attention(query, key, value, mask.dense(), scale)[0]


class SDPA:
    """torch's `scaled_dot_product_attention` with a boolean mask."""

    name = "sdpa"

    def refuses(self, rule: Rule, device: torch.device) -> str | None:
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        grouped, dense = query.shape[1] != key.shape[1], mask.dense()[:, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=scale, enable_gqa=grouped)


class Flex:
    """torch's FlexAttention, compiled, on a block mask from tile bounds; a mask_mod only, no score_mod.

    Generated tokens are decoded by SDPA. A recompilation limit is an error: torch would go on unfused.
    """

    name = "flex_attention"

    def refuses(self, rule: Rule, device: torch.device) -> str | None:
        if device.type == "cpu":
            return "FlexAttention has no backward on a CPU, and its compiled forward was seen to be wrong there"
        if rule.function is not None:
            return "the rule is a function, and block masks are made from terms"
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        return flex(query, key, value, mask.blocks(), scale)


class Refusing:
    """A backend of transformers that would drop the mask."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason

    def refuses(self, rule: Rule, device: torch.device) -> str | None:
        return self.reason

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        raise UnsupportedMask(self.name, mask.rule.name, self.reason, WORKING)


_DROPS = "transformers drops every mask but padding under flash attention"
_ALL: list[Backend] = [
    Eager(),
    SDPA(),
    Flex(),
    *(Refusing(f"flash_attention_{version}", _DROPS) for version in (2, 3, 4)),
]
BACKENDS = {backend.name: backend for backend in _ALL}


def backend(name: str, *rules: Rule, device: torch.device | str = "cpu") -> Backend:
    """A backend by name that can express all the given rules on that device.

    Raises:
        InputError: no such backend.
        UnsupportedMask: it cannot express one of the rules.
    """
    if name not in BACKENDS:
        raise InputError(f"Unknown attention backend {name!r}. Known: {', '.join(BACKENDS)}.")
    for rule in rules:
        reason = BACKENDS[name].refuses(rule, torch.device(device))
        if reason is not None:
            raise UnsupportedMask(name, rule.name, reason, WORKING)
    return BACKENDS[name]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None = None) -> Tensor:
    """[B, H, Q, D] by compiled FlexAttention under a block mask; a query without an open key gives 0."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        grouped = query.shape[1] != key.shape[1]
        return _compiled_flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rules,
    queries: TokenLayout,
    keys: TokenLayout | None = None,
    *,
    rows: slice = slice(None),
    attention: str = "sdpa",
    scale: float | None = None,
) -> Tensor:
    """Attention under a rule: [B, H, Q, D].

    A query without an open key gives 0, or the mean over the fallback's keys where the rule says so. A pair of rules
    is two-softmax attention: the outputs are added.

    Args:
        query: [B, H, Q, D].
        key, value: [B, G, K, D]; H is a multiple of G, and nothing is repeated beforehand.
        rule: one rule, or the pair of a two-softmax attention.
        queries: layout of the queries.
        keys: layout of the keys; None is self-attention.
        rows: which queries of the layout `query` holds; a decoding step holds the last one.
        attention: name of the backend.
        scale: D ** -0.5 if None.
    """
    lengths = (query.shape[0], query.shape[2], key.shape[2])
    described = ((keys or queries).shape[0], len(queries[rows]), len(keys or queries))
    if lengths != described:
        raise InputError(f"Batch, queries and keys are {lengths} in the tensors and {described} in the layouts.")
    rules = rule if isinstance(rule, tuple) else (rule,)
    run = backend(attention, *rules, device=query.device)
    keys = queries if keys is None else keys
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for one in rules:
        mask = Mask(one, queries, keys, rows)
        output = run(query, key, value, mask, scale)
        if one.fallback is not None:
            mean = _mean_over(allowed(one.fallback, queries, keys, rows=rows), value, query.shape[1])
            output = torch.where(mask.dense().any(-1)[:, None, :, None], output, mean)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]


def _mean_over(mask: Tensor, value: Tensor, heads: int) -> Tensor:
    weights = mask.to(value.dtype)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return (weights[:, None] @ value).repeat_interleave(heads // value.shape[1], 1)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and weights [B, H, Q, K]; a query without an open key has weights 0.

    The softmax runs in float32, in float64 for float64 inputs.
    """
    mask = mask if mask.dim() == 4 else mask[:, None]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    precision = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2) * scale).to(precision)
    weights = scores.masked_fill(~mask, torch.finfo(precision).min).softmax(-1)
    weights = F.dropout(weights.masked_fill(~mask, 0).to(query.dtype), dropout)
    return weights @ value, weights
