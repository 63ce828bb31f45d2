"""Second-order higher-order linear attention (HLA): q reads the keys' moments, and those read what the queries wrote.

Algorithm 1 of arXiv 2510.27258, a step a token. The chunked form holds the term q[t] S C[<= t], which the paper's
figure 1(C) leaves out (S of the chunks before, C of this one). With a decay its parts do not agree with each other
either; Algorithm 1 is followed.

Shape legend: B batch, H heads, N tokens, D head dim, E value dim, F = E + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class HLAState(NamedTuple):
    """What is carried from token to token. Values carry a column of ones, whose sums are the normaliser's.

    Attributes:
        S: [B, H, D, D], the keys' second moment.
        C: [B, H, D, F], queries times values; the last column is the paper's m.
        G: [B, H, D, F], what is read too early and taken off again; the last column is the paper's h.
    """

    S: Tensor
    C: Tensor
    G: Tensor


def second_order_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float = 1.0,
    ridge: float = 0.0,
    normalize: bool = False,
    eps: float = 1e-6,
    state: HLAState | None = None,
    chunk: int = 64,
) -> tuple[Tensor, HLAState]:
    """Chunk by chunk, in O(N (chunk + D) (D + E)): output [B, H, N, E] and the state after the last token.

    Args:
        query, key: [B, H, N, D]. There is no scale.
        value: [B, H, N, E].
        gamma: decay a token; 1 is none.
        ridge: added to the diagonal of S where it is read.
        normalize: divide by the same sum over values of 1, plus `eps`.
        eps: see `normalize`.
        state: of the tokens before these; None is the beginning.
        chunk: tokens worked on at once; 1 is the recurrence.
    """
    value = F.pad(value, (0, 1), value=1.0)
    if state is None:
        d, zeros = (
            query.shape[-1],
            query.new_zeros(*query.shape[:2], query.shape[-1], query.shape[-1] + value.shape[-1]),
        )
        state = HLAState(zeros[..., :d], zeros[..., d:], zeros[..., d:])
    outputs = [value[:, :, :0]]
    for q, k, v in zip(query.split(chunk, 2), key.split(chunk, 2), value.split(chunk, 2), strict=True):
        out, state = _one_chunk(q, k, v, gamma, ridge, state)
        outputs.append(out)
    numerator, denominator = torch.cat(outputs, 2).tensor_split([-1], -1)
    return (numerator / (denominator + eps) if normalize else numerator), state


def _one_chunk(
    query: Tensor, key: Tensor, value: Tensor, gamma: float, ridge: float, state: HLAState
) -> tuple[Tensor, HLAState]:
    steps = torch.arange(1, query.shape[2] + 1, device=query.device)
    distance = steps[:, None] - steps
    decay = (gamma ** distance.clamp(min=0).to(query.dtype)).masked_fill(distance < 0, 0)
    since_start, to_end = (gamma ** places.to(query.dtype)[:, None] for places in (steps, len(steps) - steps))
    earlier = (gamma ** (distance - 1).clamp(min=0).to(query.dtype)).masked_fill(distance < 1, 0)
    scores = query @ key.mT * decay
    # k[j] C[j - 1]: what key j reads before query j has written.
    read = (key * gamma ** (steps - 1).to(query.dtype)[:, None]) @ state.C + (key @ query.mT * earlier) @ value
    looked_up = (query * since_start) @ state.S + scores @ key + ridge * query
    written = (looked_up * since_start) @ state.C + (looked_up @ query.mT * decay) @ value
    output = written - (query * since_start) @ state.G - scores @ read
    whole = gamma ** len(steps)
    return output, HLAState(
        whole * state.S + (key * to_end).mT @ key,
        whole * state.C + (query * to_end).mT @ value,
        whole * state.G + (key * to_end).mT @ read,
    )


def naive_second_order_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The masked product without decay, ((L * QK^T) (L * QK^T)^T * L) V with L lower-triangular: [B, H, N, E]."""
    scores = (query @ key.mT).tril()
    return (scores @ scores.mT).tril() @ value
