"""Mixture of Contexts: a query chooses few chunks of a long video by their mean keys, beside all text and its own shot.

The stream is cut where its content changes (frames, shots, captions), so chunks differ in length. A query chooses among
earlier chunks alone, but sees its whole shot and all text: routing is causal, attention is not. Source: arXiv
2508.21058, whose training noise (chunks dropped or added at random) is left to the caller, on `route`'s result.

Shape legend: B batch, H heads, N tokens, C chunks, D head dim, S chosen (query, chunk) pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mmzoo_kernels.softmax import merge_parts, softmax_attention

TEXT = -1

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Attention within runs: outputs [T, D] and log-sum-exps [T] from queries [T, D], keys and values [T', D], and the
borders int32 [runs + 1] of the queries' and the keys' runs. Its scale is D ** -0.5."""


@dataclass(frozen=True)
class Chunks:
    """How a stream of N tokens is cut, the same for a whole batch.

    Attributes:
        lengths: int64 [C], in order; they add up to N.
        shot: int64 [C], the shot that each chunk belongs to, `TEXT` for text.
    """

    lengths: Tensor
    shot: Tensor

    def of_tokens(self) -> Tensor:
        """int64 [N]: each token's chunk."""
        return torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(self.lengths)


def route(query: Tensor, key: Tensor, chunks: Chunks, top_k: int) -> Tensor:
    """bool [B, H, N, C]: which chunks each query sees: all text, its own shot, and the `top_k` best earlier ones.

    Best is by the product with a chunk's mean key; fewer than `top_k` if there are not so many earlier ones.
    """
    chunk, count = chunks.of_tokens(), len(chunks.lengths)
    means = key.new_zeros(*key.shape[:2], count, key.shape[-1]).index_add(2, chunk, key) / chunks.lengths[:, None]
    later = torch.arange(count, device=key.device) >= chunk[:, None]
    scores = (query @ means.mT).masked_fill(later, -torch.inf)
    best = scores.topk(min(top_k, count), -1).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & ~later
    return chosen | (chunks.shot == TEXT) | (chunks.shot == chunks.shot[chunk][:, None])


def mixture_of_contexts(
    query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, chosen: Tensor, varlen: Varlen | None = None
) -> Tensor:
    """[B, H, N, D] from query, key and value [B, H, N, D]: one run of variable length a chunk, merged by log-sum-exp.

    Args:
        query, key, value: [B, H, N, D].
        chunks: see `Chunks`.
        chosen: bool [B, H, N, C], what `route` gave.
        varlen: attention within runs, `torch_varlen` on a GPU; plain torch, with gradients, if None.
    """
    pairs = chosen.flatten(0, 1).transpose(1, 2)  # [B H, C, N]: all queries of a chunk stand together
    head, _, token = pairs.nonzero(as_tuple=True)
    owner = head * query.shape[2] + token  # [S]
    queries, keys, values = (x.flatten(0, 2) for x in (query, key, value))
    key_lengths = chunks.lengths.repeat(pairs.shape[0])
    outs, lses = (varlen or naive_varlen)(
        queries[owner], keys, values, _borders(pairs.sum(-1).flatten()), _borders(key_lengths)
    )
    return merge_parts(outs, lses, owner, len(queries))[0].view_as(query)


def naive_mixture_of_contexts(query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, chosen: Tensor) -> Tensor:
    """The same by its mask [B, H, N, N]."""
    return softmax_attention(query, key, value, chosen[..., chunks.of_tokens()])[0]


def naive_varlen(
    query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor, key_borders: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention within runs, one run after the other; see `Varlen`."""
    outs, lses = [value[:0]], [query.new_zeros(0, dtype=torch.promote_types(query.dtype, torch.float32))]
    runs = zip(pairwise(query_borders.tolist()), pairwise(key_borders.tolist()), strict=True)
    for (first, last), (start, stop) in runs:
        own = (query[None, None, first:last], key[None, None, start:stop], value[None, None, start:stop])
        out, lse = softmax_attention(*own)
        outs.append(out[0, 0])
        lses.append(lse[0, 0])
    return torch.cat(outs), torch.cat(lses)


def torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, query_borders: Tensor, key_borders: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention within runs by torch's flash kernel, on a GPU and forward only; see `Varlen`.

    Raises:
        ValueError: a CPU, another precision than float16 and bfloat16, or a gradient is wanted, which would lack the
            log-sum-exp's part.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"torch_varlen takes float16 and bfloat16 on a GPU, not {query.dtype} on {query.device}.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError("torch_varlen has no backward pass: call it under torch.no_grad(), or use naive_varlen.")
    longest = [int(borders.diff().max()) for borders in (query_borders, key_borders)]
    one_head = (x[:, None] for x in (query, key, value))
    out, lse = varlen_attn(*one_head, query_borders, key_borders, *longest, return_aux=AuxRequest(lse=True))
    return out[:, 0], lse[0]


def _borders(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
