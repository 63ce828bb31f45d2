"""Typed errors. Every message says what was wrong, with what, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


class MmzooError(Exception):
    """Base class of every error that mmzoo raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors compose the message; a copy from another process keeps it as it is.
        return _revived, (type(self), str(self), vars(self))


def _revived(kind: type[MmzooError], message: str, attributes: dict[str, Any]) -> MmzooError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    vars(error).update(attributes)
    return error


class UnknownModel(MmzooError, LookupError):
    """A model name that is not in the registry."""


class NoPretrainedWeights(MmzooError, LookupError):
    """Weights were asked for, but none are known for this entry."""


class CheckpointError(MmzooError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the model.

    Attributes:
        missing: parameter names the model has and the checkpoint lacks.
        unexpected: names the checkpoint has and the model lacks.
        misshapen: `(name, shape in the checkpoint, shape in the model)`.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
    ):
        self.missing, self.unexpected, self.misshapen = sorted(missing), sorted(unexpected), sorted(misshapen)
        lines = [message]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {name}" for name in self.unexpected]
        lines += [f"  misshapen: {name} is {there}, the model has {here}" for name, there, here in self.misshapen]
        super().__init__("\n".join(lines))


class HubError(MmzooError, OSError):
    """A push to the Hub was refused or interrupted."""


class MissingExtra(MmzooError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        self.package, self.extra = package, extra
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: pip install 'mmzoo[{extra}]'")


class UnsupportedMask(MmzooError, NotImplementedError):
    """An attention backend cannot express a rule. A mask is never dropped or replaced instead."""

    def __init__(self, backend: str, rule: str, reason: str, alternatives: Iterable[str] = ()):
        self.backend, self.rule, self.reason = backend, rule, reason
        hint = f" Use attention={' or '.join(repr(name) for name in alternatives)}." if alternatives else ""
        super().__init__(f"The attention backend {backend!r} cannot run the rule {rule!r}: {reason}.{hint}")


class InputError(MmzooError, ValueError):
    """Inputs that do not fit together, such as more `<image>` places than images."""


class DatasetError(MmzooError, ValueError):
    """Training data that cannot be used as they are.

    Attributes:
        problems: each as one line of text: file, line, field, what is wrong.
    """

    def __init__(self, message: str, problems: Iterable[str], shown: int = 20):
        self.problems = list(problems)
        lines = [message, *(f"  {problem}" for problem in self.problems[:shown])]
        hidden = len(self.problems) - shown
        super().__init__("\n".join([*lines, f"  and {hidden} more"] if hidden > 0 else lines))


class EvaluationError(MmzooError, RuntimeError):
    """An evaluation had to stop. What `mmzoo eval` was answered is kept, and the same command goes on from there."""


class AudioReadError(MmzooError, OSError):
    """A sound could not be read, or less of it than the file promises.

    Attributes:
        path: the file.
        cause: what was wrong.
    """

    def __init__(self, path: str | Path, cause: str, hint: str = ""):
        self.path, self.cause = str(path), cause
        super().__init__(f"Cannot read the sound of {self.path!r}: {cause}." + (f" {hint}" if hint else ""))


class VideoReadError(MmzooError, OSError):
    """A video could not be read, or not as many frames as were asked for.

    Attributes:
        path: the file or folder.
        backend: the decoder that gave up, with its version where known.
        cause: what it said.
    """

    def __init__(self, path: str | Path, backend: str, cause: str, hint: str = ""):
        self.path, self.backend, self.cause = str(path), backend, cause
        super().__init__(f"Cannot read the video {self.path!r} with {backend}: {cause}." + (f" {hint}" if hint else ""))
