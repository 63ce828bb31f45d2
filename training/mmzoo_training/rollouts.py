"""How well a generator goes on with clips of which one knows how they go on: are things kept, and where are they?

Shape legend: B clips, G given frames, F frames, H, W height and width, O objects of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmzoo.models.vid_gpt import Denoising, ViDGPT, ViDGPTCache, progressive
from mmzoo.world import COLOURS, Clip


class Fate(NamedTuple):
    """What became of one object, frame by frame.

    Attributes:
        kept: bool [F]: its colour covers between half and twice as many pixels as it should.
        error: [F]: how many pixels its middle is off; nan where it is not kept.
    """

    kept: np.ndarray
    error: np.ndarray


@torch.no_grad()
def continued(
    model: ViDGPT, given: Tensor, num_frames: int, *, seed: int = 0, num_steps: int | None = None, perturb: int = 0
) -> Tensor:
    """uint8 [B, F, H, W, 3]: clips that go on from given uint8 [B, G, H, W, 3], all at once.

    With a cache where the model's rule allows one; else the frames in the window are computed again in every step.
    """
    random = torch.Generator().manual_seed(seed)
    denoising = Denoising(model, model.build_scheduler(num_steps))
    cache = ViDGPTCache(model) if model.config.rule != "bidirectional" else None
    clip = (given.permute(0, 4, 1, 2, 3).float() / 127.5 - 1).to(model.device)
    shown, written, before = clip[:, :, :0], 0, None
    while clip.shape[2] < num_frames or written == 0:
        new = clip[:, :, written:]
        if perturb:
            noise = torch.randn(new.shape, generator=random).to(new)
            new = denoising.scheduler.add_noise(new, noise, torch.full((len(new),), perturb))
        if cache is not None:
            for part in new.split(model.config.chunk_frames, 2):
                denoising.write(part, written, cache)
                written += part.shape[2]
        else:
            shown, written = torch.cat([shown, new], 2), written + new.shape[2]
        noise = torch.randn((len(clip), clip.shape[1], model.config.chunk_frames, *clip.shape[3:]), generator=random)
        noise = progressive(noise, model.config.progressive_noise, before)
        before = noise[:, :, -1]
        seen = None if cache is not None else shown[:, :, -model.config.window :]
        clip = torch.cat([clip, denoising.chunk(noise.to(clip), written, cache, seen, random)], 2)
    return ((clip[:, :, :num_frames] + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu()


def fates(clip: Clip, frames: np.ndarray) -> list[Fate]:
    """What became of each object in frames uint8 [F, H, W, 3] that should be the clip's."""
    colours = np.array([[clip.background] * 3, *(COLOURS[thing.colour] for thing in clip.objects)], np.float32)
    masses, middles = _found(frames, colours)
    true_masses, true_middles = _found(clip.frames[: len(frames)], colours)
    found = []
    for i in range(len(clip.objects)):
        share = masses[i] / true_masses[i]
        kept = (share >= 0.5) & (share <= 2)
        error = np.linalg.norm(middles[i] - true_middles[i], axis=-1)
        found.append(Fate(kept, np.where(kept, error, np.nan)))
    return found


def _found(frames: np.ndarray, colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [O, F] nearest in colour to each object rather than the background, and their middle [O, F, 2]."""
    apart = ((frames[..., None, :].astype(np.float32) - colours) ** 2).sum(-1)
    nearest = apart.argmin(-1)  # [F, H, W]
    places = np.stack(np.meshgrid(*map(np.arange, frames.shape[1:3]), indexing="ij"), -1)
    own = np.stack([nearest == i for i in range(1, len(colours))])  # [O, F, H, W]
    masses = own.sum((2, 3))
    middles = (own[..., None] * places).sum((2, 3)) / np.maximum(masses, 1)[..., None]
    return masses, middles


def report(
    clips: Sequence[Clip], frames: Sequence[np.ndarray], given: int, ahead: Sequence[int] = (1, 2, 4, 8, 16, 32)
) -> dict[int, tuple[float, float]]:
    """Frames after the given ones -> share of objects kept, and mean error in pixels of those that are."""
    all_fates = [fate for clip, one in zip(clips, frames) for fate in fates(clip, one)]
    table = {}
    for step in ahead:
        kept = np.array([fate.kept[given + step - 1] for fate in all_fates])
        error = np.array([fate.error[given + step - 1] for fate in all_fates])
        table[step] = float(kept.mean()), float(np.nanmean(error)) if kept.any() else float("nan")
    return table
