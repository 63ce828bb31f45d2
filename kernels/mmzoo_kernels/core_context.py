"""Core-context attention: far tokens in groups, each summarised by one core token, near tokens as they are.

One softmax over both. Source: CCA-Attention, arXiv 2412.12465.

Shape legend: B batch, H query heads, G key/value heads, N tokens, D head dim, P core tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmzoo_kernels.softmax import softmax_attention

POOLINGS = ("cca", "mean", "max")


def core_context_attention(
    query: Tensor, key: Tensor, value: Tensor, *, group: int, window: int, pooling: str = "cca"
) -> Tensor:
    """[B, H, N, D] from query [B, H, N, D] after rotary embedding, key and value [B, G, N, D].

    Args:
        group: raw tokens a core token.
        window: a query sees at least so many raw tokens, and fewer than `window + group`.
        pooling: `cca` weighs a group by the softmax that its last query gives it; or `mean`, `max`.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    cores = core_tokens(query, key, value, group=group, window=window, pooling=pooling)
    keys, values = (torch.cat(pair, 2) for pair in zip(cores, (key, value), strict=True))
    mask = core_context_mask(query.shape[2], group, window, query.device)
    return softmax_attention(query, keys, values, mask)[0]


def core_tokens(
    query: Tensor, key: Tensor, value: Tensor, *, group: int, window: int, pooling: str = "cca"
) -> tuple[Tensor, Tensor]:
    """Core keys and values, [B, H, P, D] each, from query, key and value [B, H, N, D]."""
    if pooling not in POOLINGS:
        raise ValueError(f"Unknown pooling {pooling!r}. Known: {', '.join(POOLINGS)}.")
    count = max(0, (query.shape[2] - window) // group)
    queries, keys, values = (x[:, :, : count * group].unflatten(2, (count, group)) for x in (query, key, value))
    if pooling == "mean":
        return keys.mean(3), values.mean(3)
    if pooling == "max":
        return keys.amax(3), values.amax(3)
    weights = (keys @ queries[..., -1, :, None] * query.shape[-1] ** -0.5).softmax(-2)
    return (weights * keys).sum(3), (weights * values).sum(3)


def core_context_mask(tokens: int, group: int, window: int, device: torch.device | None = None) -> Tensor:
    """bool [N, P + N], (query, core tokens and then raw ones)."""
    places = torch.arange(tokens, device=device)
    pooled = ((places + 1 - window).div(group, rounding_mode="floor")).clamp(min=0)[:, None]
    cores = torch.arange(max(0, (tokens - window) // group), device=device) < pooled
    return torch.cat([cores, (pooled * group <= places) & (places <= places[:, None])], 1)
