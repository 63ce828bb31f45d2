"""Data of one's own: formats, checks, packing, the order of batches and its resumption."""

from __future__ import annotations

import io
import json
import logging
import random
import re
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import mmzoo
from mmzoo.cli import app
from mmzoo.errors import DatasetError, InputError, MissingExtra
from mmzoo.layout import TokenLayout
from mmzoo.media import write_video
from mmzoo.processing import Turn
from mmzoo_training import aki_sft
from mmzoo_training.data import (
    Batching,
    Encoded,
    RecordData,
    RecordLoader,
    Rows,
    Source,
    epoch_order,
    filled_rows,
    load_samples,
    samples_of,
    shares,
    to_count,
)
from mmzoo_training.records import Message, Problem, Record, load_records, open_image, unreadable

FAMILIES = ["aki-tiny", "cca-llava-tiny", "tc-llava-tiny", "video-ccam-tiny", "visualchat-tiny", "favor-tiny"]
COLOURS = ["red", "green", "blue", "yellow", "purple", "white"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, a clip as a file and as frames."""
    place = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(place / f"{i}.png")
    write_video(rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8), place / "clip.mp4", fps=8)
    return place


FRAMES = [f"{i}.png" for i in range(5)]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SWIFT: list[dict[str, Any]] = [
    {"messages": said("<image>what colour is the square", "red"), "images": ["0.png"]},
    {"messages": said("<video>\nhow many", "one", "is there a circle", "yes"), "videos": ["clip.mp4"]},
    {"messages": said("<image><image>which", "blue"), "images": ["1.png", "2.png"]},
    {"messages": said("<image> which <video>", "no"), "images": ["3.png"], "videos": [FRAMES]},
    {"messages": said("is there a square", "yes")},
]


def as_llava(record: dict[str, Any]) -> dict[str, Any]:
    speakers = {"user": "human", "assistant": "gpt"}
    turns = [{"from": speakers[one["role"]], "value": one["content"]} for one in record["messages"]]
    return {
        "conversations": turns,
        **{name[:-1]: value for name, value in record.items() if name in ("images", "videos")},
    }


def as_chat(record: dict[str, Any]) -> dict[str, Any]:
    media = {kind: iter(record.get(f"{kind}s", [])) for kind in ("image", "video")}

    def parts(text: str) -> list[dict[str, Any]]:
        pieces = text.replace("<image>", "\0image\0").replace("<video>", "\0video\0").split("\0")
        return [
            {"type": piece, piece: next(media[piece])} if piece in media else {"type": "text", "text": piece}
            for piece in pieces
            if piece
        ]

    return {"messages": [{**one, "content": parts(one["content"])} for one in record["messages"]]}


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records))
    return path


def content(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(one.messages, one.images, one.videos) for one in records]


# Formats


@pytest.mark.parametrize("named", [True, False])
def test_every_format_gives_the_same_records(folder: Path, tmp_path: Path, named: bool) -> None:
    written = {
        "llava": tmp_path / "llava.json",
        "swift": lines(tmp_path / "swift.jsonl", SWIFT),
        "chat": lines(tmp_path / "chat.jsonl", [as_chat(one) for one in SWIFT]),
    }
    written["llava"].write_text(json.dumps([as_llava(one) for one in SWIFT], indent=1))
    found = {}
    for name, path in written.items():
        found[name], problems = load_records([(path, name if named else None, folder)])
        assert not problems
    assert content(found["llava"]) == content(found["swift"]) == content(found["chat"])
    record = found["swift"][3]
    assert record.messages == (Message("user", "<image> which <video>"), Message("assistant", "no"))
    assert record.images == (str(folder / "3.png"),)
    assert record.videos == (tuple(str(folder / name) for name in FRAMES),)
    assert record.source == f"{written['swift']}:4"
    braces = [i for i, line in enumerate(written["llava"].read_text().split("\n"), 1) if line == " {"]
    assert [record.source for record in found["llava"]] == [f"{written['llava']}:{line}" for line in braces]


def test_one_folder_and_one_json(folder: Path, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    lines(tmp_path / "mine.json", [SWIFT[0]])
    records, problems = load_records([(tmp_path, None, None)])
    assert not problems
    assert records[0].images == (str(tmp_path / "0.png"),)
    lines(tmp_path / "other.json", [SWIFT[0]])
    with pytest.raises(InputError, match="2 .json or .jsonl files"):
        load_records([(tmp_path, None, None)])


def test_chat_media_may_be_listed(folder: Path, tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "which"}]
    record = {"messages": [{"role": "user", "content": parts}, said("", "red")[1]], "images": ["0.png"]}
    (found,), problems = load_records([(lines(tmp_path / "a.jsonl", [record]), "chat", folder)])
    assert (found.messages[0].text, found.images, problems) == ("<image>which", (str(folder / "0.png"),), [])
    parts[0]["image"] = "1.png"
    _, (problem,) = load_records([(lines(tmp_path / "a.jsonl", [record]), "chat", folder)])
    assert "order is not known" in problem.message


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(folder: Path, tmp_path: Path) -> Path:
    return tar(
        tmp_path / "shard-0.tar",
        {
            "a/0.json": json.dumps({"messages": SWIFT[0]["messages"]}).encode(),
            "a/0.png": (folder / "0.png").read_bytes(),
            "a/1.txt": b" red circle \n",
            "a/1.png": (folder / "1.png").read_bytes(),
            "a/2.json": json.dumps(as_llava({**SWIFT[1], "videos": ["2.mp4"]})).encode(),
            "a/2.mp4": (folder / "clip.mp4").read_bytes(),
            "a/3.png": (folder / "1.png").read_bytes(),
            "a/4.json": json.dumps(as_llava(SWIFT[0])).encode(),
            "a/4.png": (folder / "1.png").read_bytes(),
        },
    )


def test_tar_files(folder: Path, shard: Path) -> None:
    records, problems = load_records([(shard, "webdataset", None)])
    assert [record.id for record in records] == ["a/0", "a/1", "a/2"]
    assert records[1].messages == (Message("user", "<image>"), Message("assistant", "red circle"))
    with Image.open(folder / "0.png") as picture:
        assert np.array_equal(np.asarray(open_image(records[0].images[0])), np.asarray(picture))
    assert not any(unreadable(record) for record in records)
    assert [(one.line, one.field) for one in problems] == [("a/3", ""), ("a/4", "images[0]")]
    assert "0.png' is not in the sample, which has 4.png" in problems[1].message
    model = mmzoo.create("video-ccam-tiny")
    samples, _ = load_samples(Source(shard), model.processor, "chat", 400, None)
    batch, unread = Rows(samples, model.processor).collate([Rows(samples, model.processor)[[0, 1, 2]]])
    assert not unread
    assert batch is not None
    assert batch["num_frames"].tolist() == [[1, 1, 4]]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_tar_file_that_is_cut_off(shard: Path, share: float) -> None:
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * share)])
    assert "cut off" in load_records([(shard, None, None)])[1][-1].message


def test_a_list_that_is_cut_off_keeps_what_stands_before(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole = json.dumps([as_llava(one) for one in SWIFT])
    ends = [len(json.dumps([as_llava(one) for one in SWIFT[:n]])) - 1 for n in range(1, 6)]
    for cut in (1, 40, ends[0], ends[0] + 1, ends[1] - 3, ends[2] + 2, len(whole) - 1):
        path.write_text(whole[:cut])
        records, problems = load_records([(path, None, folder)])
        assert len(records) == sum(end <= cut for end in ends)
        assert [one.line for one in problems] == [1]
    path.write_text("[]")
    assert "no records" in load_records([(path, None, folder)])[1][0].message
    path.write_bytes(b'[{"id": "\xff"}]')
    assert "not UTF-8" in load_records([(path, None, folder)])[1][0].message


class Table:
    """A stand-in for `datasets.Dataset`: rows by number, pictures decoded."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def test_rows_of_a_data_set(folder: Path) -> None:
    with Image.open(folder / "0.png") as opened:
        picture = opened.convert("RGB")
    undecoded = {"bytes": (folder / "1.png").read_bytes(), "path": None}
    rows = [
        {"messages": SWIFT[0]["messages"], "images": [picture], "videos": None},
        {"messages": SWIFT[2]["messages"], "images": [undecoded, {"bytes": None, "path": str(folder / "2.png")}]},
        {"conversations": as_llava(SWIFT[0])["conversations"], "image": picture},
        {"messages": SWIFT[0]["messages"], "images": []},
    ]
    records, (problem,) = load_records([(Table(rows), None, None)])
    assert np.array_equal(np.asarray(open_image(records[0].images[0])), np.asarray(picture))
    assert np.array_equal(np.asarray(open_image(records[2].images[0])), np.asarray(picture))
    assert not any(unreadable(record) for record in records)
    assert (problem.line, problem.field) == (4, "images")


def test_data_sets_of_hugging_face(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, saved, and read from a file of lines or a parquet file; media are opened when they are needed."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "messages": datasets.List({"role": text, "content": text}),
            "images": datasets.List(datasets.Image()),
            "videos": datasets.List(datasets.Video()),
        }
    )
    rows = [
        {"messages": said("<image>which", "red"), "images": [str(folder / "0.png")], "videos": []},
        {"messages": said("<video>which", "blue"), "images": [], "videos": [str(folder / "clip.mp4")]},
    ]
    memory = datasets.Dataset.from_list(rows, features=features)
    memory.to_parquet(tmp_path / "a.parquet")
    memory.save_to_disk(tmp_path / "saved")
    read = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    parquet = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), **read)
    for source in (memory, tmp_path / "saved", parquet):
        records, problems = load_records([(source, None, None)])
        assert [record.messages[1].text for record in records] == ["red", "blue"]
        assert not problems and not any(unreadable(record) for record in records)
        with Image.open(folder / "0.png") as picture:
            assert np.array_equal(np.asarray(open_image(records[0].images[0])), np.asarray(picture.convert("RGB")))
    assert memory.features == features
    typed = {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "which"}]}
    file = lines(tmp_path / "chat.jsonl", [{"messages": [typed, said("", "red")[1]]}] * 2)
    rows_of_lines = datasets.load_dataset("json", data_files=str(file), **read)
    records, problems = load_records([(rows_of_lines, None, folder)])
    assert [record.messages[0].text for record in records] == ["<image>which"] * 2 and not problems


