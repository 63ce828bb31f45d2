"""The Hub, against a server on loopback: push, pull, interruptions, access; seals; and what transformers reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import READER, WRITER, Fault, Hub
from huggingface_hub import constants, parse_eval_result_entries
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mmzoo
from mmzoo import hub, integrity, registry
from mmzoo.cli import app
from mmzoo.errors import CheckpointError, HubError, InputError
from mmzoo.language import MultimodalLM

TINY = mmzoo.list_models("*-tiny")


@pytest.fixture(scope="session")
def _server() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def server(_server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The server, empty, for a client that is online and logged in, with a cache of its own."""
    for record in (_server.repos, _server.large, _server.requests, _server.ranges, _server.faults):
        record.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return _server


def access(server: Hub, token: str = WRITER) -> dict[str, str]:
    return {"endpoint": server.endpoint, "token": token}


def tiny(name: str = "aki-tiny", seed: int = 0) -> MultimodalLM:
    torch.manual_seed(seed)
    return mmzoo.create(name)


def logits(model: MultimodalLM, processor: Any = None) -> torch.Tensor:
    picture = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    asked = (processor or model.processor).ask("what colour is the circle", image=picture.numpy())
    with torch.no_grad():
        return model(**asked).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_hub(server: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    found = server.repos[repo].files(revision)
    assert found is not None
    return {path: content for path, content in found[1].items() if path != ".gitattributes"}


@pytest.mark.parametrize("name", TINY)
def test_what_is_pushed_is_what_is_loaded(name: str, server: Hub) -> None:
    model = tiny(name)
    address = mmzoo.push(model, "org/pushed", **access(server))
    assert address.startswith(f"{server.endpoint}/org/pushed/commit/")
    again = mmzoo.load("hf-hub:org/pushed", **access(server))
    assert torch.equal(logits(again), logits(model))
    assert again.processor.to_dict() == model.processor.to_dict()
