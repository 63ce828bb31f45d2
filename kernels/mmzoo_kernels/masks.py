"""A mask from a few integers a token.

A mask is described by T intervals a query and T values a key: query q may look at key k when they are of the same
sample and, for any t, `lower[q, t] <= value[k, t] <= upper[q, t]`. Everything that a backend wants (dense masks here;
tiles, block masks) is derived from these arrays, and nothing in them is a Python constant of the layout.

Shape legend: B batch, Q queries, K keys, T terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

PADDING = -1
LOWEST, HIGHEST = -(2**31) + 1, 2**31 - 1
OUTSIDE = -(2**31)
"""The value of a key that a term does not concern: below every interval."""


@dataclass(frozen=True)
class CompactMask:
    """The compact arrays, all int32.

    Attributes:
        query_sample: [B, Q]; -1 is padding.
        key_sample: [B, K]; -1 is padding.
        lower, upper: [B, Q, T]; an interval with lower > upper is empty.
        value: [B, K, T].
    """

    query_sample: Tensor
    key_sample: Tensor
    lower: Tensor
    upper: Tensor
    value: Tensor

    def rows(self, queries: slice) -> CompactMask:
        """The mask of some of the queries over all keys."""
        return CompactMask(
            self.query_sample[:, queries], self.key_sample, self.lower[:, queries], self.upper[:, queries], self.value
        )

    def columns(self, keys: slice) -> CompactMask:
        """The mask of all queries over some of the keys."""
        return CompactMask(self.query_sample, self.key_sample[:, keys], self.lower, self.upper, self.value[:, keys])

    def dense(self) -> Tensor:
        """bool [B, Q, K], True = may attend."""
        b, q, k = *self.query_sample.shape, self.key_sample.shape[1]
        allowed = torch.zeros(b, q, k, dtype=torch.bool, device=self.value.device)
        for t in range(self.value.shape[-1]):
            value = self.value[:, None, :, t]
            allowed |= (self.lower[:, :, None, t] <= value) & (value <= self.upper[:, :, None, t])
        return allowed & self.same_sample()

    def same_sample(self) -> Tensor:
        """bool [B, Q, K]: both tokens belong to the same sample, and neither is padding."""
        keys = self.key_sample[:, None]
        return (self.query_sample[:, :, None] == keys) & (keys != PADDING)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same as a FlexAttention `mask_mod(batch, head, query, key)`: plain indexed reads."""

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            opened = torch.zeros_like(q, dtype=torch.bool)
            for t in range(self.value.shape[-1]):
                value = self.value[b, k, t]
                opened = opened | ((self.lower[b, q, t] <= value) & (value <= self.upper[b, q, t]))
            sample = self.key_sample[b, k]
            return opened & (self.query_sample[b, q] == sample) & (sample != PADDING)

        return allowed

    def padded(self, size: int) -> CompactMask:
        """Both axes padded on the right to a multiple of `size`."""
        pad_q, pad_k = -self.query_sample.shape[1] % size, -self.key_sample.shape[1] % size
        return CompactMask(
            F.pad(self.query_sample, (0, pad_q), value=PADDING),
            F.pad(self.key_sample, (0, pad_k), value=PADDING),
            F.pad(self.lower, (0, 0, 0, pad_q), value=HIGHEST),
            F.pad(self.upper, (0, 0, 0, pad_q), value=LOWEST),
            F.pad(self.value, (0, 0, 0, pad_k), value=OUTSIDE),
        )

    def with_terms(self, terms: int) -> CompactMask:
        """The same mask with `terms` terms, the further ones of which open nothing."""
        more = (0, terms - self.value.shape[-1])
        return CompactMask(
            self.query_sample,
            self.key_sample,
            F.pad(self.lower, more, value=HIGHEST),
            F.pad(self.upper, more, value=LOWEST),
            F.pad(self.value, more, value=OUTSIDE),
        )

    def tiles(self, size: int = 128) -> Tiles:
        """Tiles from bounds of each tile alone: O(L + (L / size)^2) time and O(L) memory besides the result.

        A tile is visited if a term's bounds overlap and its samples may meet. It is full if one term opens all of it.
        """
        mask = self.padded(size)
        in_q, in_k = mask.query_sample != PADDING, mask.key_sample != PADDING
        low, high = mask.lower.unflatten(1, (-1, size)), mask.upper.unflatten(1, (-1, size))
        value, member = mask.value.unflatten(1, (-1, size)), (mask.value != OUTSIDE).unflatten(1, (-1, size))
        asks = (low <= high) & in_q.unflatten(1, (-1, size))[..., None]
        holds = member & in_k.unflatten(1, (-1, size))[..., None]
        reach_low, reach_high = low.masked_fill(~asks, HIGHEST).amin(2), high.masked_fill(~asks, LOWEST).amax(2)
        least, most = value.masked_fill(~holds, HIGHEST).amin(2), value.masked_fill(~holds, LOWEST).amax(2)
        all_low, all_high, all_least, all_most = low.amax(2), high.amin(2), value.amin(2), value.amax(2)
        q_first, q_last = _sample_range(mask.query_sample, asks, size)
        k_first, k_last = _sample_range(mask.key_sample, holds, size)
        whole = in_q.unflatten(1, (-1, size)).all(2)[:, :, None] & in_k.unflatten(1, (-1, size)).all(2)[:, None]
        visited, full = torch.zeros_like(whole), torch.zeros_like(whole)
        for t in range(value.shape[-1]):
            visited |= (
                _not_above(reach_low, most, t)
                & _not_below(reach_high, least, t)
                & (_not_above(q_first, k_last, t) & _not_below(q_last, k_first, t))
            )
            # One sample alone in both tiles: its first and last number agree with each other's.
            full |= (
                _not_above(all_low, all_least, t)
                & _not_below(all_high, all_most, t)
                & (_not_below(q_first, k_last, t) & _not_above(q_last, k_first, t))
            )
        return Tiles(visited, full & whole, size)

    def block_mask(self, size: int = 128) -> BlockMask:
        """FlexAttention's block mask, from `tiles` and `mask_mod`; made once a batch for all layers and heads."""
        tiles = self.tiles(size)
        partial = tiles.visited & ~tiles.full
        by_query = (*_listed(partial), *_listed(tiles.full))
        by_key = (*_listed(partial.mT), *_listed(tiles.full.mT))
        lengths = (self.query_sample.shape[1], self.key_sample.shape[1])
        return BlockMask(lengths, *by_query, *by_key, (size, size), self.padded(size).mask_mod())

    def block_sparse(self, size: int = 128, query_tiles: int = 1) -> tuple[BlockSparse, BlockSparse]:
        """The lists of flash-attn-4: by query for its forward pass, by key for its backward.

        Inside partial tiles it asks a `mask_mod` in its own language, for which `lower`, `upper` and `value` are the
        auxiliary tensors; that function is not made here.

        Args:
            size: side of a tile.
            query_tiles: tiles of queries taken together, 2 where its kernels work on two at once (Blackwell).
        """
        tiles = self.tiles(size)
        grouped = [
            F.pad(one, (0, 0, 0, -one.shape[1] % query_tiles)).unflatten(1, (-1, query_tiles))
            for one in (tiles.visited, tiles.full)
        ]
        visited, full = grouped[0].any(2), grouped[1].all(2)
        partial, side = visited & ~full, (query_tiles * size, size)
        by_query = BlockSparse(*_listed(partial), *_listed(full), block_size=side)
        return by_query, BlockSparse(*_listed(partial.mT), *_listed(full.mT), block_size=side)


