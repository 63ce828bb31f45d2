"""A mask from a few integers a token.

A mask is described by T intervals a query and T values a key: query q may look at key k when they are of the same
sample and, for any t, `lower[q, t] <= value[k, t] <= upper[q, t]`. Everything that a backend wants (dense masks here;
tiles, block masks) is derived from these arrays, and nothing in them is a Python constant of the layout.

Shape legend: B batch, Q queries, K keys, T terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