def test_shards_that_webdataset_writes(folder: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    picture = np.asarray(Image.open(folder / "0.png").convert("RGB"))
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "a/0", "png": picture, "json": {"messages": SWIFT[0]["messages"]}})
        writer.write({"__key__": "a/1", "jpg": picture, "txt": "red circle"})
        writer.write({"__key__": "a/2", "mp4": (folder / "clip.mp4").read_bytes(), "txt": "a collision"})
    records, problems = load_records([(tmp_path / "s.tar", "webdataset", None)])
    assert [record.id for record in records] == ["a/0", "a/1", "a/2"] and not problems
    assert np.array_equal(np.asarray(open_image(records[0].images[0])), picture)
    assert not any(unreadable(record) for record in records)


def test_names_in_a_tar_file_may_begin_with_a_dot(folder: Path, tmp_path: Path) -> None:
    picture = (folder / "0.png").read_bytes()
    path = tar(
        tmp_path / "a.tar", {f"./{i}.{kind}": data for i in "01" for kind, data in (("txt", b"a"), ("png", picture))}
    )
    assert [record.id for record in load_records([(path, None, None)])[0]] == ["./0", "./1"]


def test_a_saved_data_set_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(MissingExtra, match="datasets"):
        load_records([(tmp_path, None, None)])


