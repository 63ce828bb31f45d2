"""Relay attention: one decoding step whose prefix is shared by the batch, and whose keys and values exist once.

Source: arXiv 2402.14808.

Shape legend: B batch, H query heads, G key/value heads, Q queries, P prefix tokens, U tokens a sample, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmzoo_kernels.softmax import merge_states, softmax_attention

Attention = Callable[[Tensor, Tensor, Tensor, Any, float | None], tuple[Tensor, Tensor]]
"""As `softmax_attention`: output and log-sum-exp, from query, key, value, a mask of its own kind, and a scale."""


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any = None,
    scale: float | None = None,
    attention: Attention = softmax_attention,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and log-sum-exp [B, H, Q] over keys and values that exist once, [1, G, P, D].

    The queries of the whole batch become one sample's, so that the prefix is read once. `mask` is bool [B, 1, Q, P], or
    what `attention` takes for one sample of B Q queries.
    """
    split = (query.shape[0], query.shape[2])
    together = query.transpose(0, 1).flatten(1, 2)[None]  # [1, H, B Q, D]
    opened = mask.transpose(0, 1).flatten(1, 2)[None] if isinstance(mask, Tensor) else mask
    out, lse = attention(together, key, value, opened, scale)
    return out[0].unflatten(1, split).transpose(0, 1), lse[0].unflatten(1, split).transpose(0, 1)


def relay_attention(
    query: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    mask: Any = None,
    scale: float | None = None,
    prefix_mask: Any = None,
    attention: Attention = softmax_attention,
) -> tuple[Tensor, Tensor]:
    """Attention over [prefix, own]: output [B, H, Q, D] and log-sum-exp [B, H, Q].

    Args:
        query: [B, H, Q, D].
        prefix: keys and values [1, G, P, D].
        own: keys and values [B, G, U, D].
        mask: bool, broadcast to [B, H, Q, U]: what a query may see of its own sample; None is all.
        scale: D ** -0.5 if None.
        prefix_mask: bool [B, 1, Q, P]: what a query may see of the prefix; None is all.
        attention: what runs on each part; one that takes other masks is given such.
    """
    shared = prefix_attention(query, *prefix, prefix_mask, scale, attention)
    return merge_states(*shared, *attention(query, *own, mask, scale))
