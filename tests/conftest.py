"""What holds for every test: one thread, fixed seeds, no network, and no memory that only happens to be zero."""

from __future__ import annotations

import os

# Read when the libraries are imported, and inherited by the subprocesses that some tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import ipaddress
import random
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's interpreter, chosen before anything decorates a kernel, those of triton's own library included.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

settings.register_profile("mmzoo", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("mmzoo")


def _is_local(family: int, address: Any) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = address[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _guarded(connect: Callable) -> Callable:
    def guarded(self: socket.socket, address: Any) -> Any:
        if not _is_local(self.family, address):
            raise RuntimeError(f"A test tried to reach {address!r}. Tests use no network.")
        return connect(self, address)

    return guarded


# Installed on import, so that it also holds while tests are collected.
socket.socket.connect = _guarded(socket.socket.connect)  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype is not torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max // 3)
    return tensor


def _poisoned(allocate: Callable) -> Callable:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        # Under torch.compile the frame is not ours to read, and the graph must not change.
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(tensor) if caller.startswith("mmzoo") else tensor

    return poisoned


@pytest.fixture(autouse=True, scope="session")
def _poisoned_memory() -> Iterator[None]:
    """Fill what mmzoo allocates without a value, so that reading it before writing it shows.

    For the whole session rather than for each test: torch.compile and device contexts look functions up by identity.
    """
    with torch.device("cpu"):
        torch.empty(0)  # torch collects the functions a device context handles here, once, before they are replaced

    places = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
