"""Training data as one kind of record, whatever format they are written in, and what is wrong with them.

A sample is messages with places `<image>` and `<video>`, and one medium for each place. Formats: `llava`, a list of
{id, image, video, conversations}; `swift`, lines of {messages, images, videos}; `chat`, messages whose content is typed
parts, as transformers' chat templates take them; `webdataset`, tar files that hold key.json or key.txt beside key.jpg,
key.mp4 ...; and data sets of Hugging Face whose rows are any of the first three.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

from mmzoo.errors import DatasetError, InputError, MissingExtra, MmzooError
from mmzoo.media import Video, read_image, read_video
from mmzoo.media.video import IMAGE_SUFFIXES
from mmzoo.processing import IMAGE, VIDEO

MEDIA_COLUMNS = ("image", "images", "video", "videos")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg")
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""How a format calls who speaks -> "system", "user" or "assistant"."""


class Message(NamedTuple):
    """What one side says: the role "system", "user" or "assistant", and text with places of media."""

    role: str
    text: str


@dataclass(frozen=True)
class Member:
    """A medium inside an uncompressed tar file."""

    tar: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise InputError(f"{self} is cut off: {len(data)} of {self.size} bytes.")
        return data

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"


@dataclass(frozen=True)
class Cell:
    """A medium in the cell of a data set, read when it is needed."""

    rows: Any
    row: int
    column: str
    item: int | None

    def read(self) -> Any:
        found = self.rows[self.row][self.column]
        found = found if self.item is None else found[self.item]
        if isinstance(found, Mapping):  # an image that the data set does not decode itself
            return found["bytes"] if found.get("bytes") is not None else found["path"]
        return found

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}"


Medium: TypeAlias = "str | Sequence[str] | Member | Cell"
"""A path, the paths of a video's frames, or a place inside a file."""


