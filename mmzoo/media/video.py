"""Video in and out: `read_video` for files, frame folders and arrays, and a small `write_video`."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from mmzoo.errors import InputError, VideoReadError
from mmzoo.files import replacing
from mmzoo.media import decoders
from mmzoo.media.image import read_image
from mmzoo.media.sampling import SAMPLING_RULES, sample_indices

if TYPE_CHECKING:
    import torch

VideoSource = Union[str, "os.PathLike[str]", np.ndarray, "torch.Tensor", Sequence[Any]]

BACKENDS = ("auto", "decord", "pyav")
_CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Video:
    """The frames that were read, and how; `str()` is the line to print beside scores.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB, upright.
        timestamps: float64 [T], seconds after the video's first frame; NaN where the source has no clock.
        indices: the T frame numbers, counted from 0.
        fps: frames a second of the source by its header, None where unknown.
        num_total: frames the source really has.
        sampling: the name of the rule.
        backend: what decoded it, with its version.
        source: the path, or "array".
        notes: what has to be said about this reading: repeats, clamped indices, differences from the header.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: list[int]
    fps: float | None
    num_total: int
    sampling: str
    backend: str
    source: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        height, width = self.frames.shape[1:3]
        rate = "" if self.fps is None else f", {self.fps:g} frames/s"
        counts = f"{len(self.frames)} of {self.num_total} frames ({self.sampling})"
        return f"{self.source}: {counts}, {width}x{height}{rate}, " + "; ".join((self.backend, *self.notes))


@dataclass(frozen=True)
class Wanted:
    """Which frames are wanted: the arguments of `sample_indices` that do not come from the video."""

    sampling: str = "linspace"
    num_frames: int | None = None
    fps: float | None = None
    video_fps: float | None = None
    bound: tuple[float, float] | None = None
    allow_short: bool = False
    stop: int | None = None

    def pick(self, num_total: int, video_fps: float | None, folder: bool = False) -> tuple[list[int], list[str]]:
        """Indices from 0 that exist, and what has to be said about them."""
        whole, num_total = num_total, min(num_total, self.stop or num_total)
        # The protocol counts a folder's files from 1.
        first_idx, max_frame = (1, num_total) if folder and self.sampling == "mvbench" else (None, None)
        indices = sample_indices(
            self.sampling,
            num_total=num_total,
            num_frames=self.num_frames,
            video_fps=video_fps,
            fps=self.fps,
            bound=self.bound,
            first_idx=first_idx,
            max_frame=max_frame,
        )
        offset = first_idx or 0
        notes = [f"only the first {num_total} of {whole} frames were looked at"] if num_total < whole else []
        clamped = [min(max(i - offset, 0), num_total - 1) for i in indices]
        outside = sum(i - offset != j for i, j in zip(indices, clamped))
        if outside:
            notes.append(f"{outside} of {len(indices)} indices lay outside the {num_total} frames and were clamped")
        if clamped != sorted(clamped):
            notes.append("the bound starts after the end: frames run backwards")
        if len(set(clamped)) < len(clamped):
            notes.append(f"{len(clamped)} frames are taken from {len(set(clamped))}: some repeat")
        if self.num_frames and len(clamped) < self.num_frames and self.sampling not in ("ccam_fps", "favor"):
            notes.append(f"{self.num_frames} frames were asked for, the rule gives {len(clamped)}")
        return clamped, notes


