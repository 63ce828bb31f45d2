"""A clip into a file: shown as it grows, and gone on with after an interrupt.

clip.mp4.parts/000000.npy ...   frames of each block, as they came
clip.mp4.parts/state.pt         how to go on after one of them, the last if states are small
clip.growing.mp4                all frames so far, for players that follow it
clip.mp4                        in the end, and the others are gone
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmzoo.errors import InputError
from mmzoo.files import replacing
from mmzoo.generation import Generator, Rollout
from mmzoo.integrity import weights_sha256
from mmzoo.media import VideoWriter

SMALL = 128
"""Pixels: the shorter side of small frames as they are written."""
QUICK = 0.1
"""Seconds: states that are written faster are written after every block, others take a twentieth of the time."""


def generate(
    model: Generator,
    path: str | Path,
    num_frames: int,
    *,
    overwrite: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Path:
    """Make a clip and write it; after an interrupt the same call goes on, and the file is the same to the byte.

    Args:
        model: a generator.
        path: ends in .mp4, .mov or .mkv.
        num_frames: frames in all.
        overwrite: whether a clip of this name may be replaced.
        advance: told the frames done and the frames in all.
        **options: what the model's `rollout` takes.

    Raises:
        InputError: the model does not take an option, another clip was begun under this name, or the name cannot be
            written.
    """
    path = Path(path)
    check_output(path, overwrite)
    unknown = options.keys() - inspect.signature(model.rollout).parameters.keys()
    if unknown:
        raise InputError(f"{type(model).__name__} does not take {', '.join(sorted(unknown))}.")
    parts = path.with_name(f"{path.name}.parts")
    growing = path.with_name(f"{path.stem}.growing.mp4")
    rollout = model.rollout(num_frames, **options)
    key = _key(model, num_frames, options)
    _resume(rollout, parts, key)
    advance(rollout.done, num_frames)
    with VideoWriter(growing, model.fps, growing=True) as writer:
        for block in _blocks(parts):
            writer.write(enlarged(block))
        due = 0.0
        for block in (block.cpu().numpy() for block in rollout):
            with replacing(parts / f"{rollout.done - len(block):06d}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, block)
            if time.monotonic() >= due:
                due = _keep(rollout, parts, key)
            writer.write(enlarged(block))
            advance(rollout.done, num_frames)
    with VideoWriter(path, model.fps) as writer:
        for block in _blocks(parts):
            writer.write(enlarged(block))
    growing.unlink()
    shutil.rmtree(parts)
    return path


def enlarged(block: np.ndarray) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] with each pixel as a square, until the shorter side has about 128.

    Players want colours at half the resolution, which leaves little of an object of three pixels.
    """
    factor = max(1, SMALL // min(block.shape[1:3]))
    return block.repeat(factor, 1).repeat(factor, 2)


def check_output(path: Path, overwrite: bool = False) -> None:
    """Refuse, before hours of work, a name that cannot be written. Raises InputError."""
    VideoWriter(path, 1)
    if path.is_dir():
        raise InputError(f"{path} is a folder. Give the name of a file.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists. Take another name, or say that it may be overwritten.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error


def _key(model: Generator, num_frames: int, options: dict[str, Any]) -> str:
    """What decides a clip."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    decided = [model, num_frames, options, config, model.attention, getattr(model, "_parts", {})]
    return hashlib.sha256(json.dumps(_told(decided)).encode()).hexdigest()


def _told(value: Any) -> Any:
    """What `json` can write, with digests in place of weights and tensors."""
    if isinstance(value, torch.nn.Module):
        return weights_sha256(value.state_dict())
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    if isinstance(value, torch.Tensor):
        return weights_sha256({"": value})
    if isinstance(value, Mapping):
        return {str(name): _told(one) for name, one in sorted(value.items())}
    if isinstance(value, str | int | float | None):
        return value
    return [_told(one) for one in value] if isinstance(value, Sequence) else type(value).__name__


def _resume(rollout: Rollout, parts: Path, key: str) -> None:
    state = parts / "state.pt"
    if not state.is_file():
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        return
    try:
        saved = torch.load(state, weights_only=True)
    except Exception as error:  # torch raises classes of its own, of pickle and of the standard library
        said = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{state} is damaged: {said}. Remove {parts} to begin anew.") from error
    if saved.pop("key") != key:
        raise InputError(
            f"Another clip was begun under this name, with other weights or options. Remove {parts} to begin anew, or "
            "take another name."
        )
    rollout.load_state_dict(saved)
    for path in parts.glob("*.npy"):  # a block that was written after the state is made again
        if int(path.stem) >= rollout.done:
            path.unlink()
    found = 0
    for path in sorted(parts.glob("*.npy")):
        found += len(np.load(path, mmap_mode="r")) if int(path.stem) == found else 0
    if found != rollout.done:
        raise InputError(f"A block of frames is missing in {parts}. Remove it to begin anew.")


def _keep(rollout: Rollout, parts: Path, key: str) -> float:
    """Write the state, and say when the next one is due: one of gigabytes must not take a second for every block."""
    start = time.monotonic()
    with replacing(parts / "state.pt") as temporary:
        torch.save({"key": key, **rollout.state_dict()}, temporary)
    took = time.monotonic() - start
    return start + 20 * took if took > QUICK else 0.0


def _blocks(parts: Path) -> Iterator[np.ndarray]:
    yield from (np.load(path) for path in sorted(parts.glob("*.npy")))