# Checks

BAD: list[tuple[Any, str, str]] = [
    ({**SWIFT[0], "images": []}, "images", "1 <image> places, 0 images"),
    ({**SWIFT[0], "images": ["0.png", "1.png"]}, "images", "1 <image> places, 2 images"),
    ({**SWIFT[1], "videos": None}, "videos", "1 <video> places, 0 videos"),
    ({**SWIFT[0], "images": ["none.png"]}, "images[0]", "no such file: .*none.png"),
    ({**SWIFT[3], "videos": [["0.png", "x.png", "y.png"]]}, "videos[0]", "no such file: .*x.png and 1 more"),
    ({**SWIFT[0], "images": [["0.png", "1.png"]]}, "images[0]", "a medium is a path$"),
    ({**SWIFT[0], "images": [7]}, "images[0]", "a medium is a path$"),
    ({"messages": said("what", "")}, "messages[1]", "the answer is empty"),
    ({"messages": said("what", "red", "which")}, "messages", "the last question has no answer"),
    ({"messages": said("what", "red")[::-1]}, "messages[0]", "user is expected to speak, not assistant"),
    ({"messages": [*said("what", "red"), {"role": "system", "content": "x"}]}, "messages[2]", "not system"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot' is none of"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "no text: None"),
    ({"messages": said("what", "<image>"), "images": ["0.png"]}, "messages[1]", "a medium stands with the assistant"),
    ({"messages": []}, "messages", "missing, empty or no list"),
    ({"messages": [], "conversations": []}, "", "both conversations and messages: name the format"),
    ({"id": 3}, "", "neither conversations nor messages"),
    ([1], "", "a record is an object, not list"),
    ('{"messages": [', "", "not JSON, or cut off"),
    ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages[0].content[0]", "a part is"),
]


@pytest.mark.parametrize(("record", "field", "message"), BAD)
def test_a_problem_says_where_and_what(folder: Path, tmp_path: Path, record: Any, field: str, message: str) -> None:
    path = lines(tmp_path / "a.jsonl", [SWIFT[0], "", record, SWIFT[4]])
    records, (problem, *more) = load_records([(path, None, folder)])
    assert content(records) == content(
        load_records([(lines(tmp_path / "b.jsonl", [SWIFT[0], SWIFT[4]]), None, folder)])[0]
    )
    assert (problem.file, problem.line, problem.field, more) == (str(path), 3, field, [])
    assert re.search(message, problem.message)
    assert str(problem) == f"{path}:3:" + (f"{field}: " if field else " ") + problem.message


def test_every_problem_of_a_record_is_found(folder: Path, tmp_path: Path) -> None:
    record = {"messages": said("<image>", " "), "images": ["x.png", "y.png"]}
    _, problems = load_records([(lines(tmp_path / "a.jsonl", [record]), None, folder)])
    assert [one.field for one in problems] == ["images[0]", "images[1]", "messages[1]", "images"]
    record["images"] = []
    _, problems = load_records([(lines(tmp_path / "a.jsonl", [record]), None, folder)])
    assert [one.field for one in problems] == ["messages[1]", "images"]
    record = {"messages": [*said("what", "red")[::-1], *said("<image>", " ")], "images": ["x.png"]}
    _, problems = load_records([(lines(tmp_path / "a.jsonl", [record]), None, folder)])
    assert [one.field for one in problems] == ["images[0]", "messages[0]", "messages[3]"]


def test_a_folder_that_is_not_there_is_told_from_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file or folder '.*none'"):
        load_records([(tmp_path / "none", None, None)])
    with pytest.raises(InputError, match=r"holds 0 \.json or \.jsonl files and 0 \.tar files"):
        load_records([(tmp_path, None, None)])


def test_the_command_lists_every_problem(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    path = lines(tmp_path / "a.jsonl", [*SWIFT, {**SWIFT[0], "images": ["broken.png"]}])
    run = CliRunner().invoke
    fine = run(app, ["data", "check", str(path), "--media", str(folder)])
    assert fine.exit_code == 0
    assert "6 usable records, 5 images, 2 videos; 0 problems" in fine.output
    opened = run(app, ["data", "check", str(path), "--media", str(folder), "--read-media", "--format", "swift"])
    assert opened.exit_code == 1
    assert "images[0]" in opened.output
    assert "5 usable records, 5 images, 2 videos; 1 problems" in opened.output
    lines(path, [one for one, _, _ in BAD])
    bad = run(app, ["data", "check", str(path), "--media", str(folder)])
    assert bad.exit_code == 1
    assert "0 usable records" in bad.output
    shown = re.sub(r"\W", "", bad.output)  # the table breaks its cells
    assert all(re.sub(r"\W", "", part) in shown for part in ("robot", "messages[2]", "notJSON,orcutoff"))
    assert f"{len(BAD)} problems" in bad.output


@pytest.mark.parametrize("name", ["nothing.json", "picture.txt"])
def test_a_file_of_another_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "picture.txt").write_text("x")
    with pytest.raises(InputError, match=name):
        load_records([(tmp_path / name, None, None)])
    with pytest.raises(InputError, match="Unknown format 'coco'. Known: llava, swift, chat, webdataset"):
        load_records([(tmp_path / name, "coco", None)])


# Texts and labels


def record(*turns: tuple[str, str], system: str | None = None, images: int = 0, videos: int = 0) -> Record:
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Record("a", tuple(messages), ("i",) * images, ("v",) * videos, "a.json:1")


def labelled(processor: Any, batch: dict[str, Any]) -> list[str]:
    """The words that are trained, a string for each run of them."""
    runs: list[list[int]] = []
    for label, before in zip(batch["labels"][0].tolist(), [-100, *batch["labels"][0].tolist()], strict=False):
        if label != -100:
            runs += [[]] if before == -100 else []
            runs[-1].append(label)
    return [processor.tokenizer.decode(run) for run in runs]


ENDS = {"aki": "<|endoftext|>", "cca": "<|endoftext|>", "tc": "<|endoftext|>", "video": "<|end|>"}


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_exactly_the_answers(name: str) -> None:
    processor = mmzoo.create(name).processor
    words = st.lists(st.sampled_from([*COLOURS, "square", "is", "no"]), min_size=1, max_size=3).map(" ".join)
    picture = Image.new("RGB", (20, 20))

    @given(st.lists(st.tuples(words, words, st.integers(0, 2)), min_size=1, max_size=3), st.booleans())
    def check(turns: list[tuple[str, str, int]], first: bool) -> None:
        asked = [("<image>" * n + q if first else q + " <image>" * n, a) for q, a, n in turns]
        samples = samples_of(record(*asked, images=sum(n for *_, n in turns)), processor, "chat", "s")
        assert len(samples) == (1 if processor.multi_turn else len(turns))
        found = []
        for sample in samples:
            batch = processor(sample.text, images=[picture] * len(sample.images), labels=True, padding_side="right")
            found += labelled(processor, batch)
        end = ENDS.get(name.partition("-")[0], "<|endoftext|>")
        if name.startswith("visualchat"):  # whose markers are unknown words to the tiny tokenizer
            assert [one.split()[-1] for one in found] == [end] * len(turns)
            return
        assert found == [f"{answer} {end}" for _, answer in asked]

    check()


def test_akis_turns_are_samples_of_their_own() -> None:
    """As in its fine-tuning: every question has its own picture, and the history is dropped."""
    processor = mmzoo.create("aki-tiny").processor
    processor.system = "be kind"
    written = as_llava({"messages": said("<image>\nwhat is it", "red", "is it small", "no"), "images": ["0.png"]})
    upstream = aki_sft.llava_samples({**written, "image": "0.png"}, "folder")
    ours = samples_of(record(("<image>\nwhat is it", "red"), ("is it small", "no"), images=1), processor, "chat", "s")
    assert [
        one.text.replace("be kind", aki_sft.sft_prompt("").split("\n")[1].removesuffix("<|end|>")) for one in ours
    ] == [one["text"] + "<|endoftext|>" for one in upstream]
    assert [one.images for one in ours] == [("i",), ("i",)]


def test_a_system_text_of_the_data_is_used_or_refused() -> None:
    one = record(("what", "red"), system="speak in colours")
    for name in FAMILIES:
        processor = mmzoo.create(name).processor
        if name in ("favor-tiny", "video-ccam-tiny"):
            with pytest.raises(InputError, match="no place"):
                samples_of(one, processor, "chat", "s")
        else:
            assert samples_of(one, processor, "chat", "s")[0].text.count("speak in colours") == 1


def test_a_text_with_a_marker_is_refused() -> None:
    for name, marker in (("aki-tiny", "<|assistant|>"), ("video-ccam-tiny", "<|user|>"), ("visualchat-tiny", "<s>")):
        with pytest.raises(InputError, match=re.escape(repr(marker))):
            samples_of(record((f"what {marker}", "red")), mmzoo.create(name).processor, "chat", "s")


def test_captions() -> None:
    wanted = {
        "aki-tiny": "<image>red circle<|endofchunk|><|endoftext|>",
        "cca-llava-tiny": "<image>red circle\n",
        "video-ccam-tiny": "<image>red circle<|endoftext|>",
    }
    for name, text in wanted.items():
        one = record(("<image> describe", "red circle"), images=1)
        assert samples_of(one, mmzoo.create(name).processor, "caption", "s")[0].text == text
    with pytest.raises(InputError, match="one turn"):
        samples_of(
            record(("what", "red"), ("<image>", "blue"), images=1), mmzoo.create("aki-tiny").processor, "caption", "s"
        )


def test_images_are_numbered_over_a_dialogue() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    text = processor.dialogue([Turn("one", "two", "<image><image>"), Turn("three", "four", "<image><video>")])
    assert re.findall(r"Image \d|<video>", text) == ["Image 1", "Image 2", "Image 3", "<video>"]
    with pytest.raises(InputError, match="after a video"):
        processor.dialogue([Turn("one", "two", "<video>"), Turn("three", "four", "<image>")])


def test_a_cut_that_takes_the_answer_is_a_problem(folder: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [SWIFT[0], {**SWIFT[4], "messages": said("is " * 60, "yes")}])
    source, processor = Source(path, media=str(folder)), mmzoo.create("aki-tiny").processor
    samples, (problem,) = load_samples(source, processor, "chat", 100, 20)
    assert (len(samples), problem.line) == (1, "2")
    assert "nothing of the answer is left of the first 20 tokens" in problem.message
    samples, (problem,) = load_samples(source, processor, "chat", 40, None)
    assert "a row has 40 (max_tokens)" in problem.message


# Packing


def mixed(folder: Path, tmp_path: Path, name: str) -> tuple[Any, Rows]:
    """A tiny model, and samples of several lengths that it takes."""
    torch.manual_seed(0)
    model = mmzoo.create(name).eval()
    samples, problems = load_samples(
        Source(lines(tmp_path / "a.jsonl", SWIFT), media=str(folder)), model.processor, "chat", 400, None
    )
    assert not problems
    return model, Rows(samples, model.processor, pad_to_multiple_of=3)


def losses(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    """The sum over the tokens of every sample, row by row."""
    layout, inputs = TokenLayout(batch["layout"]), {key: batch[key] for key in batch.keys() - {"source", "labels"}}
    with torch.no_grad():
        logits = model(**inputs).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
    each = each.unflatten(0, logits[:, 1:].shape[:2])
    return [
        each[row][layout.sample[row, 1:] == sample].sum()
        for row in range(len(each))
        for sample in range(int(layout.sample[row].max()) + 1)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_samples_have_the_losses_they_have_alone(folder: Path, tmp_path: Path, name: str) -> None:
    model, rows = mixed(folder, tmp_path, name)
    count = len(rows.samples)
    assert count == (6 if name == "aki-tiny" else 5)
    alone = [losses(model, rows.collate([rows[[i]]])[0])[0] for i in range(count)]
    order = random.Random(name).sample(range(count), count)
    packed, problems = rows.collate([rows[order[:3]], rows[order[3:]]])
    assert not problems
    assert packed["input_ids"].shape[1] % 3 == 0
    assert packed["source"] == ["a"] * count
    torch.testing.assert_close(torch.stack(losses(model, packed)), torch.stack([alone[i] for i in order]))
    # The mean over tokens does not depend on which samples share a row.
    unpacked, _ = rows.collate([rows[[i]] for i in order])
    inputs = [{key: one[key] for key in one.keys() - {"source"}} for one in (packed, unpacked)]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs[0]).loss, model(**inputs[1]).loss)
    assert all(one > 0 for one in alone)


def test_a_packed_caption_is_not_predicted_from_the_one_before(folder: Path) -> None:
    model = mmzoo.create("aki-tiny").eval()
    captions = [record(("<image>", words), images=1) for words in ("red circle", "a blue square")]
    samples = [samples_of(one, model.processor, "caption", "s")[0] for one in captions]
    made = [model.processor.sample(one.text, [folder / "0.png"]) for one in samples]
    assert made[1][1].role[0, 0] == 1
    rows = Rows(samples, model.processor)
    rows.encoded = lambda sample: rows_of[sample.text]  # type: ignore[method-assign]
    rows_of = {sample.text: Encoded(*found, "s") for sample, found in zip(samples, made, strict=True)}
    both, alone = rows.collate([rows[[0, 1]]])[0], rows.collate([rows[[1]]])[0]
    start = len(made[0][0])
    assert both["labels"][0, start] == -100
    assert both["labels"][0, start + 1 :].tolist() == alone["labels"][0, 1:].tolist()
    torch.testing.assert_close(losses(model, both)[1], losses(model, alone)[0])


def test_an_order_of_images_by_row_refuses_packing() -> None:
    model = mmzoo.create("visualchat-tiny", image_order="upstream")
    text = model.processor.dialogue([Turn("what", "red", "<image>")])
    picture = Image.new("RGB", (20, 20))
    rows = Rows([], model.processor)
    one = Encoded(*model.processor.sample(text, [picture]), "s")
    inputs = [{k: v for k, v in rows.packed(row).items() if k != "source"} for row in ([[one]], [[one, one]])]
    model(**inputs[0])
    with pytest.raises(InputError, match="do not pack"):
        model(**inputs[1])


# The order of batches

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@example([60, 50, 50], 5, 150, False, 100)  # three rows as wide as the last would fit
@given(LENGTHS, st.integers(1, 5), st.sampled_from([None, 60, 150]), st.booleans(), st.sampled_from([1, 7, 100]))
def test_every_sample_is_once_in_a_batch_that_fits(
    lengths: list[int], batch_size: int, batch_tokens: int | None, pack: bool, window: int
) -> None:
    batching = Batching(60, batch_size, batch_tokens, pack, window)
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    batches = batching.batches(lengths, order, random.Random(1))
    assert sorted(i for batch in batches for row in batch for i in row) == list(range(len(lengths)))
    for batch in batches:
        widths = [sum(lengths[i] for i in row) for row in batch]
        assert 1 <= len(batch) <= batch_size
        assert max(widths) <= 60
        assert batch_tokens is None or max(widths) * len(widths) <= batch_tokens
        assert pack or all(len(row) == 1 for row in batch)
    assert batches == batching.batches(lengths, order, random.Random(1))


def test_a_window_brings_samples_of_like_length_together() -> None:
    lengths = [random.Random(i).randint(1, 100) for i in range(400)]

    def padding(window: int) -> int:
        batches = Batching(100, 8, None, False, window).batches(lengths, range(400), random.Random(0))
        return sum(max(lengths[i] for (i,) in batch) * len(batch) for batch in batches) - sum(lengths)

    assert padding(200) < padding(1) / 5


@given(LENGTHS)
def test_rows_are_filled_before_new_ones_are_begun(lengths: list[int]) -> None:
    rows = filled_rows(range(len(lengths)), lengths, 60)
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert max(sizes) <= 60
    assert sum(size <= 30 for size in sizes) <= 1  # two of these would have shared a row


def test_weights_share_an_epoch() -> None:
    groups = [range(10), range(10, 40), range(40, 44)]
    order = epoch_order(groups, [3.0, 1.0, 0.4], random.Random(0))
    counts = [sum(i in group for i in order) for group in groups]
    assert counts == shares([3.0, 1.0, 0.4], 44) == [30, 10, 4]
    assert {order.count(i) for i in range(10)} == {3}
    assert max(order.count(i) for i in range(10, 40)) == 1
    assert sorted(epoch_order(groups, None, random.Random(0))) == list(range(44))
    assert epoch_order(groups, [3.0, 1.0, 0.4], random.Random(0)) == order
    assert epoch_order(groups, [3.0, 1.0, 0.4], random.Random(1)) != order
    with pytest.raises(InputError, match="Without: b"):
        RecordData([Source("a.json", weight=1.0), Source("b.json")])


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 1000))
def test_shares_are_whole_and_fair(weights: list[float], total: int) -> None:
    counts = shares(weights, total)
    assert sum(counts) == total
    assert all(abs(count - total * w / sum(weights)) < 1 + 1e-6 for count, w in zip(counts, weights, strict=True))


