"""Causal cross-attention mask (CCAM) of Video-CCAM: the i-th query of the projector sees the first frames only.

Source: "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and Long
Videos", arXiv 2408.14023. The rounding for frame counts that do not divide the queries is not published.
"""

from typing import Literal

import torch

from mmzoo.errors import InputError
from mmzoo.layout import Modality, Span, TokenLayout, lay_out
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
    n, t = num_queries, num_frames
    if n < 1 or t < 1:
        raise InputError(f"CCAM needs at least one query and one frame, got {n} and {t}.")
    i = torch.arange(n)
    last_frame = {
        "ceil": lambda: ((i + 1) * t + n - 1) // n - 1,
        "floor": lambda: i * t // n,
        "block": lambda: (i // max(n // t, 1)).clamp(max=t - 1),
    }
    if rounding not in last_frame:
        raise InputError(f"Unknown CCAM rounding {rounding!r}. Known: {', '.join(last_frame)}.")
    queries = lay_out(Span(Modality.QUERY, rows=n, grid=False))
    return queries.field("frame", last_frame[rounding]()[None])
