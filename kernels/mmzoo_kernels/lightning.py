"""Lightning Attention-2: causal linear attention with one exponential decay a head, without softmax or normaliser.

    out[t] = sum over j <= t of exp(-slope (t - j)) (q[t] . k[j]) v[j]

Source: arXiv 2401.04658.

Shape legend: B batch, H heads, N tokens, D head dim, E value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, in O(N (chunk D + D E)): output [B, H, N, E] and the state after the last token [B, H, D, E].

    Args:
        query, key: [B, H, N, D].
        value: [B, H, N, E].
        slopes: [H], rates of decay >= 0. There is no scale: multiply `query` beforehand.
        state: of the tokens before these; None is the beginning.
        chunk: tokens worked on at once.
    """
    if state is None:
        state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    outputs = [value[:, :, :0]]
    for q, k, v in zip(query.split(chunk, 2), key.split(chunk, 2), value.split(chunk, 2), strict=True):
        steps = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=slopes.dtype)
        since_start = (-slopes[:, None] * steps).exp()[..., None]  # [H, chunk, 1]
        to_end = (-slopes[:, None] * (len(steps) - steps)).exp()[..., None]
        outputs.append((q @ k.mT * decay_matrix(slopes, len(steps))) @ v + (q * since_start) @ state)
        state = (-slopes * len(steps)).exp()[:, None, None] * state + (k * to_end).mT @ v
    return torch.cat(outputs, 2), state


def naive_lightning_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The definition, with its N x N matrix: [B, H, N, E]."""
    return (query @ key.mT * decay_matrix(slopes, query.shape[2])) @ value


def decay_matrix(slopes: Tensor, tokens: int) -> Tensor:
    """exp(-slope (t - j)) for j <= t and 0 for later ones: [H, N, N]."""
    places = torch.arange(tokens, device=slopes.device)
    distance = places[:, None] - places
    return (-slopes[:, None, None] * distance.clamp(min=0)).exp().masked_fill(distance < 0, 0)
