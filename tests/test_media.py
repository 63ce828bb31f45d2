"""Video and images: sampling rules, decoders, promises of a header, deadlines, and bad input of every kind."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmzoo.errors import InputError, MissingExtra, VideoReadError
from mmzoo.media import SAMPLING_RULES, decoders, read_image, read_video, reader, sample_indices, write_video

DATA = Path(__file__).parent / "data" / "parity" / "eval"
ROOT = Path(__file__).parents[1]

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord has no wheel here")
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a FIFO is the file that blocks here")


@pytest.fixture(autouse=True)
def no_reader_left() -> Iterator[None]:
    yield
    reader.close_reader()


def picture(t: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame t: a texture that moves, one cut, and t as a row of six black or white squares."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([(2 * x + 3 * t) % 200, (3 * y + 5 * t) % 200, (x + y + 40 * (t > 15)) % 200], axis=-1)
    for bit in range(6):
        frame[8:16, 8 + 8 * bit : 16 + 8 * bit] = 255 * (t >> bit & 1)
    return frame.astype(np.uint8)


def clip(length: int = 30, height: int = 48, width: int = 64) -> np.ndarray:
    return np.stack([picture(t, height, width) for t in range(length)])


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `clip` these are, by their squares."""
    squares = frames[:, 10:14, 8:56].reshape(len(frames), 4, 6, 8, 3).mean(axis=(1, 3, 4))
    return ((squares > 127) << np.arange(6)).sum(axis=1).tolist()


def encode(
    path: Path,
    frames: np.ndarray | None = None,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    fps: int = 25,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    **context: object,
) -> Path:
    """A video file of any kind that PyAV writes; `write_video` writes only good ones."""
    frames = clip() if frames is None else frames
    options = dict(options or {})
    if codec == "libx264":
        # Without it x264 gives another file from call to call.
        options["x264-params"] = ":".join(filter(None, ["mbtree=0", options.get("x264-params")]))
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        stream.codec_context.thread_count = 1
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def cut(path: Path, fraction: float = 1.0) -> Path:
    """Keeps so much of a file, or all but its last byte."""
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * fraction), len(data) - 1)])
    return path


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


# Sampling rules


RECORDED_ELSEWHERE = {"ccam_demo", "ccam_demo_fps", "favor"}  # by Video-CCAM; tests/test_favor.py


@pytest.mark.parametrize("rule", sorted(SAMPLING_RULES.keys() - {"all", "vlmevalkit_mp4"} - RECORDED_ELSEWHERE))
def test_recorded_indices(rule: str) -> None:
    names = {"num_frames": "num_total", "num_segments": "num_frames", "max_num_frames": "num_frames"}
    cases = [c for c in json.loads((DATA / "frame_sampling/expected.json").read_text()) if c["rule"] == rule]
    assert len(cases) == 40
    for case in cases:
        # Only here `fps` is the video's own rate and not the one asked for.
        case = {"video_fps" if rule == "mvbench" and key == "fps" else key: value for key, value in case.items()}
        given_ = {names.get(k, k): v for k, v in case.items() if k not in ("rule", "indices") and v != -1}
        assert sample_indices(rule, **given_) == case["indices"], case


def test_vlmevalkit_mp4_rounds_before_it_cuts() -> None:
    # seg = 99 / 8 = 12.375: int(6.1875 + round(12.375 i)); videochat2 cuts 6.1875 first, which agrees here ...
    assert sample_indices("vlmevalkit_mp4", num_total=100, num_frames=8) == [6, 18, 31, 43, 56, 68, 80, 93]
    assert sample_indices("vlmevalkit_mp4", num_total=1, num_frames=2) == [0, 0]


@settings(max_examples=100, deadline=None)
@given(num_total=st.integers(1, 5000), num_frames=st.integers(1, 200))
def test_rules_by_count_stay_inside_and_ascend(num_total: int, num_frames: int) -> None:
    spread = ("mvbench", "videochat2", "vlmevalkit_mp4", "linspace", "vlmevalkit_nframe")
    for rule in (*spread, "ccam_uniform", "ccam_demo"):
        indices = sample_indices(rule, num_total=num_total, num_frames=num_frames, video_fps=25)
        assert len(indices) == (num_frames if rule in spread else min(num_frames, num_total))
        assert indices == sorted(indices) and 0 <= indices[0] and indices[-1] < num_total, rule


