"""The two decoders behind `read_video`, and what a container promises.

PyAV reads every header, so that both decoders answer to the same promise; decord or PyAV then gives the pixels.
Nothing here is imported before a file is read.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmzoo.errors import MissingExtra, MmzooError, VideoReadError

Pick = Callable[[int], list[int]]

# Outside of these decord 0.6.0 gave other pixels or other frames than PyAV (MPEG-PS up to 12 frames off). Inside, H.264
# and HEVC were equal where every keyframe clears the decoder (IDR): decord starts at the keyframe before a frame, and
# after one of an open GOP or of an intra refresh the first frames need what came before.
EXACT_CONTAINERS = ("mov", "matroska")
EXACT_CODECS = ("h264", "hevc", "vp8", "vp9")
EXACT_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")

HEADER_TOLERANCE = 0.01
PACKET_TOLERANCE = 0.1
IDR_UNITS = {"h264": (5,), "hevc": (19, 20)}
SHORT_HINT = "Fetch the file again, or read what is there with allow_short=True."


FAILING_WIDTHS = (8, 12, 16, 24, 48, 72)
"""Of the even widths up to 420, decord 0.6.0 fails on these: a padded row is too wide for its copy."""


@dataclass(frozen=True)
class Header:
    """What a container says about its video stream, and what it really holds.

    Attributes:
        container: FFmpeg's name, such as "mov,mp4,m4a,3gp,3g2,mj2".
        codec: the name of FFmpeg's decoder, such as "h264".
        pixels: FFmpeg's pixel format, such as "yuv420p".
        interlaced: as the first frame says.
        turned: whether frames are stored otherwise than they are shown.
        width: pixels a row, as stored.
        fps: frames a second, on average; None where the header does not say.
        promised: frames by the header; 0 where it does not say.
        packets: frames found, without the hidden ones.
        hidden: frames that an edit list hides; no player shows them.
        cut: those of both whose data end early.
        open_gops: keyframes, or a first frame that is none, from which a decoder does not start exactly.
        times: seconds at which the frames are shown, ascending.
        duration: seconds by a Matroska header; elsewhere None, since FFmpeg works it out from what is there.
        end: seconds at which the last packet of any stream ends.
        missing_bytes: what a Matroska file lacks of the size that it states.
    """

    container: str
    codec: str
    pixels: str
    interlaced: bool
    turned: bool
    width: int
    fps: float | None
    promised: int
    packets: int
    hidden: int
    cut: int
    open_gops: int
    times: tuple[float, ...]
    duration: float | None
    end: float
    missing_bytes: int


@dataclass(frozen=True)
class Decoded:
    """Chosen frames, uint8 [T, H, W, 3], their times in seconds, and how many frames the video has."""

    frames: np.ndarray
    timestamps: np.ndarray
    num_total: int
    notes: tuple[str, ...] = ()


def need(package: str, purpose: str) -> Any:
    """Imports an optional package of the extra `video`."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(package, "video", purpose) from error


def version(backend: str) -> str:
    """A backend's name and version, as it is printed beside scores."""
    package = {"decord": "decord", "pyav": "av", "frames": "pillow"}.get(backend)
    if package is None:
        return backend
    try:
        return f"{backend} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{backend} (version unknown)"


@contextmanager
def typed_errors(path: Path, backend: str, hint: str = "") -> Iterator[None]:
    """Turns whatever a decoder raises into `VideoReadError`; damaged files were seen to raise nine classes."""
    try:
        yield
    except Exception as error:
        # An error that is kept must not keep a decoder: decord's threads are not there in a forked DataLoader worker,
        # which aborts or hangs when it collects the reader.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, MmzooError):
            raise
        # decord puts the time and a source line before what it says, and a C++ stack on the lines below.
        said = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        said = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", said).rstrip(". ")
        raise VideoReadError(path, version(backend), f"{type(error).__name__}: {said}", hint) from error


def open_pyav(path: Path) -> Any:
    """A PyAV container; `file:` keeps both decoders from taking a colon in the path for a protocol."""
    return need("av", "reading a video file").open(f"file:{path}", metadata_errors="replace")


def video_stream(container: Any, path: Path) -> Any:
    """The stream that both decoders take for the video; one thread, as in a DataLoader worker."""
    stream = container.streams.best("video")
    if stream is None:
        raise VideoReadError(path, version("pyav"), "the file has no video stream")
    if stream.codec_context is None:
        raise VideoReadError(path, version("pyav"), "there is no decoder for the video stream")
    stream.codec_context.thread_count = 1
    return stream


