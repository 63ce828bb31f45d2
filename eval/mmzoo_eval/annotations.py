"""Reading annotation files: what cannot be used is a DatasetError that names file, entry and field."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmzoo.errors import DatasetError

Kinds = type | tuple[type, ...]


def read_text(path: Path) -> str:
    """The text of a file. Raises DatasetError if there is none, or if it is no UTF-8."""
    try:
        # Windows' editors put a mark in front; line ends stay as they are, since some formats hold others in strings.
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError("An annotation file cannot be read:", [f"{path}: {error}"]) from error


def read_json(path: Path, kind: Kinds = (list, dict)) -> Any:
    """The JSON value in a file, of one of those types. Raises DatasetError."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DatasetError("An annotation file is no JSON:", [f"{path}: {error}"]) from error
    if not isinstance(value, kind):
        raise DatasetError("An annotation file holds something else:", [f"{path}: {_is_not(value, kind)}"])
    return value


def read_table(path: Path, fields: Iterable[str], delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table with a header that holds those fields. Raises DatasetError."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path)), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DatasetError("An annotation file is no table:", [f"{path}: {error}"]) from error
    require(path, enumerate(rows, 2), dict.fromkeys(fields, str), "line")
    if not rows:
        raise DatasetError("An annotation file holds no rows:", [str(path)])
    return rows


def require(path: Path, entries: Iterable[tuple[Any, Any]], fields: Mapping[str, Kinds], called: str = "entry") -> None:
    """Check that every entry is a mapping with those fields of those types.

    Args:
        path: of the file, for the message.
        entries: (number or key, entry).
        fields: name -> type or types.
        called: what an entry is in the file.

    Raises DatasetError that lists file, entry and field.
    """
    problems = []
    for key, entry in entries:
        if not isinstance(entry, Mapping):
            problems.append(f"{path}: {called} {key}: {_is_not(entry, dict)}")
            continue
        for name, kind in fields.items():
            if name not in entry:
                problems.append(f"{path}: {called} {key}: field {name!r} is missing")
            elif not isinstance(entry[name], kind) or (isinstance(entry[name], bool) and kind is not bool):
                problems.append(f"{path}: {called} {key}: field {name!r} {_is_not(entry[name], kind)}")
    refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    """Raise DatasetError if there are problems, each with file, entry and field."""
    if problems:
        raise DatasetError("An annotation file is not as it is published:", problems)


def _is_not(value: Any, kind: Kinds) -> str:
    wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
    return f"is {type(value).__name__}, not {wanted}"


def unique(path: Path, keys: Iterable[Any], field: str) -> None:
    """Raise DatasetError if a key comes twice."""
    seen: set[Any] = set()
    twice = sorted({str(key) for key in keys if key in seen or seen.add(key)})  # type: ignore[func-returns-value]
    refuse([f"{path}: {field} {key} comes twice" for key in twice])