@settings(max_examples=100, deadline=None)
@given(num_total=st.integers(1, 5000), video_fps=st.floats(1, 120), fps=st.floats(0.1, 30))
def test_rules_by_rate_stay_inside_where_they_do_not_outrun_the_video(num_total, video_fps, fps) -> None:
    for rule in ("vlmevalkit_fps", "ccam_fps", "ccam_demo_fps"):
        indices = sample_indices(rule, num_total=num_total, video_fps=max(video_fps, fps), fps=fps)
        assert indices == sorted(indices) and all(0 <= i < num_total for i in indices), rule
    assert sample_indices("all", num_total=num_total) == list(range(num_total))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rule": "linspce", "num_total": 9}, "no sampling rule 'linspce'.*linspace"),
        ({"rule": "linspace", "num_total": 9}, "needs num_frames"),
        ({"rule": "ccam_fps", "num_total": 9}, "needs video_fps and fps"),
        ({"rule": "linspace", "num_total": 9, "num_frames": 2, "bound": (0, 1)}, "does not use bound"),
        ({"rule": "all", "num_total": 9, "num_frames": 2}, "does not use num_frames"),
        ({"rule": "linspace", "num_total": 9, "num_frames": 0}, "num_frames must be a whole number"),
        ({"rule": "linspace", "num_total": 9, "num_frames": 2.5}, "num_frames must be a whole number"),
        ({"rule": "linspace", "num_total": 0, "num_frames": 2}, "num_total must be"),
        ({"rule": "vlmevalkit_fps", "num_total": 9, "video_fps": 25, "fps": math.nan}, "fps must be above 0"),
        ({"rule": "mvbench", "num_total": 9, "num_frames": 2, "video_fps": 3, "bound": (0, math.inf)}, "two finite"),
    ],
)
def test_wrong_sampling_arguments(arguments: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        sample_indices(**arguments)


# Reading


@needs_decord
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
@pytest.mark.parametrize("sampling", ["linspace", "all"])
def test_decord_equals_pyav(tmp_path: Path, suffix: str, sampling: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    write_video(clip(), path, fps=30000 / 1001)
    count = None if sampling == "all" else 7
    videos = {name: read_video(path, num_frames=count, sampling=sampling, backend=name) for name in ("decord", "pyav")}
    for name, video in videos.items():
        assert numbers(video.frames) == video.indices == sample_indices(sampling, num_total=30, num_frames=count)
        assert video.frames.dtype == np.uint8 and video.frames.shape[1:] == (48, 64, 3)
        assert video.num_total == 30 and video.notes == () and video.backend.startswith(name + " ")
        assert video.fps == pytest.approx(29.97, abs=1e-3)
        assert video.timestamps == pytest.approx(np.array(video.indices) / 29.97, abs=2e-3)
    assert np.array_equal(videos["decord"].frames, videos["pyav"].frames)
    assert np.array_equal(videos["decord"].timestamps, videos["pyav"].timestamps)
    assert read_video(path, num_frames=count, sampling=sampling).backend == videos["decord"].backend


@needs_decord
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("b-frames.mp4", {"options": {"g": "8", "bf": "3"}}),
        ("hevc.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=8:open-gop=0"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"g": "8", "auto-alt-ref": "1", "lag-in-frames": "9"}}),
        ("vp8.webm", {"codec": "libvpx", "options": {"g": "8", "auto-alt-ref": "1", "lag-in-frames": "9"}}),
        ("fragments.mp4", {"options": {"g": "8"}, "container": {"movflags": "frag_keyframe+empty_moov"}}),
        ("bt709.mp4", {"colorspace": 1, "color_range": 2, "pixels": "yuvj420p"}),
        ("444.mp4", {"pixels": "yuv444p"}),
    ],
)
def test_where_auto_takes_decord_it_equals_pyav(tmp_path: Path, name: str, kind: dict) -> None:
    path = encode(tmp_path / name, **kind)
    # Unordered and repeated, so that decord has to seek; MVBench's rule runs backwards from a bound past the end.
    past = {"sampling": "mvbench", "num_frames": 9, "bound": (1.1, 0.2)}
    for wanted in ({"sampling": "all"}, {"num_frames": 4}, past):
        chosen, sequential = read_video(path, **wanted), read_video(path, **wanted, backend="pyav")
        assert chosen.backend.startswith("decord") and sequential.backend.startswith("pyav")
        assert np.array_equal(chosen.frames, sequential.frames), wanted
        assert np.array_equal(chosen.timestamps, sequential.timestamps)


def _hide_frames(path: Path) -> Path:
    """A copy that starts inside a group of pictures, with an edit list that hides what comes before."""
    source = encode(path.with_suffix(".source.mp4"), options={"g": "12", "bf": "0"})
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = int(Fraction(16, 25) / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is not None and packet.dts >= int(Fraction(12, 25) / stream.time_base):
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)
    return path


INEXACT: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "clip.avi": ("container 'avi'", lambda path: encode(path, codec="mpeg4")),
    "clip.mpg": ("container 'mpeg'", lambda path: encode(path, codec="mpeg2video")),
    "clip.ts": ("container 'mpegts'", encode),
    "mpeg4.mp4": ("codec 'mpeg4'", lambda path: encode(path, codec="mpeg4", options={"bf": "2", "g": "12"})),
    "open.mp4": ("open GOP", lambda p: encode(p, options={"g": "8", "bf": "3", "x264-params": "open-gop=1"})),
    "refresh.mkv": ("intra refresh", lambda p: encode(p, options={"g": "8", "x264-params": "intra-refresh=1"})),
    "open-hevc.mp4": (
        "open GOP",
        lambda p: encode(p, codec="libx265", options={"x265-params": "log-level=none:keyint=8:open-gop=1"}),
    ),
    "10bit.mp4": ("yuv420p10le", lambda path: encode(path, pixels="yuv420p10le")),
    "interlaced.mp4": ("interlaced", lambda p: encode(p, options={"flags": "+ildct+ilme", "x264-params": "tff=1"})),
    "edited.mp4": ("edit list hides", _hide_frames),
}


@needs_decord
@pytest.mark.parametrize("name", INEXACT)
def test_where_decord_is_inexact_auto_takes_pyav_and_decord_is_refused(tmp_path: Path, name: str) -> None:
    reason, make = INEXACT[name]
    path = make(tmp_path / name)
    video = read_video(path, sampling="all")
    assert video.backend.startswith("pyav") and video.notes == ()
    # The source of the edited file starts at 16: the four frames before it are there and hidden.
    assert numbers(video.frames) == list(range(16 if name == "edited.mp4" else 0, 30))
    assert video.timestamps[0] == 0 and video.timestamps[-1] == pytest.approx((len(video.frames) - 1) / 25, abs=2e-3)
    with pytest.raises(VideoReadError, match=reason) as caught:
        read_video(path, num_frames=4, backend="decord")
    assert caught.value.backend.startswith("decord") and "backend='pyav'" in str(caught.value)


