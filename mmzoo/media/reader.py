"""One persistent process that reads videos, so that a decoder that hangs or crashes costs one error and no more.

A decoder that loops in C may hold the interpreter, so no thread or signal handler can stop it; a process can be killed.
It is started by `subprocess`, because DataLoader workers may not have children of `multiprocessing`.

A message is 8 bytes of length, that much JSON and, where the JSON has a `shape`, the bytes of the frames.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from mmzoo.errors import InputError, MissingExtra, VideoReadError
from mmzoo.media.video import Video, Wanted, read_path

# Seconds to start and to import the decoders. They are no part of a deadline, which is about the file.
START_LIMIT = 120.0
# The child ends itself this much later than its parent would have ended it, in case the parent was killed meanwhile.
ORPHAN_GRACE = 10

_ERRORS = {kind.__name__: kind for kind in (VideoReadError, InputError, MissingExtra)}


class _Late(Exception):
    """The time was over and the process was killed."""


class _Ended(Exception):
    """The process ended without an answer."""


class _Reader:
    """The parent's end of a reader process."""

    def __init__(self) -> None:
        # The child finds what its parent finds, as with multiprocessing's spawn.
        code = f"import sys; sys.path[:] = {sys.path!r}; from mmzoo.media.reader import serve; serve()"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, bufsize=0)

    def ask(self, request: dict[str, Any], limit: float) -> tuple[dict[str, Any], np.ndarray | None]:
        """Sends a request and waits for its answer, at most `limit` seconds."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(limit, give_up)
        timer.daemon = True
        timer.start()
        try:
            _send(cast(BinaryIO, self.process.stdin), request)
            return _receive(cast(BinaryIO, self.process.stdout))
        except (EOFError, OSError):
            code = self.close()
            raise (_Late() if late.is_set() else _Ended(f"exit code {code}")) from None
        except BaseException:
            # An interrupt leaves an answer under way that the next call must not take for its own.
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
            if late.is_set():
                self.close()

    def close(self) -> int:
        """Ends the process, if it has not ended, and leaves no zombie."""
        self.close_pipes()
        try:
            code = self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return code

    def close_pipes(self) -> None:
        cast(BinaryIO, self.process.stdin).close()
        cast(BinaryIO, self.process.stdout).close()


_lock = threading.Lock()
_reader: _Reader | None = None


def read_within(deadline: float, path: Path, wanted: Wanted, backend: str) -> Video:
    """Reads a file or a folder in the reader process; see `read_video`.

    One process serves all threads of this one in turn; the deadline counts from a call's own turn.

    Raises:
        VideoReadError: as `read_video`, and if there was no answer in `deadline` seconds or the reader process crashed.
    """
    global _reader
    request = {"path": str(path), "wanted": dataclasses.asdict(wanted), "backend": backend, "deadline": deadline}
    if not path.is_absolute():  # this process may have changed its folder since the reader was started
        request["folder"] = os.getcwd()
    with _lock:
        try:
            if _reader is None or _reader.process.poll() is not None:
                _reader = _Reader()
                _reader.ask({}, START_LIMIT)
            answer, frames = _reader.ask(request, deadline)
        except _Late:
            raise VideoReadError(path, backend, f"no answer within {deadline:g} s") from None
        except (_Ended, OSError) as error:
            raise VideoReadError(path, backend, f"the reader process ended ({error})") from None
    if "error" in answer:
        raise _revived(answer)
    video = answer["video"]
    video["timestamps"] = np.array(video["timestamps"], dtype=np.float64)
    return Video(frames=cast(np.ndarray, frames), **video | {"notes": tuple(video["notes"])})


def close_reader() -> None:
    """Ends this process's reader, if it has one; the next deadline starts another."""
    global _reader
    reader = _reader
    if reader is not None:
        # Another thread may be waiting for an answer; this ends its wait, and it lets go of the lock.
        reader.process.kill()
    with _lock:
        if _reader is not None:
            _reader.close()
        _reader = None


def _forget_after_fork() -> None:
    """A forked child must neither talk to its parent's reader nor hold its pipes open."""
    global _lock, _reader
    _lock = threading.Lock()
    if _reader is not None:
        _reader.close_pipes()
        _reader.process.returncode = 0
    _reader = None


atexit.register(close_reader)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def serve() -> None:
    """The child: answers requests until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What C code prints must not end up between messages.
    os.dup2(2, 1)
    for package in ("av", "decord"):
        try:
            importlib.import_module(package)
        except ImportError:
            pass
    while True:
        try:
            request, _ = _receive(requests)
        except EOFError:
            return
        _send(answers, *_answer(request))


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    if not request:
        return {}, None
    if hasattr(signal, "alarm"):
        signal.alarm(math.ceil(request["deadline"]) + ORPHAN_GRACE)
    if "folder" in request:
        os.chdir(request["folder"])
    try:
        video = read_path(Path(request["path"]), Wanted(**request["wanted"]), request["backend"])
    except tuple(_ERRORS.values()) as error:
        return {"error": type(error).__name__, "message": str(error), "attributes": vars(error)}, None
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)
    fields = {field.name: getattr(video, field.name) for field in dataclasses.fields(video) if field.name != "frames"}
    return {"video": fields | {"timestamps": video.timestamps.tolist()}}, video.frames


def _revived(answer: dict[str, Any]) -> Exception:
    """The child's error with its message and attributes; the constructors would compose the message anew."""
    kind = _ERRORS[answer["error"]]
    error = kind.__new__(kind)
    BaseException.__init__(error, answer["message"])
    vars(error).update(answer["attributes"])
    return error


def _send(pipe: BinaryIO, message: dict[str, Any], frames: np.ndarray | None = None) -> None:
    if frames is not None:
        message = message | {"shape": frames.shape}
    # Numbers may come as NumPy's scalars.
    text = json.dumps(message, default=lambda scalar: scalar.item()).encode()
    pipe.write(struct.pack("<q", len(text)) + text)
    if frames is not None:
        pipe.write(np.ascontiguousarray(frames).data.cast("B"))
    pipe.flush()


def _receive(pipe: BinaryIO) -> tuple[dict[str, Any], np.ndarray | None]:
    (length,) = struct.unpack("<q", _exactly(pipe, 8).tobytes())
    message = json.loads(_exactly(pipe, length).tobytes())
    if "shape" not in message:
        return message, None
    return message, _exactly(pipe, math.prod(message["shape"])).reshape(message["shape"])


def _exactly(pipe: BinaryIO, size: int) -> np.ndarray:
    data, got = np.empty(size, np.uint8), 0
    while got < size:
        count = pipe.readinto(data.data[got:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        got += count
    return data