def read_video(
    source: VideoSource,
    *,
    num_frames: int | None = None,
    sampling: str = "linspace",
    fps: float | None = None,
    bound: tuple[float, float] | None = None,
    video_fps: float | None = None,
    backend: str = "auto",
    deadline: float | None = None,
    allow_short: bool = False,
    stop: int | None = None,
) -> Video:
    """Reads frames of a video file, of a folder of pictures, or of an array, by a protocol's sampling rule.

    A video that holds clearly less than it promises is an error. Promised are the frame count of the header (MP4, MOV,
    AVI; 1 % or one frame may be missing), the size and duration of a Matroska or WebM file (no byte, and 1 % or 1.5
    frames), and a frame for each packet (10 % may be missing, since some codecs hide frames). Smaller differences, and
    frames that repeat because a clip is shorter than `num_frames`, are logged and kept in `Video.notes`.

    Args:
        source: a file; a folder of pictures of one size, in natural order of their names; a uint8 array or tensor
            [T, H, W, 3]; or a list of pictures (anything `read_image` takes).
        num_frames: frames wanted. Most rules need it; `all` does not take it.
        sampling: a name in `SAMPLING_RULES`.
        fps: frames a second wanted, for the rules by rate.
        bound: start and end in seconds, for `mvbench`.
        video_fps: the source's own frames a second. Folders and arrays have no other; it overrides a file's header.
        backend: "decord", "pyav", or "auto": decord where it is installed and gives PyAV's frames to the bit (MP4, MOV,
            Matroska, WebM; 8 bits, progressive, upright, closed groups of pictures, no edit list that hides frames),
            else PyAV. Damaged files that both can read may still differ. Only for files.
        deadline: seconds after which reading is given up. A file or folder is then read in a separate process, which is
            kept for the next call; an array has nothing to wait for. None reads in this process.
        allow_short: return what is there of a file that is shorter than it promises, with a note.
        stop: frames from this number on are not looked at, as if the video ended there.

    Returns:
        The frames, with the decoder and everything else that a score depends on.

    Raises:
        VideoReadError: the file or folder cannot be read, is shorter than it promises, gave no answer in time, or the
            rule picks no frame of it.
        InputError: an array that is no video, or arguments that do not fit together.
        MissingExtra: PyAV, or the decord asked for, is not installed.
    """
    if backend not in BACKENDS:
        raise InputError(f"There is no video backend {backend!r}. Take one of {', '.join(BACKENDS)}.")
    if deadline is not None and not 0 < deadline <= 1e6:
        raise InputError(f"deadline must be above 0 and at most 1e6 seconds, not {deadline!r}.")
    if stop is not None and stop < 1:
        raise InputError(f"stop must be at least 1, not {stop!r}.")
    wanted = Wanted(sampling, num_frames, fps, video_fps, bound, allow_short, stop)
    if not isinstance(source, (str, os.PathLike)):
        if backend != "auto":
            raise InputError(f"backend={backend!r} decodes files; an array or a list of pictures needs none.")
        video = _read_array(source, wanted)
    elif deadline is None:
        video = read_path(Path(source), wanted, backend)
    else:
        from mmzoo.media.reader import read_within

        video = read_within(deadline, Path(source), wanted, backend)
    for note in video.notes:
        logger.warning("%s: %s", video.source, note)
    return video


def read_path(path: Path, wanted: Wanted, backend: str) -> Video:
    """Reads a file or a folder in this process; see `read_video`."""
    with decoders.typed_errors(path, backend):
        if not path.exists():
            raise VideoReadError(path, backend, "there is no such file or folder")
        if path.is_dir():
            return _read_folder(path, wanted, backend)
        if path.is_file() and path.stat().st_size == 0:
            raise VideoReadError(path, backend, "the file is empty")
    return _read_file(path, wanted, backend)


def _read_file(path: Path, wanted: Wanted, backend: str) -> Video:
    header = decoders.read_header(path)
    notes = decoders.shortfall(header, path, wanted.allow_short)
    differs = decoders.decord_differs(header)
    if backend == "decord" and differs:
        raise VideoReadError(path, decoders.version("decord"), differs, "Use backend='pyav' or 'auto'.")
    if backend == "auto":
        backend = "decord" if not differs and importlib.util.find_spec("decord") else "pyav"
    name = decoders.version(backend)
    fps = wanted.video_fps or header.fps
    notes += _rate_notes(header, fps, wanted.sampling)

    def pick(num_total: int) -> list[int]:
        return _some(wanted.pick(num_total, fps)[0], path, name, wanted)

    if backend == "decord":
        decoded = decoders.decode_decord(path, header, pick)
    else:
        decoded = decoders.decode_pyav(path, header, pick, wanted.allow_short)
    indices, said = wanted.pick(decoded.num_total, fps)
    notes += [*decoded.notes, *said]
    return Video(
        frames=decoded.frames,
        timestamps=decoded.timestamps,
        indices=indices,
        fps=fps,
        num_total=decoded.num_total,
        sampling=wanted.sampling,
        backend=name,
        source=str(path),
        notes=tuple(notes),
    )


