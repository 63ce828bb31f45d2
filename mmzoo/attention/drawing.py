"""Masks are looked at, not read: a rule over a layout as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmzoo import masks
from mmzoo.attention.compiler import allowed
from mmzoo.errors import InputError
from mmzoo.files import check_png, replacing
from mmzoo.layout import Modality, Role, TokenLayout, image, lay_out, text, video
from mmzoo.masks.ccam import query_layout
from mmzoo.masks.rule import Rule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLASSES = {
    "prompt text": "#4c72b0",
    "answer text": "#55a868",
    "image": "#dd8452",
    "video": "#c44e52",
    "audio": "#8172b3",
    "latent": "#937860",
    "query": "#da8bc3",
    "padding": "#cccccc",
}
MAX_DRAWN = 4000
"""The tokens of the longest side that is drawn: memory grows with their square, and a picture shows no more of them."""
_ODD_SEGMENT = 0.72
"""Neighbouring frames and media alternate in brightness by this factor, so that one can count them."""


def draw(
    rule: Rule | tuple[Rule, Rule],
    queries: TokenLayout,
    path: str | Path,
    keys: TokenLayout | None = None,
    *,
    row: int = 0,
    title: str | None = None,
) -> Path:
    """Write a PNG of the mask of one batch row, queries downwards and keys to the right; a dark cell is an open pair.

    Both axes carry the token classes in colour; a legend names them. Two-softmax attention is drawn side by side.

    Args:
        rule: the rule, or the pair of a two-softmax attention.
        queries: layout of the queries.
        path: where the PNG goes; it appears there whole or not at all.
        keys: layout of the keys; None is self-attention.
        row: which row of the batch.
        title: the rule's name if None.

    Returns:
        The path.

    Raises:
        InputError: more than `MAX_DRAWN` tokens on a side, or none; a path that does not end in .png.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    check_png(path)
    for side in (queries, queries if keys is None else keys):
        check_drawable(len(side))

    rules = rule if isinstance(rule, tuple) else (rule,)
    figure = Figure(figsize=(5.2 * len(rules), 5.6))
    axes = figure.subplots(1, len(rules), squeeze=False)
    shown: set[str] = set()
    for one, axis in zip(rules, axes[0], strict=True):
        shown |= _draw_one(axis, one, queries, queries if keys is None else keys, row)
        axis.set_title(title or one.name, fontsize=12, pad=22)
    patches = [Patch(color=colour, label=name) for name, colour in CLASSES.items() if name in shown]
    figure.legend(handles=patches, loc="lower center", ncol=min(len(patches), 4), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return Path(path)


def check_drawable(num_tokens: int) -> None:
    """Raises InputError where a mask over so many tokens is not drawn."""
    if num_tokens == 0:
        raise InputError("The layout has no tokens, so there is no mask to draw. Give one with tokens.")
    if num_tokens > MAX_DRAWN:
        raise InputError(
            f"The layout has {num_tokens:,} tokens; a mask is drawn over at most {MAX_DRAWN:,}. Give a smaller layout: "
            "fewer frames, or fewer patches of each, show the same pattern."
        )


def draw_example(rule: str | Rule | tuple[Rule, Rule], path: str | Path) -> Path:
    """Write a PNG of a rule over a small layout that shows what is special to it.

    Args:
        rule: a name in `mmzoo.masks.RULES`, or a rule or pair of that name with options of its own.
        path: where the PNG goes.
    """
    name = rule if isinstance(rule, str) else rule[0].name if isinstance(rule, tuple) else rule.name
    found = masks.rule(name, **EXAMPLE_OPTIONS.get(name, {})) if isinstance(rule, str) else rule
    queries, keys = _EXAMPLES.get(name, _clip)()
    return draw(found, queries, path, keys)


EXAMPLE_OPTIONS: dict[str, dict[str, int]] = {
    "sliding-window": {"window": 4},
    "sink-window": {"window": 4, "sink_frames": 1, "frames_per_block": 2},
    "block-causal": {"frames_per_block": 2},
    "teacher-forcing": {"frames_per_block": 2},
}
"""What rules that have no defaults are drawn with."""


def _clip() -> tuple[TokenLayout, None]:
    return lay_out(text(3), video(3, 2, 2), text(4), text(3, Role.ANSWER)), None


def _frames() -> tuple[TokenLayout, None]:
    return lay_out(video(8, 2)), None


_EXAMPLES: dict[str, Callable[[], tuple[TokenLayout, TokenLayout | None]]] = {
    "concentric-causal": lambda: (lay_out(text(3), image(4, 4), text(4)), None),
    "mmca": lambda: (lay_out(text(3), image(2, 2), text(3), image(2, 2), text(3)), None),
    "ccam": lambda: (query_layout(8, 4), lay_out(video(4, 3))),
    "causal-temporal": _frames,
    "block-causal": _frames,
    "sink-window": _frames,
}


def token_classes(layout: TokenLayout, row: int = 0) -> list[str]:
    """The name of each token's class in the legend."""
    names = []
    for valid, modality, role in zip(
        layout.valid[row].tolist(), layout.modality[row].tolist(), layout.role[row].tolist(), strict=True
    ):
        if not valid:
            names.append("padding")
        elif modality == Modality.TEXT:
            names.append("answer text" if role == Role.ANSWER else "prompt text")
        else:
            names.append(Modality(modality).name.lower())
    return names


def _colours(layout: TokenLayout, row: int) -> tuple[torch.Tensor, set[str]]:
    from matplotlib.colors import to_rgb

    names = token_classes(layout, row)
    run = layout.runs("segment", "frame")[row].tolist()
    shades = [
        [c * (_ODD_SEGMENT if run[i] % 2 and "text" not in name else 1) for c in to_rgb(CLASSES[name])]
        for i, name in enumerate(names)
    ]
    return torch.tensor(shades), set(names)


def _draw_one(axis: Axes, rule: Rule, queries: TokenLayout, keys: TokenLayout, row: int) -> set[str]:
    from matplotlib.ticker import MaxNLocator

    mask = allowed(rule, queries, keys)[row].float().cpu()
    (left, left_names), (top, top_names) = _colours(queries, row), _colours(keys, row)
    num_queries, num_keys = mask.shape
    picture = 0.97 - 0.97 * mask[..., None] * (1 - 0.55 * left[:, None])
    axis.imshow(
        picture.clamp(0, 1).numpy(), interpolation="nearest", extent=(0, num_keys, num_queries, 0), aspect="auto"
    )
    bar = 0.035
    for strip, box in (
        (top[None], (0.0, 1.01, 1.0, bar)),
        (left[:, None], (-bar - 0.01, 0.0, bar, 1.0)),
    ):
        inset = axis.inset_axes(box)
        inset.imshow(strip.numpy(), interpolation="nearest", aspect="auto")
        inset.set_axis_off()
    if max(num_queries, num_keys) <= 48:
        axis.set_xticks(range(num_keys + 1), minor=True)
        axis.set_yticks(range(num_queries + 1), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(which="both", length=0, labelsize=8, left=False, labelleft=False)
    axis.set_xlabel("key")
    axis.set_ylabel("query", labelpad=16)
    return left_names | top_names