def test_as_many_batches_as_the_first_epoch() -> None:
    batches = [[[0], [1], [2]], [[3]]]
    assert to_count(batches, 3) == [[[0]], [[1], [2]], [[3]]]
    assert to_count(batches, 1) == batches[:1]
    with pytest.raises(InputError, match="4 rows are too few for 5"):
        to_count(batches, 5)


def test_bad_batching_is_refused() -> None:
    with pytest.raises(InputError, match="batch_tokens=100 is less than one row"):
        Batching(max_tokens=200, batch_tokens=100)
    with pytest.raises(InputError, match="at least 1"):
        Batching(batch_size=0)


# Loading and resuming


@pytest.fixture
def clips(folder: Path, tmp_path: Path) -> Path:
    """24 samples about one or two pictures each."""
    rng = random.Random(0)
    records = []
    for i in range(24):
        images = [f"{rng.randrange(6)}.png" for _ in range(1 + i % 2)]
        words = " ".join(rng.choice(COLOURS) for _ in range(1 + i % 7))
        records.append({"messages": said("<image>" * len(images) + words, COLOURS[i % 6]), "images": images})
    return lines(tmp_path / "clips.jsonl", records)


def data(clips: Path, folder: Path, **options: Any) -> RecordData:
    options = {"max_tokens": 60, "batch_size": 2, "model_name": "aki-tiny", **options}
    return RecordData([Source(clips, media=str(folder))], **options)


