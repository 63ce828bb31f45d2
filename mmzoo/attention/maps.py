"""Where an answer looked: attention weights by layer and head, with token classes, and as a picture over the frames.

Shape legend: A answer tokens, L tokens, N images or frames, P patches of one, M media that stand as one span each (an
image, a frame, or a whole clip), V visual tokens of a medium, S frames of a medium.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmzoo.attention.drawing import token_classes
from mmzoo.errors import InputError
from mmzoo.files import check_png, replacing
from mmzoo.layout import TokenLayout

if TYPE_CHECKING:
    from mmzoo.asking import Answer


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of the tokens that chose an answer, under the model's own rule.

    Attributes:
        answer: what was said.
        tokens: the A words of the answer, the end token included.
        weights: float32 [layers, heads, A, L]: row a is the query that predicted answer token a; rows sum to 1, under a
            pair of rules to the number of softmaxes that see a key.
        layout: of the L tokens.
        patch_weights: float32 [M, V, S * P]: how much each visual token took from each patch of its medium.
        frames: uint8 [N, H, W, 3]: what was shown.
    """

    answer: Answer
    tokens: list[str]
    weights: Tensor
    layout: TokenLayout
    patch_weights: Tensor
    frames: np.ndarray

    def by_class(self) -> dict[str, Tensor]:
        """Token class -> its part [layers, heads, A] of each row; the parts sum to what the row sums to."""
        names = token_classes(self.layout)
        return {
            name: self.weights[..., torch.tensor([other == name for other in names])].sum(-1)
            for name in dict.fromkeys(names)
        }

    def by_token(self) -> Tensor:
        """[layers, heads, A, M, V]: the weights of the visual tokens, medium by medium."""
        visual = self.weights[..., self.layout.visual[0]]
        return visual.unflatten(-1, (len(self.patch_weights), -1))

    def by_frame(self) -> Tensor:
        """[layers, heads, A, N]: the part of each image or frame."""
        return self.by_patch().sum(-1)

    def by_patch(self) -> Tensor:
        """[layers, heads, A, N, P]: the part of each patch, through the connector's own attention."""
        patches = torch.einsum("...mv,mvp->...mp", self.by_token(), self.patch_weights)
        return patches.flatten(-2).unflatten(-1, (len(self.frames), -1))

    def draw(self, path: str | Path, *, token: int = 0, layer: int | None = None, head: int | None = None) -> Path:
        """Write a PNG: the frames, brighter where the answer looked, and each frame's share as a bar.

        Args:
            path: where the PNG goes; it appears there whole or not at all.
            token: which token of the answer.
            layer, head: one of them; the mean over all if None.

        Raises:
            InputError: no such token, layer or head; a path that does not end in .png.
        """
        from matplotlib.figure import Figure

        check_png(path)
        layers, heads, tokens = self.weights.shape[:3]
        for what, number, count in (("layer", layer, layers), ("head", head, heads), ("token", token, tokens)):
            if number is not None and not -count <= number < count:
                raise InputError(f"There is no {what} {number}. Choose from 0 to {count - 1}, or from -1 back.")
        chosen = self.by_patch()[:, :, token]
        chosen = chosen.mean(0) if layer is None else chosen[layer]
        heat = (chosen.mean(0) if head is None else chosen[head]).numpy()
        share = heat.sum(-1)
        count, columns = len(self.frames), min(len(self.frames), 8)
        rows = math.ceil(count / columns)
        figure = Figure(figsize=(1.5 * columns, 2.0 * rows + 0.4))
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for i, (frame, patches) in enumerate(zip(self.frames, heat, strict=True)):
            axis = axes[i // columns, i % columns]
            axis.imshow(_highlighted(frame, patches / heat.max()))
            bar = axis.inset_axes((0, -0.12, 1, 0.08))
            bar.barh([0], [share[i] / share.max()], color="#4c72b0")
            bar.set_xlim(0, 1)
            bar.set_axis_off()
            axis.set_title(f"{100 * share[i] / share.sum():.0f} %", fontsize=9, pad=3)
        where = f"layer {'all' if layer is None else layer}, head {'all' if head is None else head}"
        figure.suptitle(f"where “{self.tokens[token]}” looked ({where})", fontsize=10)
        figure.tight_layout()
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        return Path(path)


def _highlighted(frame: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """The frame [H, W, 3], dimmed to a third where patches [P] (0..1) were not looked at."""
    side = math.isqrt(len(patches))
    grid = Image.fromarray((255 * patches.reshape(side, -1)).clip(0, 255).astype(np.uint8))
    weight = np.asarray(grid.resize(frame.shape[1::-1], Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    return (frame * (0.3 + 0.7 * weight)).clip(0, 255).astype(np.uint8)
