"""Draw the masks of the README and the documentation into docs/images."""

from __future__ import annotations

from pathlib import Path

from mmzoo import masks
from mmzoo.attention import draw
from mmzoo.layout import Role, TokenLayout, image, lay_out, text, video
from mmzoo.masks.ccam import query_layout

FOLDER = Path(__file__).parent.parent / "docs" / "images"
CLIP = lay_out(text(3), video(3, 2, 2), text(4), text(3, Role.ANSWER))
PICTURE = lay_out(text(3), image(4, 4), text(4))
FRAMES = lay_out(video(8, 2))


def main() -> None:
    drawings: dict[str, tuple[object, TokenLayout, TokenLayout | None]] = {
        "modality-mutual": (masks.modality_mutual(), CLIP, None),
        "frame-block-causal": (masks.frame_block_causal(), CLIP, None),
        "concentric-causal": (masks.concentric_causal(), PICTURE, None),
        "mmca": (masks.multimodal_causal(), lay_out(text(3), image(2, 2), text(3), image(2, 2), text(3)), None),
        "ccam": (masks.causal_cross_attention(), query_layout(8, 4), lay_out(video(4, 3))),
        "sink-window": (masks.sink_window(4, 1, 2), FRAMES, None),
    }
    for name, (rule, queries, keys) in drawings.items():
        draw(rule, queries, FOLDER / f"{name}.png", keys)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
