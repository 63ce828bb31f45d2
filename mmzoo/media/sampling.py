"""Which frames of a video a protocol looks at: small pure functions, one a rule.

`round` is Python's, half to even, and `int` cuts towards zero: the protocols' scores depend on both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np

from mmzoo.errors import InputError


def mvbench(
    *,
    num_total: int,
    num_frames: int,
    video_fps: float,
    bound: tuple[float, float] = (-1e5, 1e5),
    first_idx: int = 0,
    max_frame: int | None = None,
) -> list[int]:
    """MVBench's official reader: segment centres between two moments, which upstream does not hold inside the video."""
    last = num_total - 1 if max_frame is None else max_frame
    start = max(first_idx, round(bound[0] * video_fps))
    end = min(round(bound[1] * video_fps), last)
    seg = (end - start) / num_frames
    return [int(start + seg / 2 + round(seg * i)) for i in range(num_frames)]


def videochat2(*, num_total: int, num_frames: int) -> list[int]:
    """VideoChat2's free function."""
    seg = (num_total - 1) / num_frames
    return [int(seg / 2) + round(seg * i) for i in range(num_frames)]


def vlmevalkit_mp4(*, num_total: int, num_frames: int) -> list[int]:
    """VLMEvalKit's MVBench_MP4 by frame count; there is no recorded data for it."""
    seg = (num_total - 1) / num_frames
    return [int(seg / 2 + round(seg * i)) for i in range(num_frames)]


def linspace(*, num_total: int, num_frames: int) -> list[int]:
    """LLaVA and most of lmms-eval: evenly from the first frame to the last."""
    return np.linspace(0, num_total - 1, num_frames, dtype=int).tolist()


def vlmevalkit_nframe(*, num_total: int, num_frames: int) -> list[int]:
    """VLMEvalKit's base class by frame count: neither the first frame nor the last."""
    step = num_total / (num_frames + 1)
    return [int(i * step) for i in range(1, num_frames + 1)]


def vlmevalkit_fps(*, num_total: int, video_fps: float, fps: float) -> list[int]:
    """VLMEvalKit's base class by rate. A clip shorter than one step gives no frame at all."""
    step = video_fps / fps
    return [int(i * step) for i in range(int(num_total / video_fps * fps))]


