"""Damage checkpoints of a tiny model in every way we know, load each, and count what happens.

    python scripts/damaged_checkpoints.py [--count 1000] [--seed 0] [--output FILE]

A load ends in CheckpointError, or gives the saved tensors bit by bit with the saved configuration and processor.
Anything else is a failure: another exception, a difference that nobody noticed, or code from the checkpoint that ran.
Exit status 1 if there is one. The same checkpoints are loaded once more with verify=False, which shows what the digests
are for: there only differences are allowed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import mmzoo
from mmzoo import hub
from mmzoo.errors import CheckpointError
from mmzoo.files import replacing

NAME, SHARDS = "aki-tiny", "100KB"
GOOD, DIFFERENT = ("CheckpointError", "identical"), "a silent difference"
REFUSED, CONTROLS = ("none", "CheckpointError"), 4
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "damaged_checkpoints.json"


class Code:
    """What a hostile pickle holds: unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker,)


def some(rng: random.Random, folder: Path, pattern: str) -> Path:
    return rng.choice(sorted(folder.glob(pattern)))


def flip(path: Path, rng: random.Random, start: int, stop: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(bits):
        content[rng.randrange(start, min(stop, len(content)))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def header_end(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + struct.unpack("<Q", file.read(8))[0]


def data_bit(folder: Path, rng: random.Random, other: Path) -> None:
    path = some(rng, folder, "*.safetensors")
    flip(path, rng, header_end(path), sys.maxsize)


def header_bit(folder: Path, rng: random.Random, other: Path) -> None:
    path = some(rng, folder, "*.safetensors")
    flip(path, rng, 0, header_end(path))


def many_bits(folder: Path, rng: random.Random, other: Path) -> None:
    flip(some(rng, folder, "*.safetensors"), rng, 0, sys.maxsize, rng.randint(2, 100))


def truncated(folder: Path, rng: random.Random, other: Path) -> None:
    path = some(rng, folder, "*.safetensors")
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def appended(folder: Path, rng: random.Random, other: Path) -> None:
    path = some(rng, folder, "*.safetensors")
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 5000)))


def zeros(folder: Path, rng: random.Random, other: Path) -> None:
    path = some(rng, folder, "*.safetensors")
    content, length = path.read_bytes(), rng.randint(1, 4096)
    start = rng.randrange(len(content) - length)
    path.write_bytes(content[:start] + bytes(length) + content[start + length :])


def swapped_tensors(folder: Path, rng: random.Random, other: Path) -> None:
    """Two tensors of one shape trade places in the header: every byte of the data stays."""
    path = some(rng, folder, "*.safetensors")
    content, end = path.read_bytes(), header_end(path)
    header = json.loads(content[8:end])
    shapes: dict[str, list[str]] = {}
    for name in header.keys() - {"__metadata__"}:
        shapes.setdefault(str(header[name]["shape"]), []).append(name)
    pairs = [sorted(names) for _, names in sorted(shapes.items()) if len(names) > 1]
    one, another = rng.sample(rng.choice(pairs), 2)
    header[one], header[another] = header[another], header[one]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def wrong_shard(folder: Path, rng: random.Random, other: Path) -> None:
    path = some(rng, folder, "*.safetensors")
    shutil.copy(other / path.name, path)


def missing_file(folder: Path, rng: random.Random, other: Path) -> None:
    rng.choice(sorted(path for path in folder.iterdir() if path.name != "README.md")).unlink()


def index_out_of_the_folder(folder: Path, rng: random.Random, other: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        path.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}))
    index = json.loads(path.read_text())
    outside = shutil.copy(some(rng, folder, "*.safetensors"), folder.parent / "outside.safetensors")
    places = [
        "../outside.safetensors",
        str(outside),
        "./../outside.safetensors",
        "/etc/passwd",
        "..",
        "a/b.safetensors",
    ]
    index["weight_map"][rng.choice(sorted(index["weight_map"]))] = rng.choice(places)
    path.write_text(json.dumps(index))


