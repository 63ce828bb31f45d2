"""Position schemes: layout -> position ids. Generated text goes on from the last position by a fixed step.

Shape legend: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.layout import TokenLayout


@dataclass(frozen=True)
class Scheme:
    """How far apart two tokens are.

    Attributes:
        name: the scheme's name in the literature.
        of: layout -> position ids [B, L], integers or floats; padding gets 0.
        step: what one generated text token adds.
    """

    name: str
    of: Callable[[TokenLayout], Tensor] = field(repr=False)
    step: float = 1

    def __call__(self, layout: TokenLayout) -> Tensor:
        return self.of(layout)

    def next(self, largest: Tensor) -> Tensor:
        """The positions [B, 1] of the next generated tokens, from the largest position [B, 1] of their samples."""
        return largest + self.step


def _within_sample(counted: Tensor, layout: TokenLayout) -> Tensor:
    """Running count of `counted` [B, L], 0 on padding, inside each sample; padding inside a sample changes nothing."""
    total = counted.cumsum(1)
    place = torch.arange(len(layout), device=total.device)
    last_valid = torch.where(layout.valid, place, -1).cummax(1).values
    previous = torch.nn.functional.pad(last_valid, (1, -1), value=-1)
    starts = (previous < 0) | (layout.sample.gather(1, previous.clamp(min=0)) != layout.sample)
    starts &= layout.valid
    before = torch.where(starts, total - counted, 0).cummax(1).values
    return total - before


def sequential_position(layout: TokenLayout) -> Tensor:
    """0, 1, 2 ... inside each sample; int64 [B, L]."""
    return torch.where(layout.valid, _within_sample(layout.valid.long(), layout) - 1, 0)


def rings(row: Tensor, column: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The ring of a patch, 0 = outermost: min(i, j, h-1-i, w-1-j) (CCA-LLaVA, section 3)."""
    return torch.stack([row, column, rows - 1 - row, columns - 1 - column]).amin(0)


def concentric_position(layout: TokenLayout) -> Tensor:
    """Concentric positions (CCA-LLaVA, section 3); int64 [B, L].

    A text token costs one step; an image (or one frame of a clip) costs as many steps as it has rings, its tokens
    stand at their ring, and text goes on after the innermost one. Odd and rectangular grids have ceil(min(h, w) / 2)
    rings.

    Raises:
        InputError: a visual token has no place on a grid (resampled tokens have none).
    """
    visual = layout.visual
    if not torch.compiler.is_compiling() and bool((visual & ((layout.row < 0) | (layout.column < 0))).any()):
        raise InputError("Concentric positions need visual tokens on a patch grid; these have no row and column.")
    run = layout.runs("sample", "segment", "frame")
    ring, ring_count = _rings_of_runs(layout, run)
    first = torch.ones_like(visual)
    first[:, 1:] = run[:, 1:] != run[:, :-1]
    steps = torch.where(visual, torch.where(first, ring_count, 0), layout.valid.long())
    count = _within_sample(steps, layout)
    position = torch.where(visual, count - ring_count + ring, count - 1)
    return torch.where(layout.valid, position, 0)


def _rings_of_runs(layout: TokenLayout, run: Tensor) -> tuple[Tensor, Tensor]:
    row, column = layout.row.long(), layout.column.long()
    rows, columns = (
        torch.zeros_like(run).scatter_reduce(1, run, place, "amax").gather(1, run) + 1 for place in (row, column)
    )
    return rings(row, column, rows, columns), (torch.minimum(rows, columns) + 1) // 2


def temporal_position(layout: TokenLayout) -> Tensor:
    """T of TC-LLaVA: grows by 1 at every text token and every new frame, constant inside a frame; int64 [B, L]."""
    run = layout.runs("sample", "segment", "frame")
    new = torch.ones_like(layout.valid)
    new[:, 1:] = (run[:, 1:] != run[:, :-1]) | ~layout.visual[:, 1:]
    return torch.where(layout.valid, _within_sample((new & layout.valid).long(), layout) - 1, 0)


sequential = Scheme("sequential", sequential_position)
concentric = Scheme("concentric", concentric_position)


def temporal_dual(alpha: float = 1.0, beta: float = 1.0) -> Scheme:
    """Temporal-aware dual RoPE (TC-LLaVA): alpha * sequential + beta * temporal position; float32 [B, L]."""

    def position(layout: TokenLayout) -> Tensor:
        return alpha * sequential_position(layout).float() + beta * temporal_position(layout).float()

    return Scheme(f"temporal-dual(alpha={alpha}, beta={beta})", position, step=alpha + beta)


SCHEMES: dict[str, Callable[..., Scheme]] = {
    "sequential": lambda: sequential,
    "concentric": lambda: concentric,
    "temporal-dual": temporal_dual,
}


def scheme(name: str, **options: float) -> Scheme:
    """A scheme by name. Raises InputError for an unknown one."""
    if name not in SCHEMES:
        raise InputError(f"Unknown position scheme {name!r}. Known: {', '.join(SCHEMES)}.")
    return SCHEMES[name](**options)