class BlockSparse(NamedTuple):
    """Fields of flash-attn-4's `BlockSparseTensorsTorch` under its names, for any number of heads.

    Attributes:
        mask_block_cnt: int32 [B, 1, Q']: how many tiles of a row have to be masked.
        mask_block_idx: int32 [B, 1, Q', K']: their numbers first.
        full_block_cnt, full_block_idx: the same of tiles in which every pair is open.
        block_size: tokens of a tile of queries and of one of keys.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


@dataclass(frozen=True)
class Tiles:
    """Which tiles of the mask a kernel has to visit.

    Attributes:
        visited: bool [B, Q / size, K / size]: the tile may hold an open pair; the others hold none.
        full: bool, the same shape: every pair of the tile is open, so the mask need not be looked at.
        size: side of a tile.
    """

    visited: Tensor
    full: Tensor
    size: int


def _sample_range(sample: Tensor, member: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and last sample [B, L / size, T] of a tile's members [B, L / size, size, T]; empty if there are none."""
    tiles = sample.unflatten(1, (-1, size))[..., None]
    return torch.where(member, tiles, HIGHEST).amin(2), torch.where(member, tiles, PADDING).amax(2)


def _not_above(query: Tensor, key: Tensor, t: int) -> Tensor:
    """query <= key for each pair of tiles, from [B, Q', T] and [B, K', T]."""
    return query[:, :, None, t] <= key[:, None, :, t]


def _not_below(query: Tensor, key: Tensor, t: int) -> Tensor:
    return query[:, :, None, t] >= key[:, None, :, t]


def tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 [B, Q'] and, for each row of tiles bool [B, Q', K'], its column numbers first: int32 [B, Q', K'].

    Contiguous, since kernels look at no stride of the last axis.
    """
    columns = torch.arange(tiles.shape[-1], device=tiles.device, dtype=torch.int32)
    order = torch.where(tiles, columns, columns + tiles.shape[-1]).sort(-1).values % tiles.shape[-1]
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_lists` as FlexAttention takes them, with an axis of heads."""
    count, order = tile_lists(tiles)
    return count[:, None], order[:, None]