def _rate_notes(header: decoders.Header, fps: float | None, sampling: str) -> list[str]:
    """A header's rate can be far from the real one (variable rates), and rules that count in seconds believe it."""
    rule = SAMPLING_RULES.get(sampling)
    if not fps or len(header.times) < 2 or rule is None or "video_fps" not in inspect.signature(rule).parameters:
        return []
    span = header.times[-1] - header.times[0]
    rate = (len(header.times) - 1) / span if span > 0 else fps
    return [f"sampled as {fps:g} frames/s, but the frames come at {rate:.3g}"] if abs(rate / fps - 1) > 0.1 else []


def _some(indices: list[int], path: Path | str, name: str, wanted: Wanted) -> list[int]:
    if not indices:
        raise VideoReadError(path, name, f"the sampling rule {wanted.sampling!r} picks no frame of so short a video")
    return indices


def _read_folder(path: Path, wanted: Wanted, backend: str) -> Video:
    if backend != "auto":
        raise VideoReadError(path, backend, "it is a folder", "Use backend='auto' for a folder of pictures.")
    # A hidden file is no frame: macOS puts ._0001.jpg beside 0001.jpg.
    pictures = [f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
    files = sorted(pictures, key=_natural)
    name = decoders.version("frames")
    if not files:
        raise VideoReadError(path, name, f"the folder has no pictures ({', '.join(IMAGE_SUFFIXES)})")
    indices, notes = wanted.pick(len(files), wanted.video_fps, folder=True)
    images = {}
    for i in sorted(set(_some(indices, path, name, wanted))):
        try:
            images[i] = np.asarray(read_image(files[i]))
        except InputError as error:
            raise VideoReadError(path, name, str(error).rstrip(".")) from error
    sizes = {image.shape[1::-1]: files[i].name for i, image in images.items()}
    if len(sizes) > 1:
        raise VideoReadError(path, name, f"pictures of different sizes: {sizes}")
    frames = np.stack([images[i] for i in indices])
    return _without_clock(frames, indices, len(files), wanted, name, str(path), notes)


def _natural(file: Path) -> tuple[list[tuple[int, str]], str]:
    """A key by which 2.jpg comes before 10.jpg."""
    parts = re.findall(r"\d+|\D+", file.stem)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], file.name


def _read_array(source: Any, wanted: Wanted) -> Video:
    if isinstance(source, (list, tuple)):
        images = [np.asarray(read_image(image)) for image in source]
        sizes = sorted({image.shape[1::-1] for image in images})
        if len(sizes) != 1:
            raise InputError(f"A list of pictures needs at least one, all of one size. The sizes here: {sizes}.")
        array = np.stack(images)
    else:
        array = np.asarray(source.cpu() if hasattr(source, "cpu") else source)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or array.size == 0:
        shape = list(array.shape)
        raise InputError(f"A video array is uint8 [T, H, W, 3] and not empty; this one is {array.dtype} {shape}.")
    indices, notes = wanted.pick(len(array), wanted.video_fps)
    frames = array[_some(indices, "array", "array", wanted)]
    return _without_clock(frames, indices, len(array), wanted, "array", "array", notes)


def _without_clock(
    frames: np.ndarray, indices: list[int], num_total: int, wanted: Wanted, backend: str, source: str, notes: list[str]
) -> Video:
    """A video whose times follow from `video_fps`, where that was given."""
    times = np.array(indices, dtype=np.float64) / (wanted.video_fps or np.nan)
    return Video(frames, times, indices, wanted.video_fps, num_total, wanted.sampling, backend, source, tuple(notes))