@dataclass(frozen=True)
class Record:
    """One sample as it was written.

    Attributes:
        id: its name in its file.
        messages: a system message or none, then questions and answers in turn.
        images: one for each `<image>`, in order.
        videos: one for each `<video>`, in order.
        source: file and line.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[Medium, ...] = ()
    videos: tuple[Medium, ...] = ()
    source: str = ""


class Problem(NamedTuple):
    """What is wrong with a file: where (line 0 is all of it; in tar files the key stands for the line), and what."""

    file: str
    line: int | str
    field: str
    message: str

    def __str__(self) -> str:
        return ":".join(map(str, filter(None, (self.file, self.line, self.field)))) + f": {self.message}"


Say: TypeAlias = Callable[[str, str], None]
"""Notes a problem: field, message."""
Parts: TypeAlias = "tuple[list[Message], list[Any], list[Any]]"
"""Messages, images, videos."""


def read_records(source: Any, format: str | None = None, media: str | Path | None = None) -> Iterator[Record | Problem]:
    """The records of a file, and every problem in place of those that cannot be used.

    Args:
        source: a .json or .jsonl file, a .tar file, a folder that holds one such file or any number of .tar files, a
            `datasets.Dataset`, or the folder of a saved one.
        format: a name in `NAMES`; None tells it by what each record holds.
        media: the folder that paths of media start from; the file's own by default.

    Raises:
        InputError: there is no such file, or it is none of these.
        MissingExtra: a saved data set without the package `datasets`.
    """
    if format is not None and format not in NAMES:
        raise InputError(f"Unknown format {format!r}. Known: {', '.join(NAMES)}.")
    if not isinstance(source, (str, Path)):
        yield from _read_rows(source, format, media)
        return
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _read_rows(_saved_dataset(path), format, media, str(path))
        return
    for file in _files(path):
        if file.suffix == ".tar":
            yield from _read_tar(file, format)
            continue
        if format == "webdataset":
            raise InputError(f"A webdataset is .tar files; {file} is none.")
        folder = Path(media) if media is not None else file.parent
        for line, raw in _read_json(file):
            yield from [raw] if isinstance(raw, Problem) else _record(raw, format, folder, str(file), line)


def load_records(sources: Sequence[tuple[Any, str | None, str | Path | None]]) -> tuple[list[Record], list[Problem]]:
    """What `read_records` finds in several sources, records and problems apart."""
    found = [one for source in sources for one in read_records(*source)]
    return [one for one in found if isinstance(one, Record)], [one for one in found if isinstance(one, Problem)]


def unreadable(record: Record, deadline: float = 60.0) -> list[Problem]:
    """Opens every medium of a record, and says which cannot be read."""
    problems = []
    for field, media, read in (("images", record.images, open_image), ("videos", record.videos, _look)):
        for i, medium in enumerate(media):
            try:
                read(medium, deadline)
            except MissingExtra:
                raise
            except (MmzooError, OSError) as error:
                file, _, line = record.source.rpartition(":")
                problems.append(Problem(file, line, f"{field}[{i}]", str(error)))
    return problems


def open_image(medium: Medium, deadline: float = 0.0) -> Image.Image:
    """The picture. Raises InputError if it cannot be read."""
    found = medium.read() if isinstance(medium, (Member, Cell)) else medium
    if not isinstance(found, bytes):
        return read_image(found)
    try:
        with Image.open(io.BytesIO(found)) as picture:
            picture.load()
            return read_image(picture)
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins let many kinds out on damaged files
        raise InputError(f"Cannot read the image {medium}: {type(error).__name__}: {error}.") from error


def open_video(medium: Medium, read: Callable[..., Video]) -> Video:
    """The frames that `read` takes from a video: a path, a list of pictures, or bytes by way of a temporary file.

    Raises:
        VideoReadError: it cannot be read.
    """
    found = medium.read() if isinstance(medium, (Member, Cell)) else medium
    if not isinstance(found, bytes):
        return read(found if isinstance(found, str) else list(found))
    suffix = PurePosixPath(medium.name).suffix if isinstance(medium, Member) else ".mp4"
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(found)
        file.flush()
        return read(file.name)


def _look(medium: Medium, deadline: float) -> Video:
    return open_video(medium, lambda video: read_video(video, num_frames=8, deadline=deadline))


# Files


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in (".json", ".jsonl", ".tar"):
            raise InputError(f"{path} is no .json, .jsonl or .tar file.")
        return [path]
    if not path.is_dir():
        raise InputError(f"There is no file or folder {str(path)!r}.")
    tars, texts = sorted(path.glob("*.tar")), sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
    if tars and not texts:
        return tars
    if len(texts) == 1 and not tars:
        return texts
    raise InputError(
        f"The folder {str(path)!r} holds {len(texts)} .json or .jsonl files and {len(tars)} .tar files. One of the "
        "first, or only .tar files, can be read as a whole; otherwise name the file."
    )


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each record of a json list or of json lines; a problem where the text cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        yield line, Problem(str(path), line, "", f"not UTF-8 ({error.reason}); no record of this file was read")
        return
    read = _list_items if text.lstrip()[:1] == "[" else _lines
    empty = True
    for line, value in read(text, str(path)):
        empty = False
        yield line, value
    if empty:
        yield 0, Problem(str(path), 0, "", "no records")


def _lines(text: str, file: str) -> Iterator[tuple[int, Any]]:
    for line, one in enumerate(text.split("\n"), 1):
        if one.strip():
            try:
                yield line, json.loads(one)
            except json.JSONDecodeError as error:
                yield line, Problem(file, line, "", f"not JSON, or cut off: {error.msg} (column {error.colno})")


def _list_items(text: str, file: str) -> Iterator[tuple[int, Any]]:
    """The items of a list one by one, so that each has its line and those before a cut are kept."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _after_space(text, text.index("[") + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            why = f"not JSON, or cut off: {error.msg} (line {error.lineno}, column {error.colno})"
            yield line, Problem(file, line, "", f"{why}; nothing from here on was read")
            return
        yield line, value
        at = _after_space(text, end)
        if text[at : at + 1] == "]":
            return
        if text[at : at + 1] != ",":
            yield line, Problem(file, line, "", "not JSON, or cut off: the list does not go on after this record")
            return
        at = _after_space(text, at + 1)


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


_SPACE = re.compile(r"\s*")


def _read_tar(path: Path, format: str | None) -> Iterator[Record | Problem]:
    """The samples of a tar file: neighbouring members with the same key."""
    key, members = "", {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                own, kind = _key_of(member.name)
                if key != (key := own):
                    yield from _tar_sample(path, members, format)
                    members = {}
                members[kind] = Member(str(path), member.name, member.offset_data, member.size)
            whole = _has_end(path, tar.offset)
        yield from _tar_sample(path, members, format)
        if not whole:  # which tarfile takes for the end
            yield Problem(str(path), key, "", "cut off: the file has no end mark after this sample")
    except tarfile.TarError as error:
        yield Problem(str(path), key, "", f"not an uncompressed tar file, or cut off: {error}")


def _key_of(name: str) -> tuple[str, str]:
    """Key and kind of a member: "./a/0.SEG.png" -> "./a/0", "seg.png"."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return f"{folder}{slash}{stem}", kind.lower()


def _has_end(path: Path, offset: int) -> bool:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _tar_sample(path: Path, members: dict[str, Member], format: str | None) -> Iterator[Record | Problem]:
    if not members:
        return
    key, _ = _key_of(next(iter(members.values())).name)
    images = [one for kind, one in members.items() if f".{kind}".endswith(IMAGE_SUFFIXES)]
    videos = [one for kind, one in members.items() if f".{kind}".endswith(VIDEO_SUFFIXES)]
    texts = [kind for kind in ("json", "txt") if kind in members]
    if len(texts) != 1:
        yield Problem(str(path), key, "", f"one of key.json and key.txt is needed; the sample has {', '.join(members)}")
        return
    try:
        written = members[texts[0]].read().decode()
        raw = json.loads(written) if texts == ["json"] else _captioned(written, images, videos)
    except (ValueError, InputError) as error:
        yield Problem(str(path), key, "", f"{texts[0]} cannot be read: {error}")
        return
    yield from _record(raw, format, None, str(path), key, (images, videos))


def _captioned(text: str, images: list[Member], videos: list[Member]) -> dict[str, Any]:
    places = IMAGE * len(images) + VIDEO * len(videos)
    return {"messages": [{"role": "user", "content": places}, {"role": "assistant", "content": text.strip()}]}


def _saved_dataset(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "datasets", f"The saved data set {path}") from error
    found = datasets.load_from_disk(str(path))
    if isinstance(found, dict):
        raise InputError(f"{path} holds the splits {', '.join(found)}. Give one: {path}/{next(iter(found))}.")
    return found


def _undecoded(rows: Any) -> Any:
    """A data set that gives pictures and videos as they are stored: they are opened when they are needed."""
    if not hasattr(rows, "with_format"):
        return rows
    rows = rows.with_format(None)  # a copy
    waiting = [feature for column, feature in rows.info.features.items() if column in MEDIA_COLUMNS]
    for feature in waiting:
        if hasattr(feature, "decode"):
            feature.decode = False
        waiting += [feature.feature] if hasattr(feature, "feature") else []
    return rows


def _read_rows(
    rows: Any, format: str | None, media: str | Path | None, name: str = "dataset"
) -> Iterator[Record | Problem]:
    rows = _undecoded(rows)
    for i in range(len(rows)):
        raw = {column: value for column, value in rows[i].items() if value is not None}
        for column in MEDIA_COLUMNS:
            value = raw.get(column)
            if isinstance(value, list):
                raw[column] = [
                    one if isinstance(one, (str, list)) else Cell(rows, i, column, j) for j, one in enumerate(value)
                ]
            elif value is not None and not isinstance(value, str):
                raw[column] = Cell(rows, i, column, None)
        yield from _record(raw, format, Path(media or "."), name, i + 1)


# Formats


def _record(
    raw: Any,
    format: str | None,
    folder: Path | None,
    file: str,
    line: int | str,
    beside: tuple[list[Member], list[Member]] | None = None,
) -> Iterator[Record | Problem]:
    """The record of one written sample, or its problems."""
    problems: list[Problem] = []

    def say(field: str, message: str) -> None:
        problems.append(Problem(file, line, field, message))

    if not isinstance(raw, dict):
        say("", f"a record is an object, not {type(raw).__name__}")
    elif chosen := (format if format in FORMATS else _format_of(raw, say)):
        messages, *media = FORMATS[chosen](raw, say)
        read = not problems  # else what follows would also be said of what is missing here
        if beside is not None:
            media = [_beside(*pair, say) for pair in zip(media, beside, ("images", "videos"), strict=True)]
            countable = not problems  # of media that are not in the file, none is left in the list
        else:
            countable = read
            if folder is not None:
                media = [_found(*pair, folder, say) for pair in zip(media, ("images", "videos"), strict=True)]
        if read:
            _check_messages(messages, say)
        if countable:
            for place, media_of, field in zip((IMAGE, VIDEO), media, ("images", "videos"), strict=True):
                count = sum(message.text.count(place) for message in messages)
                if count != len(media_of):
                    say(field, f"{count} {place} places, {len(media_of)} {field}")
        if not problems:
            name = str(raw.get("id", line))
            yield Record(name, tuple(messages), tuple(media[0]), tuple(media[1]), f"{file}:{line}")
    yield from problems


def _format_of(raw: dict[str, Any], say: Say) -> str | None:
    if ("conversations" in raw) == ("messages" in raw):
        both = "both conversations and messages" if "messages" in raw else "neither conversations nor messages"
        say("", f"{both}: name the format, one of {', '.join(FORMATS)}")
        return None
    if "conversations" in raw:
        return "llava"
    said = raw["messages"] if isinstance(raw["messages"], list) else []
    typed = any(isinstance(one, dict) and isinstance(one.get("content"), list) for one in said)
    return "chat" if typed else "swift"


def _llava(raw: dict[str, Any], say: Say) -> Parts:
    messages = _messages(raw, "conversations", "from", "value", say)
    return messages, _media(raw, "image", say), _media(raw, "video", say)


def _swift(raw: dict[str, Any], say: Say) -> Parts:
    messages = _messages(raw, "messages", "role", "content", say)
    return messages, _media(raw, "images", say), _media(raw, "videos", say)


def _chat(raw: dict[str, Any], say: Say) -> Parts:
    """Media stand in the parts, or all of them in the lists `images` and `videos`, as in swift's format."""
    inside: dict[str, list[Any]] = {"image": [], "video": []}

    def text_of(content: Any, field: str) -> str | None:
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else []
        texts = [_part(part, f"{field}[{i}]", inside, say) for i, part in enumerate(parts)]
        return "".join(texts) if isinstance(content, list) else None

    messages = _messages(raw, "messages", "role", "content", say, text_of)
    media = []
    for kind, found in inside.items():
        listed = _media(raw, f"{kind}s", say)
        if found and listed:
            say(
                f"{kind}s",
                f"{len(listed)} are listed, and {len(found)} stand in the messages: their order is not known",
            )
        media.append(found or listed)
    return messages, *media


def _part(part: Any, field: str, inside: dict[str, list[Any]], say: Say) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in inside:
        say(field, "a part is {type: text, text: ...}, {type: image, ...} or {type: video, ...}")
        return ""
    medium = next((part[name] for name in (kind, "path", "url") if part.get(name) is not None), None)
    if medium is not None:
        inside[kind].append(medium)
    return IMAGE if kind == "image" else VIDEO


def _messages(
    raw: dict[str, Any],
    key: str,
    role_key: str,
    text_key: str,
    say: Say,
    text_of: Callable[[Any, str], str | None] = lambda content, field: content if isinstance(content, str) else None,
) -> list[Message]:
    said = raw.get(key)
    if not isinstance(said, list) or not said:
        say(key, "missing, empty or no list")
        return []
    messages = []
    for i, one in enumerate(said):
        one = one if isinstance(one, dict) else {}
        role, text = one.get(role_key), text_of(one.get(text_key), f"{key}[{i}].{text_key}")
        if not isinstance(role, str) or role not in ROLES:
            say(f"{key}[{i}].{role_key}", f"{role!r} is none of {', '.join(ROLES)}")
        elif text is None:
            say(f"{key}[{i}].{text_key}", f"no text: {one.get(text_key)!r}"[:200])
        else:
            messages.append(Message(ROLES[role], text))
    return messages


FORMATS: dict[str, Callable[[dict[str, Any], Say], Parts]] = {
    "llava": _llava,
    "swift": _swift,
    "chat": _chat,
}
NAMES = (*FORMATS, "webdataset")
"""What `format` may be. The samples of a webdataset are again of one of the others."""


def _media(raw: dict[str, Any], key: str, say: Say) -> list[Any]:
    """What a field names: one medium, a list of them, or nothing."""
    value = raw.get(key)
    media = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for i, medium in enumerate(media):
        frames = isinstance(medium, list) and medium and all(isinstance(frame, str) for frame in medium)
        if not (isinstance(medium, (str, Cell)) or (frames and key.startswith("video"))):
            say(f"{key}[{i}]", "a medium is a path" + (" or a list of paths of frames" * key.startswith("video")))
            return []
    return media


# Checks


def _check_messages(messages: Sequence[Message], say: Say) -> None:
    """A system message or none, then questions and answers in turn, none of them empty."""
    opening, in_turn = 1 if messages[0].role == "system" else 0, True
    for i, (role, text) in enumerate(messages):
        wanted = "system" if i < opening else ("user", "assistant")[(i - opening) % 2]
        if in_turn and role != wanted:  # once: after it every turn is another's
            say(f"messages[{i}]", f"{wanted} is expected to speak, not {role}")
            in_turn = False
        if role == "assistant" and not text.strip():
            say(f"messages[{i}]", "the answer is empty")
        if role != "user" and (IMAGE in text or VIDEO in text):
            say(f"messages[{i}]", f"a medium stands with the {role}; it belongs to a question")
    if in_turn and messages[-1].role != "assistant":
        say("messages", "the last question has no answer")


def _found(media: Sequence[Any], field: str, folder: Path, say: Say) -> list[Medium]:
    """Paths that start from the folder; those of files that are not there are problems."""
    found: list[Medium] = []
    for i, medium in enumerate(media):
        paths = [medium] if isinstance(medium, str) else medium if isinstance(medium, list) else []
        whole = [str(folder / path) for path in paths]
        missing = [path for path in whole if not Path(path).exists()]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            say(f"{field}[{i}]", f"no such file: {missing[0]}{more}")
        found.append(whole[0] if isinstance(medium, str) else tuple(whole) if isinstance(medium, list) else medium)
    return found


def _beside(media: Sequence[Any], members: Sequence[Member], field: str, say: Say) -> list[Member]:
    """The media of a tar file's sample: those that its text names, in that order, or all that it has."""
    if not media:
        return list(members)
    by_name = {PurePosixPath(one.name).name: one for one in members}
    for i, medium in enumerate(media):
        if not isinstance(medium, str) or PurePosixPath(medium).name not in by_name:
            say(f"{field}[{i}]", f"{medium!r} is not in the sample, which has {', '.join(by_name) or 'no media'}")
    return [
        by_name[PurePosixPath(one).name] for one in media if isinstance(one, str) and PurePosixPath(one).name in by_name
    ]


def require(problems: Sequence[Problem], what: str) -> None:
    """Raises DatasetError with all of the problems, if there are any."""
    if problems:
        raise DatasetError(
            f"{len(problems)} problems in {what}. See them all with `mmzoo data check`; with on_bad_sample: skip such "
            "samples are left out and counted.",
            map(str, problems),
        )
