"""Causal attention over frames for video diffusion: ViD-GPT, LongLive, scale-causal tokenisers.

Sources: "ViD-GPT: Introducing GPT-style Autoregressive Generation in Video Diffusion Models", arXiv 2406.10981;
"LongLive: Real-time Interactive Long Video Generation", arXiv 2509.22622; HieraTok for scales.
Temporal attention is axial: its layout has one token a frame, broadcast over spatial positions.
"""

from functools import cache

from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.layout import TokenLayout
from mmzoo.masks.rule import (
    Class,
    Relation,
    Rule,
    Value,
    answer,
    everything,
    frame,
    itself,
    not_after,
    prompt,
    same,
    see,
    segment,
)


def causal_temporal() -> Rule:
    """A frame sees itself and earlier frames (ViD-GPT)."""
    return Rule("causal-temporal", (see(everything, everything, not_after(frame)),))


@cache
def block(num_frames: int, *, first_frame_alone: bool = False, offset: int = 0) -> Value:
    """The number of a frame's block of `num_frames` frames."""
    first = int(first_frame_alone)

    def of(x: TokenLayout) -> Tensor:
        number = (x.frame - first).div(num_frames, rounding_mode="floor") + first
        return number.clamp(min=0) + offset

    name = f"block of {num_frames}" + (", first alone" if first else "")
    return Value(name if not offset else f"{name} {offset:+d}", of)


@cache
def last_of_block(num_frames: int, *, first_frame_alone: bool = False) -> Value:
    """The last frame of a full block: not cut where the clip's own last block is shorter."""
    number, first = block(num_frames, first_frame_alone=first_frame_alone), int(first_frame_alone)
    return Value(f"last frame of the {number}", lambda x: (number.of(x) + 1 - first) * num_frames - 1 + first)


@cache
def sink(num_frames: int) -> Class:
    """The first frames, which stay visible."""
    return Class(f"first {num_frames} frames", lambda x: x.valid & (x.frame < num_frames))


def block_causal(frames_per_block: int = 1, *, window: int | None = None, first_frame_alone: bool = False) -> Rule:
    """A frame sees its own block and earlier blocks, at most `window` frames counted from its block's end (LongLive).

    Args:
        frames_per_block: frames that see each other.
        window: how many frames back from the block's end, the block included; None is all.
        first_frame_alone: the first frame is a block of its own (image to video).
    """
    end = last_of_block(frames_per_block, first_frame_alone=first_frame_alone)
    past = not_after(end, frame, window=window)
    return Rule("block-causal", (see(everything, everything, past), see(everything, everything, itself)))


def sink_window(window: int = 12, sink_frames: int = 3, frames_per_block: int = 3) -> Rule:
    """Block causal with a window that always keeps the first frames in view (LongLive's cache, by default its sizes).

    Args:
        window: how many frames a block sees in all, the sink and itself included.
        sink_frames: how many first frames stay visible.
        frames_per_block: frames that are generated together and see each other.

    Raises:
        InputError: the window is no larger than the sink.
    """
    if window <= sink_frames:
        raise InputError(f"A window of {window} frames must be larger than its sink of {sink_frames}.")
    end = last_of_block(frames_per_block)
    return Rule(
        "sink-window",
        (
            see(everything, sink(sink_frames), not_after(end, frame)),
            see(everything, everything, not_after(end, frame, window=window - sink_frames)),
            see(everything, everything, same(block(frames_per_block))),
        ),
    )


def teacher_forcing(frames_per_block: int = 1) -> Rule:
    """Clean frames (role PROMPT) are block causal; noisy ones (role ANSWER) see earlier clean blocks and their own."""
    number, previous = block(frames_per_block), block(frames_per_block, offset=-1)
    return Rule(
        "teacher-forcing",
        (
            see(prompt, prompt, not_after(number)),
            see(answer, prompt, Relation("not after", previous, number)),
            see(answer, answer, same(number)),
            see(everything, everything, itself),
        ),
    )


def scale_causal() -> Rule:
    """A token of one segment sees its own and earlier segments whole: scales of HieraTok, decoding steps of ARPG."""
    return Rule("scale-causal", (see(everything, everything, not_after(segment)),))
