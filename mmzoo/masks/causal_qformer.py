"""Frame masks of the causal Q-Former of FAVOR and video-SALMONN.

Sources: "Fine-grained Audio-Visual Joint Representations for Multimodal Large Language Models", arXiv 2310.05863;
"video-SALMONN: Speech-Enhanced Audio-Visual Large Language Models", arXiv 2406.15704. The papers let a frame see its
predecessors; the authors' code, and so their weights, let it see its successors.
"""

from typing import Literal, get_args

from mmzoo.errors import InputError
from mmzoo.masks.basic import bidirectional
from mmzoo.masks.rule import Class, Rule, Value, always, everything, frame, not_after, see

Direction = Literal["future", "past"]

backwards = Value("-frame", lambda x: -x.frame)
real = Class("real frames", lambda x: x.valid & (x.frame >= 0))


def causal_qformer(direction: Direction = "future", mask_padding: bool = False) -> Rule:
    """All tokens of a frame see their frame and those on one side of it, inside one window.

    Args:
        direction: "future", which the authors' weights need, or "past", as the papers have it.
        mask_padding: close the frames that fill up a window (frame -1 in the layout). The authors leave them open.

    Raises:
        InputError: an unknown direction.
    """
    if direction not in get_args(Direction):
        raise InputError(f"The direction of a causal Q-Former is 'future' or 'past', not {direction!r}.")
    order = not_after(backwards if direction == "future" else frame)
    return Rule("causal-qformer", (see(everything, real if mask_padding else everything, order),))


def window_queries() -> Rule:
    """The queries of a window see its real frames (frame -1 only fills it up); with none, they take the mean of all."""
    return Rule("window-queries", (see(everything, real, always),), empty="uniform", fallback=bidirectional())