def index_bits(folder: Path, rng: random.Random, other: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if path.exists():
        flip(path, rng, 0, sys.maxsize, rng.randint(1, 3))
    else:
        path.write_bytes(rng.randbytes(100))


def pickled(folder: Path, rng: random.Random, other: Path) -> None:
    code = {"weight": Code(folder.parent / "executed")}
    for path in folder.glob("model*"):
        path.unlink()
    path = folder / rng.choice(["pytorch_model.bin", "model.safetensors"])
    if rng.random() < 0.5:
        torch.save(code, path)
    else:
        marker = str(folder.parent / "executed").encode()
        path.write_bytes(b"cos\nmkdir\n(V" + marker + b"\ntR.")  # what pickle.loads would run


def small_file_bits(folder: Path, rng: random.Random, other: Path) -> None:
    flip(some(rng, folder, "*.json"), rng, 0, sys.maxsize, rng.randint(1, 3))


def small_file_cut(folder: Path, rng: random.Random, other: Path) -> None:
    path = some(rng, folder, "*.json")
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def code_in_the_configuration(folder: Path, rng: random.Random, other: Path) -> None:
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder.parent / 'executed')!r})\n")
    name = rng.choice(["config.json", "processor_config.json", "tokenizer_config.json"])
    described = json.loads((folder / name).read_text())
    told = described["image_processor"] if name == "processor_config.json" else described
    told["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "evil.Evil")
    told["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    if rng.random() < 0.5:  # no class of that name exists elsewhere
        told |= {"image_processor_type": "Evil", "tokenizer_class": "Evil", "processor_class": "Evil"}
    (folder / name).write_text(json.dumps(described))


def linked(folder: Path, rng: random.Random, other: Path) -> None:
    path = rng.choice(sorted(path for path in folder.iterdir() if path.name != "README.md"))
    outside = shutil.move(path, folder.parent / f"outside-{path.name}")
    path.symlink_to(outside)


def untouched(folder: Path, rng: random.Random, other: Path) -> None:
    """So that not everything can be refused."""


KINDS: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "none": untouched,
    "a bit of the data": data_bit,
    "a bit of the header": header_bit,
    "up to 100 bits": many_bits,
    "truncated": truncated,
    "bytes appended": appended,
    "zeros": zeros,
    "two tensors swapped": swapped_tensors,
    "a shard of another checkpoint": wrong_shard,
    "a file missing": missing_file,
    "an index that leaves the folder": index_out_of_the_folder,
    "bits of the index": index_bits,
    "a pickle with code": pickled,
    "bits of a small file": small_file_bits,
    "a small file truncated": small_file_cut,
    "code named in the configuration": code_in_the_configuration,
    "a link out of the folder": linked,
}


def described(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {key: one for key, one in model.config.to_dict().items() if not key.startswith("_")}
    return config, model.processor.to_dict()


def is_same(model: Any, saved: Any) -> bool:
    state, right = model.state_dict(), saved.state_dict()
    tensors = state.keys() == right.keys() and all(torch.equal(state[name], right[name]) for name in right)
    return tensors and described(model) == described(saved)


def outcome(folder: Path, saved: Any, verify: bool) -> str:
    try:
        model = mmzoo.load(str(folder), verify=verify)
    except CheckpointError:
        verdict = "CheckpointError"
    except BaseException as error:
        verdict = f"another exception: {type(error).__name__}"
    else:
        verdict = "identical" if is_same(model, saved) else DIFFERENT
    return "code was executed" if (folder.parent / "executed").exists() else verdict


def run(count: int, seed: int = 0) -> dict[bool, dict[str, Counter[str]]]:
    """Whether digests were verified -> kind of damage -> outcome -> number, over `count` damaged checkpoints
    and a few sound ones.

    Each is in one piece or in shards.
    """
    logging.disable_progress_bar()
    rng = random.Random(seed)
    found = {verify: {kind: Counter[str]() for kind in KINDS} for verify in (True, False)}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for number, which in enumerate(("right", "other")):
            torch.manual_seed(number)
            model = mmzoo.create(NAME)
            hub.save(model, home / which / "whole")
            hub.save(model, home / which / "shards", max_shard_size=SHARDS)
        saved = mmzoo.load(str(home / "right" / "whole"))
        damages = [kind for kind in KINDS if kind != "none"]
        for kind in [*(damages[number % len(damages)] for number in range(count)), *["none"] * CONTROLS]:
            layout = "shards" if kind == "a shard of another checkpoint" else rng.choice(["whole", "shards"])
            place = home / "damaged"
            folder = Path(shutil.copytree(home / "right" / layout, place / "model"))
            KINDS[kind](folder, rng, home / "other" / layout)
            for verify in found:
                found[verify][kind][outcome(folder, saved, verify)] += 1
            shutil.rmtree(place)
    return found


def failures(found: dict[bool, dict[str, Counter[str]]]) -> int:
    """How many loads ended as none may: the damage noticed by nobody, another exception, code that ran."""
    allowed = {True: GOOD, False: (*GOOD, DIFFERENT)}
    return sum(
        number
        for verify, kinds in found.items()
        for one in kinds.values()
        for said, number in one.items()
        if said not in allowed[verify]
    ) + sum(number for kind, one in found[True].items() for said, number in one.items() if (kind, said) == REFUSED)


def table(found: dict[str, Counter[str]], title: str) -> Table:
    columns = sorted(
        {*GOOD, *(said for one in found.values() for said in one)}, key=lambda said: (said not in GOOD, said)
    )
    made = Table("damage", *columns, title=title)
    for kind, one in found.items():
        made.add_row(kind, *(str(one[said] or "") for said in columns))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = run(options.count, options.seed)
    for verify, kinds in found.items():
        title = f"{options.count} damaged checkpoints of {NAME}, digests {'verified' if verify else 'not verified'}"
        Console().print(table(kinds, title))
    told = {"model": NAME, "count": options.count, "seed": options.seed, "failures": failures(found)}
    outcomes = {"verified": found[True], "not verified": found[False]}
    with replacing(options.output) as temporary:
        temporary.write_text(json.dumps({**told, **outcomes}, indent=2) + "\n")
    sys.exit(failures(found) > 0)


if __name__ == "__main__":
    main()
