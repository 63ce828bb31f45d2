"""Rules as calls of variable-length flash attention.

A flash kernel knows three masks for a run of queries over a run of keys: everything, causal, and a causal window. A
rule can be said with these if, once the keys are sorted, every query sees one run of them. Queries that see the same
keys, or one key more than the query before, then share a call. Runs that overlap repeat their keys: frames over their
whole past cost as many keys as there are open (frame, key) pairs.

Shape legend: B batch, Q queries, K keys, R runs, N queries of a call, M keys of a call, H heads, G key/value heads,
D head dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmzoo.errors import UnsupportedMask
from mmzoo_kernels.masks import OUTSIDE, PADDING, CompactMask

SAME, GROWING, MOVING = 0, 1, 2
"""How the keys of a query follow from those of the query before it in its run."""

ROWS = 1024
"""Queries that are looked at together, which bounds the memory of making calls to ROWS * K."""


@dataclass(frozen=True)
class Call:
    """One call of a flash kernel.

    Attributes:
        queries: int64 [N]: places in the flattened [B * Q] queries.
        keys: int64 [M]: places in the flattened [B * K] keys; runs that overlap repeat theirs.
        query_starts, key_starts: int32 [R + 1].
        longest_query, longest_key: of all runs.
        window: what a query sees: (-1, -1) the run's keys, (-1, 0) those up to the diagonal that ends in the last query
            and key, (w, 0) its diagonal key and the w before it.
    """

    queries: Tensor
    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    window: tuple[int, int]


def calls(mask: CompactMask, name: str) -> tuple[Call, ...]:
    """The calls that together are a mask.

    Args:
        mask: of any queries over any keys.
        name: of the rule, for the error.

    Raises:
        UnsupportedMask: a query sees keys that no order of this kind makes one run.
    """
    order = _sorted_keys(mask)
    first, last, count = _seen(mask, order)
    if bool((count > 0).logical_and(count != last - first + 1).any()):
        raise UnsupportedMask("flash", name, "a query sees keys that do not form one run", ("sdpa", "eager"))
    batch, place = (count > 0).nonzero(as_tuple=True)
    if len(batch) == 0:
        return ()
    first, last = first[batch, place], last[batch, place]
    rank = torch.arange(len(batch), device=batch.device)
    for by in (first, last, batch):  # the last sort decides
        rank = rank[by[rank].sort(stable=True).indices]
    batch, place, first, last = batch[rank], place[rank], first[rank], last[rank]
    kind, width, start = _runs(batch, first, last)
    made = []
    for wanted in torch.stack([kind, width], -1).unique(dim=0).tolist():
        chosen = ((kind == wanted[0]) & (width == wanted[1])).nonzero()[:, 0]
        made.append(_call(wanted, chosen, start, batch, place, first, last, order, mask.query_sample.shape[1]))
    return tuple(made)


def _sorted_keys(mask: CompactMask) -> Tensor:
    """int64 [B, K]: by sample; inside one by value if the rule has a single term, else as they stand."""
    concerned = (mask.value != OUTSIDE).any(-1) & (mask.key_sample != PADDING)
    order = torch.arange(mask.key_sample.shape[1], device=mask.value.device).expand_as(mask.key_sample)
    for by in ([mask.value[..., 0]] if mask.value.shape[-1] == 1 else []) + [mask.key_sample, (~concerned).int()]:
        order = order.gather(1, by.gather(1, order).sort(stable=True).indices)
    return order


def _seen(mask: CompactMask, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last rank [B, Q] of the sorted keys that a query sees, and how many it sees."""
    found = []
    for rows in range(0, mask.query_sample.shape[1], ROWS):
        open_pairs = mask.rows(slice(rows, rows + ROWS)).dense()
        opened = open_pairs.gather(2, order[:, None].expand_as(open_pairs)).to(torch.int8)
        last = opened.shape[-1] - 1 - opened.flip(-1).argmax(-1)
        found.append((opened.argmax(-1), last, opened.sum(-1, dtype=torch.int64)))
    first, last, count = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return first, last, count


