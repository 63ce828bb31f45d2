"""Perceiver resampler: a fixed number of learned latents reads any number of patches.

Source: "Flamingo: a Visual Language Model for Few-Shot Learning", arXiv 2204.14198, section 3.1.1, in the form of
open_flamingo that AKI uses (without time embeddings; the projection at the end is AKI's).

Shape legend: N media, P patches, M latents, D feature size, E inner size of attention, W output size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Latents attend to the patches and to themselves; no biases, no mask."""

    def __init__(self, dim: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        """[N, M, D] from patches [N, P, D] and latents [N, M, D]."""
        attended = F.scaled_dot_product_attention(*self.heads_of(patches, latents))
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def heads_of(self, patches: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head; keys and values are the patches, then the latents."""
        patches, latents = self.norm_media(patches), self.norm_latents(latents)
        query = self.to_q(latents)
        key, value = self.to_kv(torch.cat([patches, latents], 1)).chunk(2, -1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        return query, key, value


def feed_forward(dim: int, mult: int = 4) -> nn.Sequential:
    """LayerNorm, Linear, exact GELU, Linear; no biases in the linear layers."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, mult * dim, bias=False),
        nn.GELU(),
        nn.Linear(mult * dim, dim, bias=False),
    )


class PerceiverResampler(nn.Module):
    """`num_latents` tokens of width `dim_inner` for each medium.

    Args:
        dim: D, width of the patch features.
        dim_inner: W, width of the output.
        num_latents: M.
        depth, dim_head, heads, ff_mult: of the layers.
    """

    def __init__(
        self,
        dim: int,
        dim_inner: int,
        num_latents: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), feed_forward(dim, ff_mult)]) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, dim_inner)

    def forward(self, patches: Tensor) -> Tensor:
        """[N, M, W] from patches [N, P, D]; the patches of several frames of one medium come flattened."""
        latents = self.latents.to(patches.dtype).expand(len(patches), -1, -1)
        for attention, feed in self.layers:
            latents = latents + attention(patches, latents)
            latents = latents + feed(latents)
        return self.projection(self.norm(latents))

    @torch.no_grad()
    def patch_weights(self, patches: Tensor) -> Tensor:
        """[N, M, P]: how much each latent takes from each patch in the last layer, mean over heads; rows sum to 1."""
        latents = self.latents.to(patches.dtype).expand(len(patches), -1, -1)
        for attention, feed in self.layers:
            query, key, _ = attention.heads_of(patches, latents)
            latents = latents + attention(patches, latents)
            latents = latents + feed(latents)
        scores = query @ key[:, :, : patches.shape[1]].mT * query.shape[-1] ** -0.5
        return scores.float().softmax(-1).mean(1)
