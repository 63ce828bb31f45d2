"""Sound in: the sound track of a video, or a sound file, as one channel at one rate on the clock of the frames.

Shape legend: S samples, H channels.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmzoo.errors import AudioReadError, InputError, MmzooError
from mmzoo.media import decoders

SAMPLE_RATE = 16000
GAP = 0.05
"""Seconds by which time stamps may stray before silence is put between two packets: containers round them."""
TOLERANCE = 0.01
SHORT_HINT = "Fetch the file again, or read what is there with allow_short=True."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound.

    Attributes:
        waveform: float32 [S], from -1 to 1; the first sample stands at the first frame of the video.
        sample_rate: samples a second.
        source_rate, channels: of the file.
        source: the path, or "array".
        notes: what has to be said about this reading.
    """

    waveform: np.ndarray
    sample_rate: int = SAMPLE_RATE
    source_rate: int = SAMPLE_RATE
    channels: int = 1
    source: str = "array"
    notes: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.waveform) / self.sample_rate

    def __str__(self) -> str:
        said = f"{self.source}: {self.duration:.2f} s, {self.source_rate} Hz, {self.channels} channels"
        return "; ".join((said, *self.notes))


def has_audio(path: str | os.PathLike[str]) -> bool:
    """Whether a file has a sound track. Raises AudioReadError: it cannot be opened."""
    return "audio" in streams(path)


def streams(path: str | os.PathLike[str]) -> frozenset[str]:
    """What a file holds, of "video" and "audio"; the picture of a record's sleeve is no video.

    Raises:
        AudioReadError: the file cannot be opened.
        MissingExtra: PyAV is not installed.
    """
    with _typed_errors(Path(path)), decoders.open_pyav(Path(path)) as container:
        sleeve = decoders.need("av", "reading sound").stream.Disposition.attached_pic
        found = [stream for stream in container.streams if not stream.disposition & sleeve]
        return frozenset(stream.type for stream in found) & {"video", "audio"}


def read_audio(
    source: str | os.PathLike[str] | np.ndarray,
    *,
    sample_rate: int = SAMPLE_RATE,
    channels: Literal["mean", "first"] = "mean",
    stop: float | None = None,
    allow_short: bool = False,
) -> Audio:
    """Reads the sound of a video or sound file.

    Time stamps count: a track that begins after the first frame of the video begins with silence, what lies before that
    frame is cut, and a hole between packets is silence.

    Args:
        source: a file that FFmpeg knows, or float32 [S] or [H, S] from -1 to 1 at `sample_rate`.
        sample_rate: wanted, 1000 to 384000.
        channels: "mean" of all, or the "first" one.
        stop: seconds after which nothing is read.
        allow_short: return what is there of a file that is damaged or holds less than it promises, with a note.

    Raises:
        AudioReadError: there is no such file or sound track in it, or it is damaged or holds less than it promises.
        InputError: an array that is no sound, or arguments out of range.
        MissingExtra: PyAV is not installed.
    """
    if channels not in ("mean", "first") or not 1000 <= sample_rate <= 384000 or (stop is not None and stop <= 0):
        raise InputError(
            "Sound is read with channels 'mean' or 'first', a sample_rate of 1000 to 384000 and a stop above 0, not "
            f"{channels!r}, {sample_rate!r} and {stop!r}."
        )
    if isinstance(source, np.ndarray):
        return _read_array(source, sample_rate, channels, stop)
    path = Path(source)
    if not path.is_file():
        raise AudioReadError(path, "there is no such file")
    with _typed_errors(path, SHORT_HINT):
        audio = _read_file(path, sample_rate, channels, stop, allow_short)
    for note in audio.notes:
        logger.warning("%s: %s", audio.source, note)
    return audio


def _read_array(array: np.ndarray, sample_rate: int, channels: str, stop: float | None) -> Audio:
    if array.dtype != np.float32 or array.ndim not in (1, 2) or array.size == 0 or not np.isfinite(array).all():
        raise InputError(
            f"A sound is finite float32 [S] or [H, S] and not empty; this one is {array.dtype} {list(array.shape)}."
        )
    planes = np.atleast_2d(array)
    mono = _one_channel(planes, channels)
    kept = mono if stop is None else mono[: round(stop * sample_rate)]
    return Audio(kept, sample_rate, sample_rate, len(planes))


def _one_channel(planes: np.ndarray, channels: str) -> np.ndarray:
    return planes[0] if channels == "first" else planes.mean(0, dtype=np.float32)