def ids(batches: Any) -> list[list[int]]:
    return [batch["input_ids"].flatten().tolist() for batch in batches]


@pytest.mark.parametrize("pack", [True, False])
def test_a_loader_goes_on_with_the_batches_that_remained(clips: Path, folder: Path, pack: bool) -> None:
    options = {"pack": pack, "window": 6}
    whole = data(clips, folder, **options).train_dataloader()
    epochs = [ids(whole) for _ in range(3)]
    assert len(whole) == len(epochs[0]) == len(epochs[1]) == len(epochs[2]) > 3
    assert epochs[0] != epochs[1] != epochs[2]
    for taken in (0, 1, 3, len(whole)):
        first = data(clips, folder, **options).train_dataloader()
        assert ids(islice(first, taken)) == epochs[0][:taken]
        state = first.state_dict()
        second = data(clips, folder, **options).train_dataloader()
        second.load_state_dict(json.loads(json.dumps(state)))
        if taken < len(whole):
            assert ids(second) == epochs[0][taken:]
        assert ids(second) == epochs[1]
        assert ids(second) == epochs[2]
    other = data(clips, folder, seed=1, **options).train_dataloader()
    assert ids(other) != epochs[0]
    with pytest.raises(InputError, match="other samples, batching or seed"):
        other.load_state_dict(state)


