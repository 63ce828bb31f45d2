"""Lightning Attention-2: causal linear attention with one exponential decay a head, without softmax or normaliser.

    out[t] = sum over j <= t of exp(-slope (t - j)) (q[t] . k[j]) v[j]

Source: arXiv 2401.04658.

Shape legend: B batch, H heads, N tokens, D head dim, E value dim.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

FLA_CHUNK = 64


def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, in O(N (chunk D + D E)): output [B, H, N, E] and the state after the last token [B, H, D, E].

    Args:
        query, key: [B, H, N, D].
        value: [B, H, N, E].
        slopes: [H], rates of decay >= 0. There is no scale: multiply `query` beforehand.
        state: of the tokens before these; None is the beginning.
        chunk: tokens worked on at once.
        backend: "torch", or "fla", the Triton kernels of flash-linear-attention. Those need a GPU, take float16,
            bfloat16 and float32, return a state in float32, and multiply in TF32 where the inputs are float32.

    Raises:
        ValueError: an unknown backend, or what fla does not take.
        ImportError: fla is not installed.
    """
    if backend == "fla":
        _check_fla(query, chunk)
        return _by_fla(query, key, value, slopes, state)
    if backend != "torch":
        raise ValueError(f"Unknown backend {backend!r}. Known: torch, fla.")
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


def _check_fla(query: Tensor, chunk: int) -> None:
    if importlib.util.find_spec("fla") is None:
        raise ImportError(
            "backend='fla' needs the package 'flash-linear-attention'. Install it with: pip install 'mmzoo[linear]'"
        )
    from triton import knobs

    if query.device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(f"backend='fla' needs a GPU, and the tensors are on {query.device}. Use backend='torch'.")
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"backend='fla' takes float16, bfloat16 and float32, not {query.dtype}.")
    if chunk != FLA_CHUNK:
        raise ValueError(f"backend='fla' works on chunks of {FLA_CHUNK} tokens, not {chunk}.")


def _by_fla(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    rows = (x.transpose(1, 2) for x in (query, key, value))
    decay = -slopes.float()
    out, last = chunk_simple_gla(*rows, g_gamma=decay, scale=1.0, initial_state=state, output_final_state=True)
    return out.transpose(1, 2), last


def naive_lightning_attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The definition, with its N x N matrix: [B, H, N, E]."""
    return (query @ key.mT * decay_matrix(slopes, query.shape[2])) @ value


def decay_matrix(slopes: Tensor, tokens: int) -> Tensor:
    """exp(-slope (t - j)) for j <= t and 0 for later ones: [H, N, N]."""
    places = torch.arange(tokens, device=slopes.device)
    distance = places[:, None] - places
    return (-slopes[:, None, None] * distance.clamp(min=0)).exp().masked_fill(distance < 0, 0)
