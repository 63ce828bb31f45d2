"""Causal cross-attention mask (CCAM) of Video-CCAM: the i-th query of the projector sees the first frames only.

Source: "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and Long
Videos", arXiv 2408.14023. The rounding for frame counts that do not divide the queries is not published.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.layout import PADDING, Modality, Span, TokenLayout, lay_out, video
from mmzoo.masks.rule import Rule, everything, frame, not_after, see

Rounding = Literal["ceil", "floor", "block"]


def causal_cross_attention() -> Rule:
    """A query sees the frames up to its own: `query_layout` gives each query the last frame it may see."""
    return Rule("ccam", (see(everything, everything, not_after(frame)),))


def query_layout(num_queries: int, num_frames: int, rounding: Rounding = "ceil") -> TokenLayout:
    """The layout [1, N, K] of N learned queries over T frames; `frame` is the last frame that a query sees.

    Args:
        num_queries: N.
        num_frames: T.
        rounding: which frames f query i sees. "ceil": f*N < (i+1)*T, so that the first query sees a frame and the last
            one sees all. "floor": f*N <= i*T. "block": f <= i // max(N // T, 1). All agree when T divides N.

    Raises:
        InputError: an unknown rounding, or no queries or frames.
    """
    if num_queries < 1 or num_frames < 1:
        raise InputError(f"CCAM needs at least one query and one frame, got {num_queries} and {num_frames}.")
    queries = lay_out(Span(Modality.QUERY, rows=num_queries, grid=False))
    return queries.field("frame", last_frames(num_queries, torch.tensor([num_frames]), rounding))


def last_frames(num_queries: int, num_frames: Tensor, rounding: Rounding = "ceil") -> Tensor:
    """int64 [..., N]: the last frame that each query may see of items of int64 [...] frames.

    Raises:
        InputError: an unknown rounding.
    """
    n, t = num_queries, num_frames[..., None]
    i = torch.arange(n, device=t.device)
    if rounding == "ceil":
        return ((i + 1) * t + n - 1) // n - 1
    if rounding == "floor":
        return i * t // n
    if rounding == "block":
        return torch.minimum(i // (n // t.clamp(min=1)).clamp(min=1), t - 1)
    raise InputError(f"Unknown CCAM rounding {rounding!r}. Known: {', '.join(get_args(Rounding))}.")


def item_layouts(
    num_queries: int, num_frames: Tensor, frames: int, patches: int, rounding: Rounding = "ceil"
) -> tuple[TokenLayout, TokenLayout]:
    """The layouts of rows that hold several items: each item is a sample, so that items never meet.

    Args:
        num_queries: N of each item.
        num_frames: int64 [B, M]: frames of each item; 0 where a row has fewer than M items.
        frames: F, frames of a row; those after its last item are padding.
        patches: P of a frame.
        rounding: as in `query_layout`.

    Returns:
        The queries [B, M * N, K], and the keys [B, F * P, K], frame-major.
    """
    rows, items = num_frames.shape
    device = num_frames.device
    queries = _rows_of(Span(Modality.QUERY, rows=items * num_queries, grid=False), rows, device)
    number = torch.arange(items, device=device).expand(rows, -1)
    sample = torch.where(num_frames > 0, number, PADDING).repeat_interleave(num_queries, 1)
    queries = queries.field("sample", sample).field("frame", last_frames(num_queries, num_frames, rounding).flatten(1))

    keys = _rows_of(video(frames, patches, grid=False), rows, device)
    ends = num_frames.cumsum(1)
    place = torch.arange(frames, device=device).expand(rows, -1)
    item = (place[..., None] >= ends[:, None]).sum(-1)
    frame = place - (ends - num_frames).gather(1, item.clamp(max=items - 1))
    sample = torch.where(item < items, item, PADDING)
    keys = keys.field("sample", sample.repeat_interleave(patches, 1))
    return queries, keys.field("frame", frame.repeat_interleave(patches, 1))


def _rows_of(span: Span, rows: int, device: torch.device) -> TokenLayout:
    return TokenLayout(lay_out(span).to(device).data.expand(rows, -1, -1))