def test_a_pass_that_was_left_goes_on(clips: Path, folder: Path) -> None:
    """As Lightning's `limit_train_batches` leaves it, and its resumption at the end of an epoch."""
    loader, whole = (data(clips, folder).train_dataloader() for _ in range(2))
    stream = ids(whole) + ids(whole)
    iter(loader)
    left = iter(loader)
    next(left)
    assert ids(loader) == stream[1 : len(whole) + 1]
    assert (loader.epoch, loader.batch) == (1, 1)


def test_loading_draws_nothing_from_the_global_generator(clips: Path, folder: Path) -> None:
    loader = data(clips, folder).train_dataloader()
    before, python = torch.get_rng_state(), random.getstate()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_processes_share_the_batches(clips: Path, folder: Path) -> None:
    whole = data(clips, folder).train_dataloader()
    parts = []
    for rank in range(2):
        parts.append(RecordLoader(whole.rows, whole.groups, whole.batching, rank=rank, world_size=2))
    single = ids(RecordLoader(whole.rows, whole.groups, whole.batching))
    both = [ids(part) for part in parts]
    assert len(both[0]) == len(both[1]) == len(parts[0]) == len(single) // 2
    assert [one for pair in zip(*both, strict=True) for one in pair] == single[: 2 * len(parts[0])]
    assert parts[0].state_dict()["batch"] == 2 * len(parts[0])


