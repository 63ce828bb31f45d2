"""Files are written under a temporary name and renamed, so that a reader finds them whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmzoo.errors import InputError


def check_png(path: str | Path) -> None:
    """Raises InputError if the name does not say that the file is a PNG, which every picture is."""
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"Pictures are written as PNG, and {str(path)!r} does not end in .png. Name it so.")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; after the block it takes its place, after an error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
