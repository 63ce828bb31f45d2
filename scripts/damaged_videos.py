"""Damage videos of four containers, read each under a deadline, and count what happens.

    python scripts/damaged_videos.py [--count 1000] [--seed 0] [--output FILE]

A read ends in frames or in VideoReadError. A reader process that dies, a deadline that passes, or another exception is
a failure. Exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmzoo.errors import VideoReadError
from mmzoo.files import replacing
from mmzoo.media import decoders, read_video
from mmzoo.media.reader import close_reader

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "damaged_videos.json"
DEADLINE = 25.0
CODECS = {"mp4": "libx264", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}
MODULES = {"pyav": "av", "decord": "decord"}
GOOD = ("frames", "VideoReadError")


def encode(path: Path, codec: str, length: int = 30) -> bytes:
    """A clip of moving texture, 64 x 48, 25 frames a second."""
    y, x = np.mgrid[:48, :64]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"g": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(length):
            picture = np.stack([(2 * x + 3 * t) % 200, (3 * y + 5 * t) % 200, (x + y + 7 * t) % 200], -1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        file.mux(stream.encode())
    return path.read_bytes()


def flipped(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 10, 100, 1000])):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def flipped_head(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 20)):
        damaged[rng.randrange(min(1024, len(damaged)))] = rng.randrange(256)
    return bytes(damaged)


def piece(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.randint(1, len(content) // 2))


def zeros(content: bytes, rng: random.Random) -> bytes:
    start, stop = piece(content, rng)
    return content[:start] + bytes(stop - start) + content[stop:]


def cut_out(content: bytes, rng: random.Random) -> bytes:
    start, stop = piece(content, rng)
    return content[:start] + content[stop:]


def repeated(content: bytes, rng: random.Random) -> bytes:
    start, stop = piece(content, rng)
    return content[:stop] + content[start:]


def no_video(content: bytes, rng: random.Random) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    html = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    return rng.choice([b"", b"a text\n" * rng.randint(1, 500), html, picture.getvalue(), rng.randbytes(5000)])


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "bytes changed": flipped,
    "bytes of the header changed": flipped_head,
    "zeros": zeros,
    "a piece cut out": cut_out,
    "a piece repeated": repeated,
    "no video": no_video,
}


def outcome(path: Path) -> str:
    try:
        video = read_video(path, num_frames=8, deadline=DEADLINE)
    except VideoReadError as error:
        if "no answer within" in error.cause:
            return "a hang"
        return "a crash" if "the reader process ended" in error.cause else "VideoReadError"
    except BaseException as error:
        return f"another exception: {type(error).__name__}"
    return "frames" if len(video.frames) == 8 else "fewer frames than asked for"


def run(count: int, seed: int = 0) -> dict[str, dict[str, Counter[str]]]:
    """Container -> kind of damage -> outcome -> number, over `count` damaged videos."""
    rng = random.Random(seed)
    found = {container: {kind: Counter[str]() for kind in KINDS} for container in CODECS}
    with tempfile.TemporaryDirectory() as name:
        sources = {one: encode(Path(name) / f"source.{one}", codec) for one, codec in CODECS.items()}
        for number in range(count):
            kind, container = list(KINDS)[number % len(KINDS)], rng.choice(list(CODECS))
            path = Path(name) / f"damaged.{container}"
            path.write_bytes(KINDS[kind](sources[container], rng))
            found[container][kind][outcome(path)] += 1
    close_reader()
    return found


def failures(found: dict[str, dict[str, Counter[str]]]) -> int:
    counts = (one for kinds in found.values() for one in kinds.values())
    return sum(number for one in counts for said, number in one.items() if said not in GOOD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = run(options.count, options.seed)
    every = {said for kinds in found.values() for one in kinds.values() for said in one}
    columns = sorted({*GOOD, *every}, key=lambda said: (said not in GOOD, said))
    table = Table("container", "damage", *columns, title=f"{options.count} damaged videos")
    for container, kinds in found.items():
        for kind, one in kinds.items():
            table.add_row(container, kind, *(str(one[said] or "") for said in columns))
    Console().print(table)
    readers = [decoders.version(backend) for backend in ("pyav", "decord") if find_spec(MODULES[backend])]
    told = {"count": options.count, "seed": options.seed, "deadline": DEADLINE, "readers": readers}
    with replacing(options.output) as temporary:
        temporary.write_text(json.dumps({**told, "failures": failures(found), "outcomes": found}, indent=2) + "\n")
    sys.exit(failures(found) > 0)


if __name__ == "__main__":
    main()