@needs_decord
def test_decord_does_differ_on_open_gops(tmp_path: Path) -> None:
    """The reason for the refusal; once this fails, a newer decord may be trusted further."""
    import decord

    moving = np.stack([np.roll(np.random.default_rng(0).integers(0, 255, (48, 64, 3)), 3 * t, 1) for t in range(60)])
    options = {"x265-params": "log-level=none:keyint=8:open-gop=1"}
    path = encode(tmp_path / "open.mp4", moving.astype(np.uint8), codec="libx265", options=options)
    sequential = decode_all(path)
    wrong = 0
    for i in range(0, 60, 3):
        wrong += not np.array_equal(decord.VideoReader(str(path))[i].asnumpy(), sequential[i])
    assert wrong


def _turn(path: Path, degrees: int) -> Path:
    """Writes a rotation into an MP4's track header, as phones do."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 4 + 20 + 16
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    assert struct.unpack_from(">9i", data, at) == (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    struct.pack_into(">9i", data, at, cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 0x40000000)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_sideways_videos_come_upright(tmp_path: Path, degrees: int) -> None:
    write_video(clip(4), tmp_path / "clip.mp4")
    upright = read_video(tmp_path / "clip.mp4", sampling="all").frames
    turned = read_video(_turn(tmp_path / "clip.mp4", degrees), sampling="all").frames
    assert np.array_equal(turned, np.rot90(upright, -degrees // 90, axes=(1, 2)))
    with pytest.raises(VideoReadError, match="rotation"):
        read_video(tmp_path / "clip.mp4", sampling="all", backend="decord")


def test_without_decord_auto_takes_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert read_video(tmp_path / "clip.mp4", num_frames=4).backend.startswith("pyav")
    with pytest.raises(MissingExtra, match=r"'decord'.*mmzoo\[video\]") as caught:
        read_video(tmp_path / "clip.mp4", num_frames=4, backend="decord")
    assert caught.value.extra == "video"


def test_without_pyav_nothing_is_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"'av'.*mmzoo\[video\]"):
        read_video(tmp_path / "clip.mp4", num_frames=4)
    with pytest.raises(MissingExtra, match=r"'av'.*mmzoo\[video\]"):
        write_video(clip(), tmp_path / "other.mp4")


@needs_decord
def test_the_global_bridge_of_decord_is_neither_set_nor_needed(tmp_path: Path) -> None:
    import decord

    write_video(clip(), tmp_path / "clip.mp4")
    expected = read_video(tmp_path / "clip.mp4", num_frames=4, backend="decord").frames
    decord.bridge.set_bridge("torch")
    try:
        video = read_video(tmp_path / "clip.mp4", num_frames=4, backend="decord")
        assert isinstance(video.frames, np.ndarray) and np.array_equal(video.frames, expected)
        assert isinstance(decord.VideoReader(str(tmp_path / "clip.mp4"))[0], torch.Tensor)
    finally:
        decord.bridge.reset_bridge()


def _folder(path: Path, names: list[str], frames: np.ndarray) -> Path:
    path.mkdir()
    for name, frame in zip(names, frames):
        Image.fromarray(frame).save(path / name)
    return path


def test_folder_list_tensor_and_array_agree(tmp_path: Path) -> None:
    frames = clip(12)
    folder = _folder(tmp_path / "frames", [f"{i}.png" for i in range(12)], frames)
    (folder / "._0.png").write_bytes(b"what macOS leaves")
    (folder / "notes.txt").write_text("no frame")
    sources = [
        folder,
        str(folder),
        frames,
        torch.from_numpy(frames),
        list(frames),
        [Image.fromarray(f) for f in frames],
    ]
    for source in sources:
        video = read_video(source, num_frames=5, video_fps=2)
        assert video.indices == [0, 2, 5, 8, 11]
        assert np.array_equal(video.frames, frames[video.indices])
        assert video.timestamps.tolist() == [0, 1, 2.5, 4, 5.5] and video.fps == 2 and video.num_total == 12
        assert np.isnan(read_video(source, num_frames=5).timestamps).all()
        with pytest.raises(InputError, match="needs video_fps"):
            read_video(source, num_frames=5, sampling="mvbench")
    video.frames[:] = 0
    assert frames[11].any()


def test_a_frame_folder_of_mvbench_counts_from_1(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "frames", [f"{i:05d}.png" for i in range(1, 31)], clip())
    arguments = {"num_total": 30, "num_frames": 4, "video_fps": 3, "bound": (0, 5), "first_idx": 1, "max_frame": 30}
    video = read_video(folder, num_frames=4, sampling="mvbench", video_fps=3, bound=(0, 5))
    assert [f"{i:05d}.png" for i in sample_indices("mvbench", **arguments)] == [
        f"{i + 1:05d}.png" for i in video.indices
    ]
    assert numbers(video.frames) == video.indices


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (np.zeros((3, 8, 8, 3), np.float32), r"float32 \[3, 8, 8, 3\]"),
        (np.zeros((3, 3, 8, 8), np.uint8), r"uint8 \[3, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "not empty"),
        ([], "at least one"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], r"\(8, 8\), \(9, 8\)"),
        ([np.zeros((8, 8, 3), np.float64)], "float64"),
        (None, r"object \[\]"),
    ],
)
def test_arrays_that_are_no_video(source: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_video(source, num_frames=2)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    with pytest.raises(InputError, match="no video backend 'opencv'"):
        read_video(tmp_path / "clip.mp4", num_frames=2, backend="opencv")
    with pytest.raises(InputError, match="deadline must be above 0"):
        read_video(tmp_path / "clip.mp4", num_frames=2, deadline=0)
    with pytest.raises(InputError, match="backend='pyav' decodes files"):
        read_video(clip(), num_frames=2, backend="pyav")
    with pytest.raises(InputError, match="needs num_frames"):
        read_video(tmp_path / "clip.mp4")


# What has to be said


def test_notes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "clip.mp4"
    write_video(clip(10), path, fps=10)
    assert read_video(path, num_frames=10).notes == () and caplog.records == []

    repeats = read_video(path, num_frames=16)
    assert len(repeats.frames) == 16 and repeats.notes == ("16 frames are taken from 10: some repeat",)
    assert [r.getMessage() for r in caplog.records] == [f"{path}: {repeats.notes[0]}"]
    assert caplog.records[0].levelno == logging.WARNING and caplog.records[0].name.startswith("mmzoo.media")

    fewer = read_video(path, num_frames=16, sampling="ccam_uniform")
    assert len(fewer.frames) == 10 and fewer.notes == ("16 frames were asked for, the rule gives 10",)

    past = read_video(path, num_frames=4, sampling="mvbench", bound=(1.5, 9))
    assert past.indices == [9, 9, 9, 9]
    assert past.notes[0] == "4 of 4 indices lay outside the 10 frames and were clamped"

    backwards = read_video(path, num_frames=2, sampling="mvbench", bound=(0.8, 0.2))
    assert backwards.indices == [6, 3] and numbers(backwards.frames) == [6, 3]
    assert backwards.notes == ("the bound starts after the end: frames run backwards",)

    with pytest.raises(VideoReadError, match="picks no frame of so short a video"):
        read_video(path, sampling="vlmevalkit_fps", fps=0.5)


def test_a_rate_that_the_frames_do_not_keep_is_noted_where_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "variable.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for t, frame in enumerate(clip(20)):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts, frame.time_base = 150 * t, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    video = read_video(path, sampling="ccam_fps", fps=1)
    assert video.timestamps.tolist() == [0] and video.notes == ("sampled as 30 frames/s, but the frames come at 6.67",)
    assert read_video(path, num_frames=4).notes == ()
    told = read_video(path, sampling="ccam_fps", fps=1, video_fps=1 / 0.15)
    assert told.timestamps == pytest.approx([0, 1.05, 1.95], abs=0.01) and told.notes == ()


def test_the_line_beside_scores(tmp_path: Path) -> None:
    write_video(clip(3), tmp_path / "clip.mp4")
    line = str(read_video(tmp_path / "clip.mp4", num_frames=4, backend="pyav"))
    assert line == (
        f"{tmp_path}/clip.mp4: 4 of 3 frames (linspace), 64x48, 8 frames/s, pyav {av.__version__}; "
        "4 frames are taken from 3: some repeat"
    )


# Files that hold less than they promise


def _patch(path: Path, after: bytes, offset: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(after) + len(after) + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def _longer_duration(path: Path) -> Path:
    """A Matroska file whose duration (element 44 89, eight bytes) says 9 s."""
    return _patch(encode(path), b"\x44\x89\x88", 0, struct.pack(">d", 9000.0))


def _zero_packets(path: Path, codec: str = "mpeg2video") -> Path:
    """A Matroska file of which half of the packets hold nothing that can be decoded."""
    source = encode(path.with_suffix(".source.mkv"), codec=codec, options={"g": "60"})
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for count, packet in enumerate(p for p in old.demux(stream) if p.size):
            empty = av.Packet(bytes(packet.size)) if count > 15 else packet
            empty.pts, empty.dts, empty.time_base, empty.duration = (
                packet.pts,
                packet.dts,
                packet.time_base,
                packet.duration,
            )
            empty.stream = copy
            new.mux(empty)
    return path


FASTSTART = {"movflags": "faststart"}
SHORT: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "half.mkv": ("bytes are missing", lambda path: cut(encode(path), 0.5)),
    "last.mkv": ("cut off: 1 bytes are missing", lambda path: cut(encode(path))),
    "half.webm": ("bytes are missing", lambda path: cut(encode(path, codec="libvpx-vp9"), 0.5)),
    "duration.mkv": ("promises 9.00 s, the frames end at 1.20 s", _longer_duration),
    "half-faststart.mp4": ("promises 30 frames, the file holds", lambda p: cut(encode(p, container=FASTSTART), 0.7)),
    "last-faststart.mp4": (
        "promises 30 frames, the file holds 29",
        lambda p: cut(encode(p, container=FASTSTART)),
    ),
    "half.avi": ("promises 30 frames, the file holds", lambda path: cut(encode(path, codec="mpeg4"), 0.8)),
    "count.avi": (
        "promises 99 frames, the file holds 30",
        lambda path: _patch(encode(path, codec="mpeg4"), b"vids", 28, struct.pack("<I", 99)),
    ),
    "empty-packets.mkv": ("holds 30 frames, 1. could be decoded", _zero_packets),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_file_shorter_than_it_promises_is_an_error_or_says_so(tmp_path: Path, name: str) -> None:
    said, make = SHORT[name]
    path = make(tmp_path / name)
    for backend in ("auto", "pyav", "decord"):
        with pytest.raises(VideoReadError) as caught:
            read_video(path, num_frames=4, backend=backend)
        assert caught.value.path == str(path) and caught.value.backend.split()[0] in ("pyav", "decord")
    with pytest.raises(VideoReadError, match=said) as caught:
        read_video(path, num_frames=4)
    assert "allow_short=True" in str(caught.value)

    video = read_video(path, sampling="all", allow_short=True)
    assert numbers(video.frames) == list(range(video.num_total)) and 0 < video.num_total <= 30
    assert video.notes and video.backend.startswith("decord" if name == "duration.mkv" else "pyav")


@needs_decord
@pytest.mark.parametrize("said", ["DECORDError", "decord counts 31 frames, the file holds 30"])
def test_an_error_that_is_kept_keeps_no_decord_reader(tmp_path: Path, said: str, monkeypatch) -> None:
    """A DataLoader worker forked meanwhile would abort or hang on collecting it."""
    import decord

    if said != "DECORDError":
        monkeypatch.setattr(decord.VideoReader, "__len__", lambda _: 31)
    path = _zero_packets(tmp_path / "empty-packets.mkv", codec="libx264")
    with pytest.raises(VideoReadError, match=f"{said}.*Try backend='pyav'") as caught:
        read_video(path, sampling="all", backend="decord")
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is decord.VideoReader]
    assert "[" not in caught.value.cause and "/src/" not in caught.value.cause


def test_one_frame_less_than_the_header_says_is_only_noted(tmp_path: Path) -> None:
    path = _patch(encode(tmp_path / "count.avi", codec="mpeg4"), b"vids", 28, struct.pack("<I", 31))
    video = read_video(path, num_frames=4)
    assert video.num_total == 30 and video.notes == ("the header promises 31 frames, the file holds 30",)


def test_no_promise_no_error(tmp_path: Path) -> None:
    """An MPEG stream promises nothing: what can be decoded is the video."""
    path = cut(encode(tmp_path / "half.mpg", codec="mpeg2video"), 0.5)
    video = read_video(path, num_frames=4)
    assert 4 < video.num_total < 30 and np.array_equal(video.frames, decode_all(path)[video.indices])


def test_indices_are_picked_for_the_length_that_could_be_decoded(tmp_path: Path) -> None:
    """A stream that begins inside a group of pictures has packets that give no frame."""
    path = encode(tmp_path / "headless.mpg", clip(60), codec="mpeg2video", options={"g": "12"})
    data = path.read_bytes()
    path.write_bytes(data[len(data) // 2 :])
    decoded = decode_all(path)
    video = read_video(path, num_frames=8, allow_short=True)
    assert video.num_total == len(decoded) and video.indices == sample_indices(
        "linspace", num_total=len(decoded), num_frames=8
    )
    assert np.array_equal(video.frames, decoded[video.indices])
    assert any(note.endswith(f"{len(decoded)} could be decoded") for note in video.notes)


# Bad input


def _audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def _no_frames(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        file.start_encoding()
    return path


def _bytes(data: bytes) -> Callable[[Path], Path]:
    return lambda path: path.write_bytes(data) and path or path


def _damaged_folder(path: Path) -> Path:
    folder = _folder(path, ["1.png", "2.png"], clip(2))
    cut(folder / "2.png", 0.5)
    return folder


def _uneven_folder(path: Path) -> Path:
    folder = _folder(path, ["1.png"], clip(1))
    Image.fromarray(picture(0, 50, 50)).save(folder / "2.png")
    return folder


BAD: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "missing.mp4": ("no such file", lambda path: path),
    "a\0b.mp4": ("no such file|null byte", lambda path: path),
    "x" * 300: ("no such file|name too long", lambda path: path),
    "empty.mp4": ("the file is empty", _bytes(b"")),
    "random.mp4": ("InvalidDataError", _bytes(np.random.default_rng(0).bytes(5000))),
    "text.mp4": ("InvalidDataError", _bytes(b"no video, only words\n" * 40)),
    "nothing": ("has no pictures", lambda path: path.mkdir() or path),
    "damaged": ("2.png.*OSError", _damaged_folder),
    "uneven": (r"\(64, 48\): '1.png', \(50, 50\): '2.png'", _uneven_folder),
    "audio.mp4": ("no video stream", _audio_only),
    "frameless.mkv": ("no frames|EOFError", _no_frames),
    "cut.mp4": ("InvalidDataError|EOFError", lambda path: cut(encode(path), 0.5)),
    "codec.mp4": ("no decoder", lambda p: p.write_bytes(encode(p).read_bytes().replace(b"avc1", b"zzzz")) and p),
    "nearly.mp4": ("InvalidDataError|EOFError", lambda path: cut(encode(path), 0.9)),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("deadline", [None, 30.0])
def test_bad_input_is_one_error(tmp_path: Path, name: str, deadline: float | None) -> None:
    said, make = BAD[name]
    path = make(tmp_path / name)
    with pytest.raises(VideoReadError) as caught:
        read_video(path, num_frames=2, deadline=deadline)
    error = caught.value
    assert error.path == str(path) and error.backend.split()[0] in ("auto", "pyav", "frames")
    with pytest.raises(VideoReadError, match=said):
        raise VideoReadError(error.path, error.backend, error.cause)
    assert repr(error.path) in str(error) and error.cause in str(error) and error.backend in str(error)


def test_a_frame_size_that_changes_is_an_error(tmp_path: Path) -> None:
    encode(tmp_path / "a.ts", clip(8))
    encode(tmp_path / "b.ts", clip(8, 64, 96))
    (tmp_path / "both.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with pytest.raises(VideoReadError, match=r"frame size changes.*\(48, 64, 3\), \(64, 96, 3\)"):
        read_video(tmp_path / "both.ts", num_frames=16)


def test_odd_names_and_tags_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "http:\u00e9 %03d#?.avi"
    with av.open(str(tmp_path / "plain.avi"), "w") as file:
        file.metadata["title"] = "caf\u00e9"
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in clip(4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    data = (tmp_path / "plain.avi").read_bytes()
    assert "caf\u00e9".encode() in data
    path.write_bytes(data.replace("caf\u00e9".encode(), b"caf\xe9\xe9"))
    monkeypatch.chdir(tmp_path)
    for source in (path, path.name):
        assert read_video(source, sampling="all").num_total == 4
    write_video(clip(4), "http:clip.mp4")
    assert read_video("http:clip.mp4", sampling="all").num_total == 4


# Deadlines


def _blocked(path: Path) -> Path:
    """A file whose opening never returns, as on a network drive that went away."""
    os.mkfifo(path)
    return path


def _child() -> int:
    assert reader._reader is not None
    return reader._reader.process.pid


def _gone(pid: int) -> bool:
    """No process and no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_relative_path_starts_from_the_folder_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        picture = np.full((8, 8, 3), i, np.uint8)
        Image.fromarray(picture).save(tmp_path / name / "0.png")
    for i, name in enumerate(("one", "two")):
        monkeypatch.chdir(tmp_path / name)
        assert (read_video(".", num_frames=1, deadline=60).frames == i).all()


