"""From rows of annotations to items. What is wrong is a DatasetError with file, row and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmzoo.errors import DatasetError, MissingExtra
from mmzoo_eval.annotations import read_json, read_table, read_text
from mmzoo_eval.benchmark import Item


class _Wrong(Exception):
    """One field of one row."""


class Row:
    """One row of an annotation file. Its methods give a field, or say which file, row and field is wrong."""

    def __init__(self, place: str, values: Any):
        self.place = place
        if not isinstance(values, Mapping):
            raise _Wrong(f"{place}: an object with fields belongs here, not {_short(values)}")
        self.values: Mapping[str, Any] = values

    def wrong(self, field: str, what: str) -> _Wrong:
        return _Wrong(f"{self.place}, field {field!r}: {what}")

    def get(self, field: str) -> Any:
        if self.values.get(field) is None:
            raise self.wrong(field, "missing")
        return self.values[field]

    def text(self, field: str) -> str:
        """A text; a number is written out."""
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self.wrong(field, f"a text belongs here, not {_short(value)}")
        return str(value)

    def texts(self, field: str) -> tuple[str, ...]:
        value = self.get(field)
        if isinstance(value, str) or not hasattr(value, "__iter__") or not (many := list(value)):
            raise self.wrong(field, f"a list of texts belongs here, not {_short(value)}")
        return tuple(Row(self.place, {f"{field}[{i}]": one}).text(f"{field}[{i}]") for i, one in enumerate(many))

    def index(self, field: str, among: Sequence[Any]) -> int:
        """A number that counts something from 0; digits as a text, as CSV files have them, are one too."""
        value = self.get(field)
        value = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(among):
            raise self.wrong(field, f"a whole number from 0 to {len(among) - 1} belongs here, not {_short(value)}")
        return value

    def seconds(self, field: str) -> float:
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(field, f"a number of seconds belongs here, not {_short(value)}")
        return float(value)

    def among(self, field: str, known: Iterable[str]) -> str:
        value, known = self.text(field), list(known)
        if value not in known:
            raise self.wrong(field, f"{_short(value)} is none of {', '.join(known)}")
        return value


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:57]}..."


def items(rows: Iterable[tuple[str, Any]], item: Callable[[Row], Item]) -> list[Item]:
    """An item of every row (its place, what stands there). Raises DatasetError with every row that gives none."""
    made: dict[str, Item] = {}
    problems = []
    for place, values in rows:
        try:
            one = item(Row(place, values))
        except _Wrong as wrong:
            problems.append(str(wrong))
            continue
        if one.id in made:
            problems.append(f"{place}: another row has the id {one.id!r} too")
        made[one.id] = one
    if problems:
        raise DatasetError(f"{len(problems)} rows of annotations cannot be used:", problems)
    if not made:
        raise DatasetError("There are no annotations:", ["the files hold no rows"])
    return list(made.values())


def the_file(path: Path, *patterns: str) -> Path:
    """The path itself, or the one file in the folder that fits the first pattern that any file fits."""
    if path.is_file():
        return path
    for pattern in patterns:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise DatasetError(
                f"{path} holds several files of annotations. Name one of them:", [str(one) for one in found]
            )
        if found:
            return found[0]
    raise DatasetError(f"{path} is no file, and no folder of annotations:", [f"no {one} there" for one in patterns])


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON list."""
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(read_json(path, list)))


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file with a JSON object a line; only a line feed ends a line."""
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError("An annotation file is no JSON:", [f"{path}, line {i}: {error}"]) from error
            yield f"{path}, line {i}", row


def csv_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file whose header has these fields."""
    yield from ((f"{path}, line {i}", row) for i, row in enumerate(read_table(path, fields), 2))


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON list or, as the Hub has them, of a parquet file, of which only these columns are read."""
    if path.suffix != ".parquet":
        yield from json_rows(path)
        return
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("pyarrow", "datasets", "Reading annotations from a parquet file") from error
    try:
        rows = parquet.read_table(path, columns=list(columns)).to_pylist()
    except (OSError, ArrowException) as error:
        raise DatasetError("An annotation file cannot be read:", [f"{path}: {error}"]) from error
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
