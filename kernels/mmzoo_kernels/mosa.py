"""Mixture of Sparse Attention (MoSA): every head chooses the tokens it attends among.

A head's choice looks at the whole sequence, so a token's output depends on later tokens, and decoding with a cache
cannot repeat what was trained. Source: arXiv 2505.00315; parameters are named as in the authors' checkpoints.

Shape legend: B batch, T tokens, C hidden size, H heads, K chosen tokens, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmzoo_kernels.softmax import softmax_attention


class PerHead(nn.Module):
    """A matrix a head: [B, H, K, out] from [B, H, K, in]."""

    def __init__(self, heads: int, wide_in: int, wide_out: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(heads, wide_in, wide_out) * wide_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W


class MoSA(nn.Module):
    """Sparse heads: [B, T, C] from [B, T, C].

    Args:
        hidden: C.
        head_dim: D.
        heads: H.
        sparsity: one token in so many is chosen, at least two.
        include_first: the first token is always chosen.
        rotate_fraction: share of the head dims that rotate, at the chosen tokens' own places.
    """

    def __init__(
        self,
        hidden: int,
        head_dim: int,
        heads: int,
        sparsity: int,
        *,
        include_first: bool = False,
        rotate_fraction: float = 0.5,
    ):
        super().__init__()
        self.sparsity, self.include_first, self.rotated = sparsity, include_first, _even(head_dim * rotate_fraction)
        self.r = nn.Sequential(nn.Linear(hidden, heads, bias=False), nn.Sigmoid())
        self.QKV, self.O = PerHead(heads, hidden, 3 * head_dim), PerHead(heads, head_dim, hidden)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and places [B, H, K] of the chosen tokens, highest score first."""
        scores, tokens = self.r(x).mT, x.shape[1]
        chosen = max(2, min(tokens // self.sparsity, tokens))
        if not self.include_first:
            return scores.topk(chosen, -1)
        best = scores[..., 1:].topk(chosen - 1, -1)
        return torch.cat([scores[..., :1], best.values], -1), F.pad(best.indices + 1, (1, 0))

    def forward(self, x: Tensor) -> Tensor:
        scores, places = self.route(x)
        tokens = x[:, None].expand(-1, scores.shape[1], -1, -1)
        wide = places[..., None].expand(-1, -1, -1, x.shape[-1])
        query, key, value = self.QKV(tokens.gather(2, wide)).chunk(3, -1)
        mask = places[..., :, None] >= places[..., None, :]
        query, key = (rotate(part, places, self.rotated) for part in (query, key))
        out = self.O(softmax_attention(query, key, value, mask)[0] * scores[..., None])
        return torch.zeros_like(tokens).scatter_add(2, wide, out).sum(1)


class DenseHeads(nn.Module):
    """Ordinary causal heads with the same rotation: [B, T, C] from [B, T, C]."""

    def __init__(self, hidden: int, head_dim: int, heads: int, rotate_fraction: float = 0.5):
        super().__init__()
        self.head_dim, self.rotated = head_dim, _even(head_dim * rotate_fraction)
        self.W_QKV = nn.Linear(hidden, 3 * heads * head_dim, bias=False)
        self.W_O = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.W_QKV(x).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2).chunk(3, -1)
        places = torch.arange(x.shape[1], device=x.device)
        query, key = (rotate(part, places, self.rotated) for part in (query, key))
        out, _ = softmax_attention(query, key, value, places[:, None] >= places)
        return self.W_O(out.transpose(1, 2).flatten(2))


class HybridMoSA(nn.Module):
    """Sparse heads beside dense ones, added up: [B, T, C] from [B, T, C]."""

    def __init__(self, sparse: MoSA, dense: DenseHeads):
        super().__init__()
        self.mosa_heads, self.other_heads = sparse, dense

    def forward(self, x: Tensor) -> Tensor:
        return self.mosa_heads(x) + self.other_heads(x)


def rotate(x: Tensor, places: Tensor, dims: int, base: float = 10000.0) -> Tensor:
    """Rotary embedding of the first `dims` dims, halves against each other; places are broadcast to x's [..., T]."""
    frequencies = base ** (-torch.arange(0, dims, 2, device=x.device, dtype=x.dtype) / dims)
    angles = places[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    one, other = x[..., :dims].chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin, x[..., dims:]], -1)


def _even(size: float) -> int:
    return int(size) // 2 * 2