class VideoWriter:
    """An H.264 file (yuv420p) that is written block by block, under a temporary name until it is whole.

        with VideoWriter("clip.mp4", fps=16) as writer:
            for block in rollout:
                writer.write(block)

    The same frames give the same file, however they are cut into blocks. After an error no file is left.

    Args:
        path: ends in .mp4, .mov or .mkv.
        fps: frames a second.
        crf: quality of x264, 0 (best) to 51.
        growing: write .mp4 or .mov under its own name and in fragments, so that players show what is there already.
        audio: float32 [S] from -1 to 1, mono, from the first frame on; written as AAC when the file is closed.
        sample_rate: of the sound.

    Raises:
        InputError: another suffix, or numbers outside these ranges.
        MissingExtra: PyAV is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float = 8,
        crf: int = 18,
        growing: bool = False,
        audio: np.ndarray | None = None,
        sample_rate: int = 16000,
    ):
        if audio is not None and (audio.dtype != np.float32 or audio.ndim != 1 or sample_rate < 1):
            raise InputError(
                f"Sound is written from float32 [S] at a rate of 1 or more, not {audio.dtype} {list(audio.shape)} at "
                f"{sample_rate!r}."
            )
        self.audio, self.sample_rate = audio, sample_rate
        self.path, self.fps, self.crf, self.growing = Path(path), fps, crf, growing
        if self.path.suffix.lower() not in _CONTAINERS:
            raise InputError(f"Video is written as .mp4, .mov or .mkv, not {self.path.name!r}.")
        if not 0 < fps < 1e4 or not 0 <= crf <= 51:
            raise InputError(f"fps lies between 0 and 10000 and crf between 0 and 51; these are {fps!r} and {crf!r}.")
        self._av = decoders.need("av", "writing a video")

    def __enter__(self) -> VideoWriter:
        self._files = ExitStack()
        place = self.path if self.growing else self._files.enter_context(replacing(self.path))
        kind = _CONTAINERS[self.path.suffix.lower()]
        options = {"movflags": "frag_every_frame+empty_moov", "flush_packets": "1"} if self.growing else {}
        container = self._av.open(f"file:{place}", "w", format=kind, options=options)
        self._container = self._files.enter_context(container)
        self._stream: Any = None
        return self

    def write(self, frames: np.ndarray) -> None:
        """Add frames.

        Args:
            frames: uint8 [T, H, W, 3], RGB, with even height and width, the same in every block.

        Raises:
            InputError: frames of another kind or size.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise InputError(f"A video is written from uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}.")
        height, width = frames.shape[1:3]
        if self._stream is None:
            self._stream = self._begin(height, width)
        if (self._stream.height, self._stream.width) != (height, width):
            size = f"{self._stream.width}x{self._stream.height}"
            raise InputError(f"This video has frames of {size}; these are {width}x{height}.")
        for frame in frames:
            self._container.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def _begin(self, height: int, width: int) -> Any:
        if height % 2 or width % 2:
            raise InputError(f"H.264 in yuv420p needs even sizes, not {width}x{height}. Pad or crop by one pixel.")
        # x264's files depend on the number of threads and, for small frames and with mbtree, differ from call to call.
        options = {"crf": str(self.crf), "x264-params": "mbtree=0"} | ({"tune": "zerolatency"} if self.growing else {})
        rate = Fraction(self.fps).limit_denominator(1001)
        stream = self._container.add_stream("libx264", rate=rate, options=options)
        stream.codec_context.thread_count = 1
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if self.audio is not None:
            self._sound = self._container.add_stream("aac", rate=self.sample_rate, layout="mono")
        return stream

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self._stream is not None:
            self._container.mux(self._stream.encode())
            if self.audio is not None:
                self._write_sound(self.audio)
        self._files.__exit__(*error)

    def _write_sound(self, audio: np.ndarray) -> None:
        frame = self._av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = self.sample_rate, 0, Fraction(1, self.sample_rate)
        self._container.mux(self._sound.encode(frame))
        self._container.mux(self._sound.encode())


def write_video(
    frames: np.ndarray,
    path: str | os.PathLike[str],
    fps: float = 8,
    crf: int = 18,
    audio: np.ndarray | None = None,
    sample_rate: int = 16000,
) -> None:
    """Writes a whole video, as `VideoWriter` does.

    Args:
        frames: uint8 [T, H, W, 3], RGB, with even height and width.
        path: ends in .mp4, .mov or .mkv.
        fps: frames a second.
        crf: quality of x264, 0 (best) to 51.
        audio, sample_rate: the sound, as `VideoWriter` takes it.

    Raises:
        InputError: frames or sound of another kind, or another suffix.
        MissingExtra: PyAV is not installed.
    """
    with VideoWriter(path, fps, crf, audio=audio, sample_rate=sample_rate) as writer:
        writer.write(frames)