def _runs(batch: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Kind [R], width of a moving window [R] (else 0), and where runs start [R + 1], of queries in sorted order."""
    together, more_last, more_first = batch.diff() == 0, last.diff(), first.diff()
    link = torch.full_like(more_last, -1)
    link[together & (more_last == 0) & (more_first == 0)] = SAME
    link[together & (more_last == 1) & (more_first == 0)] = GROWING
    link[together & (more_last == 1) & (more_first == 1)] = MOVING
    # Query i + 1 opens a run if nothing links it to query i, or if that link is another kind than the one before.
    breaks = link < 0
    breaks[1:] |= (link[1:] != link[:-1]) & (link[:-1] >= 0)
    opens = torch.cat([breaks.new_ones(1), breaks])
    start = torch.cat([opens.nonzero()[:, 0], opens.new_full((1,), len(opens), dtype=torch.int64)])
    alone = start.diff() == 1
    padded = torch.cat([link, link.new_zeros(1)])
    kind = torch.where(alone, SAME, padded[start[:-1]])
    width = torch.where(kind == MOVING, (last - first + 1)[start[:-1]], 0)
    return kind, width, start


def _call(
    kind_and_width: list[int],
    runs: Tensor,
    start: Tensor,
    batch: Tensor,
    place: Tensor,
    first: Tensor,
    last: Tensor,
    order: Tensor,
    num_queries: int,
) -> Call:
    lengths = start.diff()[runs]
    query = _ranges(start[runs], lengths)
    lowest, highest = first[start[runs]], last[start[runs + 1] - 1]
    key_lengths = highest - lowest + 1
    owner = batch[start[runs]].repeat_interleave(key_lengths)
    kind, width = kind_and_width
    return Call(
        queries=batch[query] * num_queries + place[query],
        keys=owner * order.shape[1] + order[owner, _ranges(lowest, key_lengths)],
        query_starts=_starts(lengths),
        key_starts=_starts(key_lengths),
        longest_query=int(lengths.max()),
        longest_key=int(key_lengths.max()),
        window={SAME: (-1, -1), GROWING: (-1, 0), MOVING: (width - 1, 0)}[kind],
    )


def _ranges(start: Tensor, lengths: Tensor) -> Tensor:
    """start[0], start[0] + 1, ... (lengths[0] of them), start[1], ..."""
    ends = lengths.cumsum(0)
    within = torch.arange(int(ends[-1]), device=start.device) - (ends - lengths).repeat_interleave(lengths)
    return start.repeat_interleave(lengths) + within


def _starts(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def opened(made: tuple[Call, ...], shape: Sequence[int]) -> Tensor:
    """bool [B, Q, K]: the pairs that calls open, from their definition; for comparing with the dense mask."""
    b, q, k = shape
    pairs = torch.zeros(b * q, b * k, dtype=torch.bool)
    for call in made:
        for query, key in zip(*(_split(call.queries, call.query_starts), _split(call.keys, call.key_starts))):
            diagonal = torch.arange(len(query))[:, None] + len(key) - len(query)
            column = torch.arange(len(key))
            inside = torch.ones(len(query), len(key), dtype=torch.bool)
            if call.window[1] == 0:
                inside &= column <= diagonal
            if call.window[0] >= 0:
                inside &= column >= diagonal - call.window[0]
            pairs[query[:, None], key] = inside
    return torch.stack([pairs[i * q : (i + 1) * q, i * k : (i + 1) * k] for i in range(b)])


def _split(flat: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    return flat.cpu().tensor_split(starts[1:-1].long().cpu())


Kernel = Callable[[Tensor, Tensor, Tensor, Call, float], Tensor]
"""Output [N, H, D] of a call, from its queries [N, H, D] and its keys and values [M, G, D]."""


def attend_by_calls(
    query: Tensor, key: Tensor, value: Tensor, made: tuple[Call, ...], scale: float, kernel: Kernel
) -> Tensor:
    """[B, H, Q, D] from query [B, H, Q, D], key and value [B, G, K, D]; a query without an open key gives 0."""
    rows, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = torch.zeros_like(rows)
    for call in made:
        result = kernel(rows[call.queries], keys[call.keys], values[call.keys], call, scale)
        output = output.index_put((call.queries,), result)
    return output.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def torch_varlen(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> Tensor:
    """The flash kernel that comes with torch."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if _takes_grouped_heads():
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    output = varlen_attn(query, key, value, *_lengths(call), scale=scale, window_size=call.window, **options)
    assert isinstance(output, Tensor)  # the log-sum-exp comes along only on request
    return output


@cache
def _takes_grouped_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_attn_2(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> Tensor:
    """The package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, key, value, *_lengths(call), softmax_scale=scale, **_mask(call))


def flash_attn_3(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> Tensor:
    """FlashAttention 3, built from flash-attn's `hopper` folder. Some versions return the log-sum-exp too."""
    from flash_attn_interface import flash_attn_varlen_func

    output = flash_attn_varlen_func(query, key, value, *_lengths(call), softmax_scale=scale, **_mask(call))
    return output[0] if isinstance(output, tuple) else output


def _lengths(call: Call) -> tuple[Tensor, Tensor, int, int]:
    return call.query_starts, call.key_starts, call.longest_query, call.longest_key


def _mask(call: Call) -> dict[str, Any]:
    return {"causal": call.window[1] == 0, "window_size": (call.window[0], call.window[1])}