def _read_file(path: Path, sample_rate: int, channels: str, stop: float | None, allow_short: bool) -> Audio:
    with decoders.open_pyav(path) as container:
        if not container.streams.audio:
            raise AudioReadError(path, "the file has no sound track")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise AudioReadError(path, "there is no decoder for its sound track")
        stream.codec_context.options = {"err_detect": "crccheck+explode"}  # else decoders cover up what is damaged
        rate, count = stream.codec_context.sample_rate, stream.codec_context.channels
        clock, promised = _clock(container, stream), _promised(stream)
        parts, notes = _decoded(container, stream, path, allow_short)
        placed, holes = _on_the_clock(parts, rate, clock, channels, stop)
    if holes:
        notes.append(f"{holes:.2f} s between its packets are missing, and silent here")
    held = clock + len(placed) / rate
    if promised is not None and (stop is None or held < clock + stop):
        missing = promised - held
        if missing > max(0.1, TOLERANCE * promised):
            notes.append(f"the header promises {promised:.2f} s, the sound ends at {held:.2f} s")
            if not allow_short:
                raise AudioReadError(path, notes[-1], SHORT_HINT)
    return Audio(_resampled(placed, rate, sample_rate), sample_rate, rate, count, str(path), tuple(notes))


def _clock(container: Any, stream: Any) -> float:
    """Seconds, by the container, at which the waveform begins: the video's first frame, or the first sound."""
    first = container.streams.best("video") or stream
    return float((first.start_time or 0) * first.time_base)


def _promised(stream: Any) -> float | None:
    """Seconds, by the container, at which the sound ends by its header."""
    if stream.duration is None:
        return None
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base)


Part = tuple[float, int, np.ndarray]
"""Seconds, rate, and planes [H, S]."""


def _decoded(container: Any, stream: Any, path: Path, allow_short: bool) -> tuple[Iterator[Part], list[str]]:
    av, notes = decoders.need("av", "reading sound"), []

    def parts() -> Iterator[Part]:
        end, damaged = 0.0, 0
        for packet in container.demux(stream):
            try:
                if packet.is_corrupt:
                    raise ValueError("a packet ends early")
                frames = packet.decode()
            except (av.FFmpegError, ValueError) as error:
                damaged += 1
                if not allow_short:
                    raise AudioReadError(path, f"it is damaged at {end:.2f} s ({error})", SHORT_HINT) from error
                continue
            for frame in frames:
                time = end if frame.time is None else frame.time
                end = time + frame.samples / frame.sample_rate
                yield time, frame.sample_rate, _planes(frame)
        if damaged:
            notes.append(f"{damaged} damaged packets are silence")

    return parts(), notes


def _planes(frame: Any) -> np.ndarray:
    """float32 [H, S], from -1 to 1. FFmpeg's own conversion was seen to crash on channels without a known layout."""
    array = frame.to_ndarray()
    planes = array if frame.format.is_planar else array.reshape(frame.samples, -1).T
    if planes.dtype == np.uint8:
        return (planes.astype(np.float32) - 128) / 128
    if planes.dtype.kind == "i":
        return planes.astype(np.float32) / -float(np.iinfo(planes.dtype).min)
    return planes.astype(np.float32)


def _on_the_clock(
    parts: Iterator[Part], rate: int, clock: float, channels: str, stop: float | None
) -> tuple[np.ndarray, float]:
    """float32 [S] at the file's rate, each part where its time stamp says, and the seconds of silent holes."""
    pieces: list[np.ndarray] = []
    at, holes = 0, 0
    for time, part_rate, planes in parts:
        if part_rate != rate:
            raise ValueError(f"the sample rate changes from {rate} to {part_rate} inside the file")
        mono, start = _one_channel(planes, channels), round((time - clock) * rate)
        if not pieces and start < 0:
            mono, start = mono[-start:], 0
            if not len(mono):
                continue
        if start - at > (GAP * rate if pieces else 0):
            holes += start - at if pieces else 0
            pieces.append(np.zeros(start - at, np.float32))
            at = start
        pieces.append(mono)
        at += len(mono)
        if stop is not None and at >= stop * rate:
            break
    if not pieces:
        raise ValueError("the sound track is empty")
    waveform = np.concatenate(pieces)
    return (waveform if stop is None else waveform[: round(stop * rate)]), holes / rate


def _resampled(waveform: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return waveform
    av = decoders.need("av", "resampling sound")
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None]), format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=wanted)
    made = [part.to_ndarray()[0] for part in (*resampler.resample(frame), *resampler.resample(None))]
    return np.concatenate(made)


@contextmanager
def _typed_errors(path: Path, hint: str = "") -> Iterator[None]:
    try:
        yield
    except MmzooError:
        raise
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        said = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise AudioReadError(path, f"{type(error).__name__}: {said}", hint) from error
