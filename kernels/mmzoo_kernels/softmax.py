"""Softmax attention written out, which everything else here is compared with, and the merging of its parts.

Shape legend: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, E value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the open pairs: output [B, H, Q, E], and the log-sum-exp of each query's scores [B, H, Q].

    A query without an open key gives 0, and a log-sum-exp of -inf. Scores are made in float32, in float64 for float64.

    Args:
        query: [B, H, Q, D].
        key: [B, G, K, D]; H is a multiple of G.
        value: [B, G, K, E].
        mask: bool, broadcast to [B, H, Q, K], True = may attend; None opens everything.
        scale: D ** -0.5 if None.
    """
    grouped, precision = (key.shape[1], -1), torch.promote_types(query.dtype, torch.float32)
    # A group's queries as rows of one product: no key or value is repeated.
    rows = query.unflatten(1, grouped).flatten(2, 3).to(precision)
    scores = rows @ key.to(precision).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.unflatten(2, (-1, query.shape[2])).flatten(1, 2)  # [B, H, Q, K]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    # Where nothing is open, -inf - -inf would be NaN, in the gradient too.
    weights = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
    out = weights.unflatten(1, grouped).flatten(2, 3) @ value.to(precision)
    return out.unflatten(2, (-1, query.shape[2])).flatten(1, 2).to(value.dtype), lse


def merge_states(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each: output [..., E], log-sum-exp [...].

    A part without an open key has a log-sum-exp of -inf and changes nothing, whatever its output holds.
    """
    lse = torch.logaddexp(one_lse, other_lse)
    reference = lse.masked_fill(lse.isneginf(), 0)
    merged = torch.zeros_like(one, dtype=lse.dtype)
    for part, part_lse in ((one, one_lse), (other, other_lse)):
        weight = (part_lse - reference).exp()[..., None]
        merged = merged + torch.where(weight > 0, part * weight, 0)
    return merged.to(one.dtype), lse


def merge_parts(outs: Tensor, lses: Tensor, owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """`merge_states` of any number of parts: output [owners, E] and log-sum-exp [owners].

    Args:
        outs: [parts, E]; lses: [parts], finite.
        owner: int64 [parts], whose part it is. An owner without parts gets 0 and -inf.
    """
    largest = lses.new_full((owners,), -torch.inf).scatter_reduce(0, owner, lses.detach(), "amax")
    weights = (lses - largest[owner]).exp()
    total = weights.new_zeros(owners).index_add(0, owner, weights)
    summed = weights.new_zeros(owners, outs.shape[1]).index_add(0, owner, weights[:, None] * outs)
    none = total == 0
    return (summed / total.masked_fill(none, 1)[:, None]).to(outs.dtype), total.log() + largest.masked_fill(none, 0)
