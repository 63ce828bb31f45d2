"""What was read, to look at."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmzoo.files import check_png, replacing
from mmzoo.media.video import Video


def contact_sheet(video: Video, path: str | Path, *, side: int = 160, columns: int = 4) -> Path:
    """Write a PNG of the frames that were read, each with its number and time.

    Args:
        video: what `read_video` gave.
        path: where the PNG goes; it appears there whole or not at all.
        side: pixels of the longer side of a frame.
        columns: frames a row.

    Raises:
        InputError: a path that does not end in .png.
    """
    check_png(path)
    height, width = video.frames.shape[1:3]
    scale = side / max(height, width)
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    font = ImageFont.load_default(12)
    gap, caption = 6, 16
    rows = math.ceil(len(video.frames) / columns)
    columns = min(columns, len(video.frames))
    size = (columns * (cell[0] + gap) + gap, rows * (cell[1] + caption + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, (frame, index, time) in enumerate(zip(video.frames, video.indices, video.timestamps, strict=True)):
        x = gap + i % columns * (cell[0] + gap)
        y = gap + i // columns * (cell[1] + caption + gap)
        sheet.paste(Image.fromarray(frame).resize(cell, Image.Resampling.LANCZOS), (x, y + caption))
        label = f"frame {index}" if math.isnan(time) else f"frame {index}, {time:.2f} s"
        pen.text((x, y), label, fill="black", font=font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="png")
    return Path(path)
