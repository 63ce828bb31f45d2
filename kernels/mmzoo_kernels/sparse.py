"""Sparse causal attention by dropped queries and keys, and by hash buckets, as compact masks a head.

Heads are folded into the batch, so that whatever runs a `CompactMask` runs them. Sorted by what is kept, or by bucket,
the open pairs lie in few tiles. Source: arXiv 2306.01160.

Shape legend: B batch, H heads, N tokens, D head dim, M = B H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmzoo_kernels.masks import LOWEST, PADDING, CompactMask
from mmzoo_kernels.softmax import softmax_attention

Attention = Callable[[Tensor, Tensor, Tensor, CompactMask], Tensor]
"""Attention under a compact mask: [M, 1, N, D] from query, key and value [M, 1, N, D]."""


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: CompactMask) -> Tensor:
    """The naive one, with the mask as a matrix."""
    return softmax_attention(query, key, value, mask.dense()[:, None])[0]


def drop_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep_query: Tensor,
    keep_key: Tensor,
    attention: Attention = dense_attention,
) -> Tensor:
    """Causal attention [B, H, N, D] of the kept queries over the kept keys; a dropped query gives 0.

    Args:
        query, key, value: [B, H, N, D]. The authors' model L2-normalises its keys beforehand.
        keep_query, keep_key: bool [B, H, N].
        attention: runs the mask.
    """
    groups = (torch.where(keep, 0, PADDING).flatten(0, 1) for keep in (keep_query, keep_key))
    return _within_groups(query, key, value, *groups, 0, attention)


def hash_attention(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, attention: Attention = dense_attention
) -> Tensor:
    """Attention [B, H, N, D] to strictly earlier keys of the query's bucket; a query without one gives 0.

    Args:
        query, key, value: [B, H, N, D]. The authors' model uses the L2-normalised queries as keys.
        projection: [1, H or 1, D, buckets / 2], see `hash_buckets`.
        attention: runs the mask.
    """
    groups = (hash_buckets(x, projection).flatten(0, 1) for x in (query, key))
    return _within_groups(query, key, value, *groups, 1, attention)


def hash_buckets(tokens: Tensor, projection: Tensor) -> Tensor:
    """int32 [B, H, N]: the column of [x R, -x R] that is largest, for tokens [B, H, N, D]."""
    scores = tokens @ projection
    return torch.cat([scores, -scores], -1).argmax(-1).to(torch.int32)


def group_mask(query_group: Tensor, key_group: Tensor, distance: int) -> CompactMask:
    """A query sees the keys of its group that are at least `distance` tokens earlier.

    Args:
        query_group, key_group: [M, N]; -1 is dropped.
        distance: 0 lets a token see itself.
    """
    places = torch.arange(query_group.shape[1], device=query_group.device, dtype=torch.int32)
    places = places.expand(query_group.shape)[..., None]
    groups = (query_group.to(torch.int32), key_group.to(torch.int32))
    return CompactMask(*groups, torch.full_like(places, LOWEST), places - distance, places)


def _within_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_group: Tensor,
    key_group: Tensor,
    distance: int,
    attention: Attention,
) -> Tensor:
    mask = group_mask(query_group, key_group, distance)
    query_order, key_order = (group.argsort(dim=-1, descending=True, stable=True) for group in (query_group, key_group))
    mask = CompactMask(
        mask.query_sample.gather(1, query_order),
        mask.key_sample.gather(1, key_order),
        *(x.gather(1, query_order[..., None]) for x in (mask.lower, mask.upper)),
        mask.value.gather(1, key_order[..., None]),
    )
    rows = query_order[:, None, :, None]
    out = attention(*(_taken(x, order) for x, order in ((query, rows), (key, key_order), (value, key_order))), mask)
    return torch.zeros_like(out).scatter(2, rows.expand_as(out), out).unflatten(0, query.shape[:2])[:, :, 0]


def _taken(tokens: Tensor, order: Tensor) -> Tensor:
    """[M, 1, N, D] from tokens [B, H, N, D]."""
    return tokens.flatten(0, 1)[:, None].take_along_dim(order.view(order.shape[0], 1, -1, 1), 2)