def test_a_deadline_changes_nothing_but_the_process(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    folder = _folder(tmp_path / "frames", [f"{i}.png" for i in range(30)], clip())
    rule = {"sampling": "mvbench", "num_frames": np.int64(16), "bound": (np.float32(1), 2.5)}
    for source, more in ((tmp_path / "clip.mp4", {}), (str(folder), {"video_fps": 8})):
        here, there = read_video(source, **rule, **more), read_video(source, **rule, **more, deadline=60)
        assert np.array_equal(here.frames, there.frames) and np.array_equal(here.timestamps, there.timestamps)
        assert there.frames.flags.writeable and there.frames.dtype == np.uint8
        for name in ("indices", "fps", "num_total", "sampling", "backend", "source", "notes"):
            assert getattr(here, name) == getattr(there, name) and type(getattr(there, name)) is type(
                getattr(here, name)
            )
    pid = _child()
    read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60)
    assert _child() == pid
    reader.close_reader()
    assert _gone(pid)


def test_errors_come_back_as_they_were(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    cut_file = cut(encode(tmp_path / "cut.mkv"), 0.5)
    for source, wanted, kind in (
        (cut_file, {"num_frames": 4}, VideoReadError),
        (tmp_path / "clip.mp4", {}, InputError),
        (tmp_path / "clip.mp4", {"sampling": "no"}, InputError),
    ):
        with pytest.raises(kind) as here:
            read_video(source, **wanted)
        with pytest.raises(kind) as there:
            read_video(source, **wanted, deadline=60)
        assert str(here.value) == str(there.value) and vars(here.value) == vars(there.value)
        assert type(here.value) is type(there.value)


@needs_fifo
@pytest.mark.parametrize("folder", [False, True])
def test_a_hang_becomes_an_error_within_the_deadline(tmp_path: Path, folder: bool) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60)
    pid = _child()
    blocked = _blocked(tmp_path / ("1.png" if folder else "blocked.mp4"))
    source = tmp_path if folder else blocked
    begin = time.monotonic()
    with pytest.raises(VideoReadError, match=r"no answer within 0.5 s") as caught:
        read_video(source, num_frames=2, deadline=0.5)
    assert 0.5 <= time.monotonic() - begin < 5
    assert caught.value.path == str(source) and caught.value.backend == "auto"
    assert _gone(pid)
    assert len(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60).frames) == 2
    assert _child() != pid


