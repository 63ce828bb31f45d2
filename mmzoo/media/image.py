"""Pictures in: one function, one typed error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image, ImageOps

from mmzoo.errors import InputError

ImageSource = Union[str, "os.PathLike[str]", Image.Image, np.ndarray]

# Pillow clips these to 0..255 instead of scaling them, which turns most 16-bit pictures white.
_CLIPPED_MODES = ("I", "F")


def read_image(source: ImageSource) -> Image.Image:
    """Reads one picture, upright, as RGB.

    Args:
        source: a path, a PIL image, or a uint8 array [H, W] or [H, W, 3].

    Returns:
        An RGB image, turned as its EXIF data say. Transparency is dropped, not blended.

    Raises:
        InputError: the file is missing or damaged, or the source is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_image(Path(source))
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the PIL image")
    if not isinstance(source, np.ndarray):
        raise InputError(f"An image is a path, a PIL image or a uint8 array, not {type(source).__name__}.")
    if source.dtype != np.uint8 or source.size == 0 or not (source.ndim == 2 or source.shape[2:] == (3,)):
        got = f"{source.dtype} {list(source.shape)}"
        raise InputError(f"An image array is uint8 [H, W] or [H, W, 3] and not empty; this one is {got}.")
    return Image.fromarray(source).convert("RGB")


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return _upright_rgb(image, f"the image {str(path)!r}")
    except InputError:
        raise
    # Pillow's plugins let SyntaxError, struct.error, ValueError and others out on damaged files.
    except Exception as error:
        raise InputError(f"Cannot read the image {str(path)!r}: {type(error).__name__}: {error}.") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith(_CLIPPED_MODES):
        raise InputError(f"Pillow cannot bring {name} from mode {image.mode!r} to RGB. Convert it to 8 bits first.")
    return ImageOps.exif_transpose(image).convert("RGB")