def ccam_uniform(*, num_total: int, num_frames: int) -> list[int]:
    """Video-CCAM: segment centres, or every frame of a clip that has no more than `num_frames`."""
    if num_frames >= num_total:
        return list(range(num_total))
    splits = [i * num_total // num_frames for i in range(num_frames + 1)]
    return [(a + b) // 2 for a, b in zip(splits, splits[1:])]


def ccam_fps(*, num_total: int, video_fps: float, fps: float, num_frames: int | None = None) -> list[int]:
    """Video-CCAM by rate. `num_frames` is a maximum: it keeps the first ones and does not spread them."""
    indices = np.round(np.arange(0, num_total, video_fps / fps)).astype(int)
    return indices[indices < num_total][:num_frames].tolist()


def ccam_demo(*, num_total: int, num_frames: int) -> list[int]:
    """Video-CCAM's demo: segment centres, cut only after the mean of two ends; every frame of a short clip."""
    if num_frames > num_total:
        return list(range(num_total))
    ends = np.linspace(0, num_total, num_frames + 1)
    return np.floor((ends[:-1] + ends[1:]) / 2).astype(int).tolist()


def ccam_demo_fps(*, num_total: int, video_fps: float, fps: float, num_frames: int | None = None) -> list[int]:
    """Video-CCAM's demo by rate: cuts where `ccam_fps` rounds, and spreads over the clip what exceeds `num_frames`."""
    if fps >= video_fps:
        indices = list(range(num_total))
    else:
        indices = np.arange(0, num_total, video_fps / fps).astype(int).tolist()
    if num_frames is not None and len(indices) > num_frames:
        return ccam_demo(num_total=num_total, num_frames=num_frames)
    return indices


def favor(*, num_total: int, video_fps: float, num_frames: int | None = None) -> list[int]:
    """FAVOR: the first and the last frame of every second; the last second ends with the video.

    The authors take them from at most 60 seconds, which is a `num_frames` of 120.
    """
    duration = num_total / video_fps
    seconds = max(1, math.ceil(duration - 1e-6))
    seconds = seconds if num_frames is None else min(seconds, num_frames // 2)
    indices = []
    for i in range(seconds):
        start = max(0.0, min(float(i), duration - 1))
        first = min(math.ceil(start * video_fps - 1e-6), num_total - 1)
        last = min(max(first, math.ceil((start + 1) * video_fps - 1e-6) - 1), num_total - 1)
        indices += [first, last]
    return indices


def every_frame(*, num_total: int) -> list[int]:
    """All frames in order."""
    return list(range(num_total))


SAMPLING_RULES: dict[str, Callable[..., list[int]]] = {
    "mvbench": mvbench,
    "videochat2": videochat2,
    "vlmevalkit_mp4": vlmevalkit_mp4,
    "linspace": linspace,
    "vlmevalkit_nframe": vlmevalkit_nframe,
    "vlmevalkit_fps": vlmevalkit_fps,
    "ccam_uniform": ccam_uniform,
    "ccam_fps": ccam_fps,
    "ccam_demo": ccam_demo,
    "ccam_demo_fps": ccam_demo_fps,
    "favor": favor,
    "all": every_frame,
}


def sample_indices(
    rule: str,
    *,
    num_total: int,
    num_frames: int | None = None,
    video_fps: float | None = None,
    fps: float | None = None,
    bound: tuple[float, float] | None = None,
    first_idx: int | None = None,
    max_frame: int | None = None,
) -> list[int]:
    """The frame indices a protocol looks at, exactly as its authors' code gives them.

    `mvbench` does not guard its bound: indices may lie past the end or decrease. `read_video` clamps them and says so.

    Args:
        rule: a name in `SAMPLING_RULES`.
        num_total: frames the video has.
        num_frames: frames wanted; for `ccam_fps` and `ccam_demo_fps` the most that are kept.
        video_fps: the video's own frames a second. Always welcome, used by the rules that count in seconds.
        fps: frames a second wanted, for the rules by rate.
        bound: start and end in seconds (`mvbench`).
        first_idx: lowest index (`mvbench`; 1 for its frame folders, whose files count from 1). Default 0.
        max_frame: highest index (`mvbench`; the number of files for its frame folders). Default `num_total - 1`.

    Returns:
        The indices; fewer than `num_frames`, or none, where the rule says so.

    Raises:
        InputError: an unknown rule, or an argument that the rule lacks or does not use.
    """
    if rule not in SAMPLING_RULES:
        raise InputError(f"There is no sampling rule {rule!r}. The rules are: {', '.join(SAMPLING_RULES)}.")
    given: dict[str, Any] = {"num_total": num_total, "num_frames": num_frames, "video_fps": video_fps, "fps": fps}
    given |= {"bound": bound, "first_idx": first_idx, "max_frame": max_frame}
    given = {name: value for name, value in given.items() if value is not None}
    wanted = inspect.signature(SAMPLING_RULES[rule]).parameters
    missing = [name for name, one in wanted.items() if one.default is one.empty and name not in given]
    if missing:
        raise InputError(f"The sampling rule {rule!r} needs {' and '.join(missing)}.")
    unused = [name for name in given if name not in wanted and name != "video_fps"]
    if unused:
        raise InputError(f"The sampling rule {rule!r} does not use {' and '.join(unused)}. Leave it out.")
    _check_numbers(given)
    return SAMPLING_RULES[rule](**{name: value for name, value in given.items() if name in wanted})


def _check_numbers(given: dict[str, Any]) -> None:
    for name in {"num_total", "num_frames"} & given.keys():
        if not (isinstance(given[name], Integral) and given[name] > 0):
            raise InputError(f"{name} must be a whole number above 0, not {given[name]!r}.")
    for name in {"video_fps", "fps"} & given.keys():
        if not 0 < given[name] < math.inf:
            raise InputError(f"{name} must be above 0 and finite, not {given[name]!r}.")
    if "bound" in given and (len(given["bound"]) != 2 or not all(map(math.isfinite, given["bound"]))):
        raise InputError(f"bound must be two finite times in seconds, (start, end), not {given['bound']!r}.")