@needs_fifo
def test_closing_does_not_wait_for_a_read_that_hangs(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60)
    blocked, causes = _blocked(tmp_path / "blocked.mp4"), []

    def wait_for_nothing() -> None:
        with pytest.raises(VideoReadError) as caught:
            read_video(blocked, num_frames=2, deadline=60)
        causes.append(caught.value.cause)

    thread = threading.Thread(target=wait_for_nothing)
    thread.start()
    while not reader._lock.locked():
        time.sleep(0.01)
    begin = time.monotonic()
    reader.close_reader()
    thread.join()
    assert time.monotonic() - begin < 20 and causes == [f"the reader process ended (exit code -{int(signal.SIGKILL)})"]


def test_an_answer_at_the_last_moment_counts_and_the_killed_reader_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60)
    receive = reader._receive

    def receive_and_wait(pipe: BinaryIO) -> object:
        answer = receive(pipe)
        time.sleep(1.2)
        return answer

    monkeypatch.setattr(reader, "_receive", receive_and_wait)
    assert numbers(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=1).frames) == [0, 29]
    assert reader._reader is not None and reader._reader.process.returncode is not None
    monkeypatch.undo()
    assert numbers(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60).frames) == [0, 29]


@needs_fifo
def test_a_crash_of_the_reader_becomes_an_error(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60)
    pid = _child()
    threading.Timer(0.3, os.kill, (pid, signal.SIGSEGV)).start()
    with pytest.raises(VideoReadError, match=rf"the reader process ended \(exit code -{int(signal.SIGSEGV)}\)"):
        read_video(_blocked(tmp_path / "blocked.mp4"), num_frames=2, deadline=60)
    assert _gone(pid)
    assert len(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60).frames) == 2

    # The terminal's Ctrl-C reaches the whole process group, and is the parent's business.
    pid = _child()
    os.kill(pid, signal.SIGINT)
    assert len(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60).frames) == 2 and _child() == pid

    os.kill(_child(), signal.SIGKILL)
    time.sleep(0.1)
    assert len(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60).frames) == 2