def read_header(path: Path) -> Header:
    """Reads the header, decodes one frame and walks through all packets."""
    with typed_errors(path, "pyav"), open_pyav(path) as container:
        first = next(container.decode(video_stream(container, path)), None)
        if first is None:
            raise VideoReadError(path, version("pyav"), "the video stream has no frames")
    with typed_errors(path, "pyav"), open_pyav(path) as container:
        stream = video_stream(container, path)
        codec, rate = stream.codec_context, stream.average_rate or stream.guessed_rate
        times: list[float] = []
        packets, hidden, cut, open_gops, end = 0, 0, 0, 0, 0.0
        for packet in container.demux():
            start = packet.pts if packet.pts is not None else packet.dts
            if packet.size == 0 or packet.time_base is None:
                continue
            if start is not None:
                end = max(end, float((start + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index == stream.index:
                if packet.is_keyframe or packets + hidden == 0:
                    open_gops += not _is_clean_start(packet, codec)
                cut += packet.is_corrupt
                if packet.is_discard:
                    hidden += 1
                    continue
                packets += 1
                if start is not None:
                    times.append(float(start * packet.time_base))
        matroska = container.format.name.startswith("matroska")
        return Header(
            container=container.format.name,
            codec=codec.name,
            pixels=codec.pix_fmt or "unknown",
            interlaced=first.interlaced_frame,
            turned=first.rotation != 0,
            width=first.width,
            fps=float(rate) if rate else None,
            promised=stream.frames,
            packets=packets,
            hidden=hidden,
            cut=cut,
            open_gops=open_gops,
            times=tuple(sorted(times)),
            duration=container.duration / 1e6 if matroska and container.duration else None,
            end=end,
            missing_bytes=_missing_matroska_bytes(path) if matroska else 0,
        )


def _is_clean_start(packet: Any, codec: Any) -> bool:
    """Whether decoding from here gives what decoding from the start gives, as far as the packet's NAL units tell."""
    if codec.name not in ("h264", "hevc"):
        return packet.is_keyframe
    h264, setup, data, at = codec.name == "h264", codec.extradata or b"", bytes(packet), 0
    # avcC and hvcC say how many bytes the length before each unit has; without them units are not told apart this way.
    place = 4 if h264 else 21
    if len(setup) <= place or setup[0] != 1:
        return False
    width = (setup[place] & 3) + 1
    while at + width < len(data):
        kind = data[at + width]
        unit = kind & 31 if h264 else kind >> 1 & 63
        if unit in IDR_UNITS[codec.name]:
            return True
        at += width + int.from_bytes(data[at : at + width], "big")
    return False


def _missing_matroska_bytes(path: Path) -> int:
    """How far a Matroska segment says it reaches past the end of the file; 0 where it does not say."""
    with open(path, "rb") as file:
        head, size = file.read(4096), path.stat().st_size

    def number(at: int) -> tuple[int, int]:
        length = 9 - head[at].bit_length()
        value = int.from_bytes(head[at : at + length], "big") & ((1 << 7 * length) - 1)
        return (-1 if value == (1 << 7 * length) - 1 else value), at + length

    header_size, at = number(4)
    at += header_size
    if head[at : at + 4] != b"\x18\x53\x80\x67":
        return 0
    segment_size, at = number(at + 4)
    return 0 if segment_size < 0 else max(0, at + segment_size - size)


def shortfall(header: Header, path: Path, allow_short: bool) -> list[str]:
    """Compares what the header promises with what the container holds.

    Returns:
        Notes on differences that are too small, or too welcome (`allow_short`), to be an error.

    Raises:
        VideoReadError: the container holds clearly less than its header promises.
    """
    held = header.packets + header.hidden - header.cut
    step = 1 / header.fps if header.fps else 0.1
    notes, failed = [], False
    if header.promised and held != header.promised:
        notes.append(f"the header promises {header.promised} frames, the file holds {held}")
        missing = header.promised - held
        failed |= header.cut > 0 or missing > max(1, HEADER_TOLERANCE * header.promised)
    if header.missing_bytes:
        notes.append(f"the file is cut off: {header.missing_bytes} bytes are missing")
        failed = True
    if header.duration and header.duration - header.end > step / 2:
        notes.append(f"the header promises {header.duration:.2f} s, the frames end at {header.end:.2f} s")
        failed |= header.duration - header.end > max(1.5 * step, HEADER_TOLERANCE * header.duration)
    if failed and not allow_short:
        raise VideoReadError(path, version("pyav"), "; ".join(notes), SHORT_HINT)
    return notes


def decord_differs(header: Header) -> str:
    """Why decord would not give PyAV's frames for this file; empty where it does."""
    if not header.container.startswith(EXACT_CONTAINERS):
        return f"decord is not frame-exact for the container {header.container!r}"
    if header.codec not in EXACT_CODECS:
        return f"decord was not found to be exact for the codec {header.codec!r}"
    if header.hidden:
        return f"decord shows the {header.hidden} frames that the file's edit list hides"
    if header.promised not in (0, header.packets) or header.cut or header.missing_bytes:
        return "decord can hang on a file that holds less than it promises"
    if header.pixels not in EXACT_PIXELS:
        return f"decord gives other pixels than PyAV for {header.pixels!r}"
    if header.open_gops:
        return "decord is not frame-exact where keyframes do not clear the decoder (open GOP, intra refresh)"
    if header.turned:
        return "decord fails on some sizes of video with a rotation"
    if header.width in FAILING_WIDTHS:
        return f"decord fails on frames that are {header.width} pixels wide"
    if header.interlaced:
        return "decord gives other pixels than PyAV for interlaced video"
    return ""


def decode_decord(path: Path, header: Header, pick: Pick) -> Decoded:
    """Decodes the picked frames with decord, on one thread and without touching its global bridge."""
    with typed_errors(path, "decord", "Try backend='pyav'."):
        decord = need("decord", "the video backend 'decord'")
        indices = pick(header.packets)
        batch = _decord_batch(decord.VideoReader(f"file:{path}", num_threads=1), path, header, indices)
        frames = batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
        times = np.array(header.times) - header.times[0]
        return Decoded(frames, times[indices], header.packets)


def _decord_batch(reader: Any, path: Path, header: Header, indices: list[int]) -> Any:
    if len(reader) != header.packets:
        cause = f"decord counts {len(reader)} frames, the file holds {header.packets}"
        raise VideoReadError(path, version("decord"), cause, "Try backend='pyav'.")
    return reader.get_batch(indices)


def decode_pyav(path: Path, header: Header, pick: Pick, allow_short: bool) -> Decoded:
    """Decodes from the start to the last picked frame with PyAV, keeping only the picked ones.

    Packets tell the length before anything is decoded. Where the decoder gives fewer frames than that, the indices are
    picked again for the true length, which is what `num_total` reports.
    """
    num_total = header.packets
    notes: list[str] = []
    indices = pick(num_total)
    kept, count, cause = _keep_pyav(path, set(indices), allow_short)
    if count <= max(indices):
        notes.append(f"the file holds {num_total} frames, {count} could be decoded" + (f" ({cause})" if cause else ""))
        tolerance = HEADER_TOLERANCE if header.promised else PACKET_TOLERANCE
        if count == 0 or (num_total - count > max(1, tolerance * num_total) and not allow_short):
            raise VideoReadError(path, version("pyav"), notes[0], SHORT_HINT)
        num_total = count
        indices = pick(num_total)
        kept, _, _ = _keep_pyav(path, set(indices), allow_short)
    shapes = sorted({kept[i][0].shape for i in indices})
    if len(shapes) > 1:
        raise VideoReadError(path, version("pyav"), f"the frame size changes inside the video: {shapes}")
    frames, times = np.stack([kept[i][0] for i in indices]), np.array([kept[i][1] for i in indices])
    return Decoded(frames, times, num_total, tuple(notes))


def _keep_pyav(path: Path, wanted: set[int], allow_short: bool) -> tuple[dict[int, Any], int, str]:
    """Frame and time of each wanted index, how many frames were decoded, and what ended the decoding early."""
    kept: dict[int, Any] = {}
    count, first, last = 0, 0.0, max(wanted)
    try:
        with typed_errors(path, "pyav", SHORT_HINT), open_pyav(path) as container:
            for frame in container.decode(video_stream(container, path)):
                time = float("nan") if frame.time is None else frame.time
                first = time if count == 0 else first
                if count in wanted:
                    kept[count] = (_upright(frame), time - first)
                count += 1
                if count > last:
                    break
    except VideoReadError as error:
        if not (allow_short and count):
            raise
        return kept, count, error.cause
    return kept, count, ""


def _upright(frame: Any) -> np.ndarray:
    """Pixels turned by the quarter turns of the header; phones film sideways."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
