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


def fast_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same by the kernels behind `scaled_dot_product_attention`, on a CPU or a CUDA device; forward only.

    No public function of torch gives their log-sum-exps; torch's own context parallelism calls them as is done here.

    Raises:
        ValueError: another device, or a gradient is wanted, which would lack the log-sum-exp's part.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError("fast_softmax_attention has no backward pass: call it under torch.no_grad().")
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(f"fast_softmax_attention runs on CPUs and CUDA devices, not on {query.device}.")
    split, scale = (-1, query.shape[2]), query.shape[-1] ** -0.5 if scale is None else scale
    # A group's queries as rows, so that no key or value is repeated.
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    bias = None if mask is None else _bias(mask.expand(-1, -1, query.shape[2], key.shape[2]), query, key)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, key, value, attn_mask=bias, scale=scale
        )
    else:
        bias = None if bias is None else bias.expand(-1, key.shape[1], -1, -1)
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            rows, key, value, bias, compute_log_sumexp=True, scale=scale
        )[:2]
        lse = lse[:, :, : rows.shape[2]]  # its rows are padded
    out, lse = out.unflatten(2, split).flatten(1, 2), lse.unflatten(2, split).flatten(1, 2)
    if mask is None:
        return out, lse
    closed = ~mask.any(-1)
    return out.masked_fill(closed[..., None], 0), lse.masked_fill(closed, -torch.inf)


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[B, 1 or G, H / G * Q, K] to be added to the scores of rows, from a mask [1 or B, 1 or H, Q, K]."""
    batch, heads, groups = *query.shape[:2], key.shape[1]
    if mask.shape[1] == 1:
        opened = mask.expand(batch, heads // groups, -1, -1).flatten(1, 2)[:, None]
    else:
        opened = mask.expand(batch, -1, -1, -1).unflatten(1, (groups, -1)).flatten(2, 3)
    # CUDA kernels load it in vectors, so its rows begin at multiples of 16 numbers.
    room = query.new_empty(*opened.shape[:-1], -(-key.shape[2] // 16) * 16)[..., : key.shape[2]]
    return room.fill_(-torch.inf).masked_fill_(opened, 0)


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