@needs_fifo
def test_an_interrupt_leaves_no_answer_behind(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60)
    pid = _child()
    # A process started in the background by a shell ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        read_video(_blocked(tmp_path / "blocked.mp4"), num_frames=2, deadline=60)
    assert _gone(pid)
    assert numbers(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60).frames) == [0, 29]


def test_threads_share_one_reader(tmp_path: Path) -> None:
    for length in (10, 20, 30):
        write_video(clip(length), tmp_path / f"{length}.mp4")
    seen: dict[int, list[int]] = {}

    def work(length: int) -> None:
        for _ in range(5):
            seen[length] = numbers(read_video(tmp_path / f"{length}.mp4", num_frames=2, deadline=60).frames)

    threads = [threading.Thread(target=work, args=(length,)) for length in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {10: [0, 9], 20: [0, 19], 30: [0, 29]}


class Clips(torch.utils.data.Dataset):
    """Reads with a deadline; a file that hangs gives its error's text."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[list[int], int, str]:
        blocked = self.paths[index].suffix == ".fifo"
        try:
            video = read_video(self.paths[index], num_frames=3, deadline=0.5 if blocked else 60)
        except VideoReadError as error:
            return [], 0, error.cause
        # Without a deadline the worker decodes by itself, after its parent has used the same decoders.
        assert np.array_equal(video.frames, read_video(self.paths[index], num_frames=3).frames)
        return numbers(video.frames), _child(), video.backend


@needs_fifo
def test_deadlines_hold_in_dataloader_workers(tmp_path: Path) -> None:
    for i in range(2):
        write_video(clip(20 + 10 * i), tmp_path / f"{i}.mp4")
    read_video(tmp_path / "0.mp4", num_frames=3)
    read_video(tmp_path / "0.mp4", num_frames=3, deadline=60)
    own = _child()
    paths = [tmp_path / "0.mp4", _blocked(tmp_path / "a.fifo"), tmp_path / "1.mp4", tmp_path / "0.mp4"]
    got = list(torch.utils.data.DataLoader(Clips(paths), batch_size=None, num_workers=1))
    assert [one[0] for one in got] == [[0, 9, 19], [], [0, 14, 29], [0, 9, 19]]
    assert got[1][2] == "no answer within 0.5 s"
    pids = {one[1] for one in got if one[1]}
    # One before the hang, one after it, neither of them the parent's, which a worker must leave alone.
    assert len(pids) == 2 and own not in pids
    assert numbers(read_video(tmp_path / "1.mp4", num_frames=3, deadline=60).frames) == [0, 14, 29] and _child() == own
    end = time.monotonic() + 10
    while not all(map(_gone, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(map(_gone, pids))


@needs_fifo
def test_a_fork_while_another_thread_reads_gets_its_own_reader(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    blocked = _blocked(tmp_path / "blocked.mp4")
    causes: list[str] = []

    def wait_for_nothing() -> None:
        with pytest.raises(VideoReadError) as caught:
            read_video(blocked, num_frames=2, deadline=3)
        causes.append(caught.value.cause)

    def work() -> None:
        sys.exit(numbers(read_video(tmp_path / "clip.mp4", num_frames=2, deadline=60).frames) != [0, 29])

    thread = threading.Thread(target=wait_for_nothing)
    thread.start()
    while not reader._lock.locked():
        time.sleep(0.01)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(30)
    done = process.exitcode
    process.kill()
    thread.join()
    assert done == 0 and causes == ["no answer within 3 s"]


def test_the_reader_ends_with_its_parent_and_is_light(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    code = """
        import atexit, os, signal, sys
        from pathlib import Path

        def last():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                print("closed")

        atexit.register(last)
        from mmzoo.media import read_video
        assert not {"av", "decord", "torch", "transformers"} & set(sys.modules), "importing mmzoo.media is not light"
        read_video(sys.argv[1], num_frames=2, deadline=60)
        from mmzoo.media import reader
        pid = reader._reader.process.pid
        maps = Path(f"/proc/{pid}/maps")
        assert not maps.exists() or "libtorch" not in maps.read_text(), "the reader loads torch"
        print(pid, flush=True)
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for how in ("exit", "kill"):
        command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(tmp_path / "clip.mp4"), how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.stderr == "" and done.returncode == (0 if how == "exit" else -signal.SIGKILL)
        pid, *closed = done.stdout.split()
        assert closed == (["closed"] if how == "exit" else [])
        end = time.monotonic() + 10
        while not _gone(int(pid)) and time.monotonic() < end:
            time.sleep(0.05)
        assert _gone(int(pid)), how


def test_what_c_code_prints_does_not_end_up_in_an_answer(tmp_path: Path) -> None:
    write_video(clip(), tmp_path / "clip.mp4")
    code = """
        import os
        from mmzoo.media import reader
        read_path = reader.read_path
        reader.read_path = lambda *arguments: os.write(1, b"[h264 @ 0x0] noise") and read_path(*arguments)
        reader.serve()
    """
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as child:
        wanted = {"num_frames": 2}
        reader._send(
            child.stdin, {"path": str(tmp_path / "clip.mp4"), "wanted": wanted, "backend": "auto", "deadline": 60}
        )
        answer, frames = reader._receive(child.stdout)
        child.stdin.close()
        assert answer["video"]["indices"] == numbers(frames) == [0, 29]
        assert child.stderr.read() == b"[h264 @ 0x0] noise"


@needs_fifo
def test_a_reader_that_hangs_ends_without_its_parent(tmp_path: Path) -> None:
    request = {"path": str(_blocked(tmp_path / "blocked.mp4")), "wanted": {}, "backend": "auto", "deadline": 0.1}
    code = f"from mmzoo.media import reader; reader.ORPHAN_GRACE = 0; reader._answer({request!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGALRM


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_damaged_files_give_a_video_or_the_one_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged.{suffix}"
    good = encode(path, clip(30, 96, 128), options={"g": "10"}).read_bytes()
    random = np.random.default_rng(0)
    outcomes = {"read": 0, "error": 0}
    for _ in range(20):
        data = bytearray(good)
        start, length = int(random.integers(len(data))), int(random.integers(1, 400))
        match random.integers(4):
            case 0:
                del data[start:]
            case 1:
                del data[start : start + length]
            case 2:
                data[start : start + length] = bytes(len(data[start : start + length]))
            case _:
                for place in random.integers(len(data), size=3):
                    data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        try:
            video = read_video(path, num_frames=8, deadline=20)
            assert video.frames.shape[0] == 8 and video.indices[-1] < video.num_total
            outcomes["read"] += 1
        except VideoReadError as error:
            assert error.path == str(path) and error.cause
            assert "no answer" not in error.cause and "ended" not in error.cause
            outcomes["error"] += 1
    assert outcomes["error"] >= 3 and outcomes["read"] >= 3, outcomes


# Writing


@pytest.mark.parametrize(
    ("frames", "name", "arguments", "said"),
    [
        (clip(2, 47), "a.mp4", {}, "even sizes, not 64x47"),
        (clip(2)[:0], "a.mp4", {}, r"not uint8 \[0, 48, 64, 3\]"),
        (clip(2).astype(np.float32), "a.mp4", {}, "not float32"),
        (clip(2)[0], "a.mp4", {}, r"\[48, 64, 3\]"),
        (clip(2), "a.webm", {}, "not 'a.webm'"),
        (clip(2), "a.mp4", {"fps": 0}, "fps lies"),
        (clip(2), "a.mp4", {"crf": 52}, "crf"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, frames: np.ndarray, name: str, arguments: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        write_video(frames, tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_writing_is_exact_and_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    write_video(clip(), path, fps=12.5)
    first = path.read_bytes()
    video = read_video(path, sampling="all")
    assert video.fps == 12.5 and np.abs(video.frames.astype(int) - clip()).mean() < 4
    write_video(clip(), path, fps=12.5)
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]
    write_video(clip(), tmp_path / "coarse.mp4", fps=12.5, crf=45)
    assert (tmp_path / "coarse.mp4").stat().st_size < len(first) / 2

    write_video(clip(2, 256, 256), tmp_path / "large.mp4")
    assert b" threads=1 " in (tmp_path / "large.mp4").read_bytes()
    (tmp_path / "large.mp4").unlink()

    make, count = av.VideoFrame.from_ndarray, itertools.count(1)
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", lambda *a, **k: make(*a, **k) if next(count) < 150 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_video(clip(200), path)
    assert path.read_bytes() == first and sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "coarse.mp4"]


# Images


def test_images_come_upright_and_rgb(tmp_path: Path) -> None:
    frame = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(frame).save(tmp_path / "turned.png", exif=exif)
    for source in (tmp_path / "turned.png", str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        assert np.array_equal(np.asarray(read_image(source)), np.rot90(frame, -1))
    assert np.array_equal(np.asarray(read_image(frame)), frame)
    grey = read_image(frame[:, :, 0])
    assert grey.mode == "RGB" and np.array_equal(np.asarray(grey)[:, :, 2], frame[:, :, 0])
    assert read_image(Image.fromarray(frame).convert("P")).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such.png", "no/such.png.*FileNotFoundError"),
        (np.zeros((4, 4, 3)), r"float64 \[4, 4, 3\]"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "not empty"),
        (Image.fromarray(np.full((4, 4), 60000, np.uint16)), "mode 'I;16'"),
        (3, "not int"),
    ],
)
def test_what_is_no_image(source: object, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_image(source)


def test_damaged_images(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    for data in (b"", b"words", (tmp_path / "a.png").read_bytes()[:-200]):
        (tmp_path / "b.png").write_bytes(data)
        with pytest.raises(InputError, match="b.png"):
            read_image(tmp_path / "b.png")


def test_versions_are_those_of_the_decoders() -> None:
    assert decoders.version("pyav") == f"pyav {av.__version__}"
    assert decoders.version("auto") == "auto"