def test_validation_is_the_same_every_time(clips: Path, folder: Path) -> None:
    module = RecordData([Source(clips)], [Source(clips, media=str(folder))], "aki-tiny", max_tokens=60)
    loader = module.val_dataloader()
    assert ids(loader) == ids(loader)
    assert data(clips, folder).val_dataloader() == []


def test_workers_give_the_same_batches(clips: Path, folder: Path) -> None:
    assert ids(data(clips, folder, num_workers=1).train_dataloader()) == ids(data(clips, folder).train_dataloader())


class Learning(lightning.LightningModule):
    """Trains a tiny model, and notes what it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = mmzoo.create("aki-tiny").train()
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        assert all(source == "clips" for source in batch.pop("source"))
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trained(module: Learning, datamodule: RecordData, steps: int, place: Path, start: Path | None = None) -> Path:
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=place, max_epochs=-1,
    )  # fmt: skip
    trainer.fit(module, datamodule, ckpt_path=start, weights_only=True)
    trainer.save_checkpoint(place / f"{steps}.ckpt")
    return place / f"{steps}.ckpt"


def test_lightning_resumes_in_the_middle_of_an_epoch(clips: Path, folder: Path, tmp_path: Path) -> None:
    whole = Learning()
    length = len(data(clips, folder).train_dataloader())
    trained(whole, data(clips, folder), 2 * length + 2, tmp_path)
    assert len(whole.seen) == 2 * length + 2
    for cut in (2, length, length + 3):
        first, second = Learning(), Learning()
        checkpoint = trained(first, data(clips, folder), cut, tmp_path)
        trained(second, data(clips, folder), 2 * length + 2, tmp_path, checkpoint)
        assert first.seen + second.seen == whole.seen
        for one, other in zip(whole.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)


# Bad media in the middle of an epoch


@pytest.fixture
def broken(clips: Path, folder: Path) -> Path:
    """The 24 samples, two of which name a picture that is cut off; it passes the checks that open nothing."""
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    records = [json.loads(line) for line in clips.read_text().split("\n")]
    for i in (5, 12):
        records[i]["images"][0] = "broken.png"
    return lines(clips, records)


def test_a_broken_picture_is_an_error(broken: Path, folder: Path) -> None:
    loader = data(broken, folder).train_dataloader()
    with pytest.raises(DatasetError, match=r"clips.jsonl:(6|13): Cannot read the image .*broken.png") as caught:
        list(loader)
    assert len(caught.value.problems) == 1
    assert 0 < loader.batch <= len(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_or_is_counted_and_left_out(
    broken: Path, folder: Path, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    loader = data(broken, folder, on_bad_sample="skip", num_workers=num_workers).train_dataloader()
    with caplog.at_level(logging.WARNING):
        batches = list(loader)
    assert len(batches) == len(loader)
    assert sum(len(batch["source"]) for batch in batches) == 22
    assert sorted(problem.line for problem in loader.skipped) == ["13", "6"]
    assert "epoch 0: 2 samples could not be read and were left out" in caplog.text
    again = data(broken, folder, on_bad_sample="skip").train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert again.skipped == loader.skipped


def test_a_batch_of_nothing_is_left_out(broken: Path, folder: Path) -> None:
    loader = data(broken, folder, on_bad_sample="skip", pack=False, batch_size=1).train_dataloader()
    assert len(list(loader)) == 22
    assert loader.batch == len(loader) == 24


def test_bad_records_are_an_error_or_counted(clips: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines(
        clips,
        [
            *clips.read_text().split("\n"),
            '{"messages": [',
            {**SWIFT[0], "images": []},
            {"messages": said("is " * 80, "no")},
        ],
    )
    with pytest.raises(DatasetError) as caught:
        data(clips, folder).train_dataloader()
    assert [re.search(r":(\d+):", one)[1] for one in caught.value.problems] == ["25", "26", "27"]  # type: ignore[index]
    assert all(one in str(caught.value) for one in caught.value.problems)
    with caplog.at_level(logging.WARNING):
        loader = data(clips, folder, on_bad_sample="skip").train_dataloader()
    assert len(loader.lengths) == 24
    assert "3 samples failed the checks" in caplog.text
    lines(clips, [{"id": 1}])
    with pytest.raises(DatasetError, match="no sample that can be used"):
        data(clips, folder, on_bad_sample="skip").train_dataloader()


def test_a_sample_of_another_length_than_planned_is_a_problem(clips: Path, folder: Path) -> None:
    rows = data(clips, folder).train_dataloader().rows
    found = rows.encoded(rows.samples[0]._replace(length=3))
    assert isinstance(found, Problem)
    assert "3 tokens were planned for" in found.message


def test_the_command_line_reads_its_options(clips: Path, folder: Path) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(lightning.LightningDataModule, "data")
    options = {"sources": [{"path": str(clips), "media": str(folder), "weight": 2.0}], "max_tokens": 70}
    config = parser.parse_object({"data": {"class_path": "mmzoo_training.data.RecordData", "init_args": options}})
    module = parser.instantiate_classes(config).data
    assert module.sources == [Source(str(clips), media=str(folder), weight=2.0)]
    assert module.batching.max_tokens == 70
    options["on_bad_sample"] = "replace"
    with pytest.raises(jsonargparse.ArgumentError, match="on_bad_sample"):
        parser.parse_object({"data": {"class_path": "mmzoo_training.data.RecordData", "init_args": options}})
