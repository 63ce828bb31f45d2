"""The benchmark of attention goes through to its end, and measures nothing that is wrong."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    return importlib.import_module("attention")


def test_a_rehearsal_measures_writes_and_draws(benchmark: ModuleType, tmp_path: Path) -> None:
    json_file, plot = tmp_path / "a.json", tmp_path / "a.png"
    asked = ["--only", "mmca", "questions", "--lengths", "64"]
    assert benchmark.main(["--rehearse", *asked, "--json", str(json_file), "--plot", str(plot)]) == 0
    found = json.loads(json_file.read_text())
    assert "rehearsal" in found["device"]
    rows = found["lengths"]["64"]["mmca"]
    assert list(rows) == ["sdpa, dense mask", "mmzoo_flash"]
    for numbers in rows.values():
        assert numbers["training, ms"] > 0
        assert numbers["training, a new layout each step, ms"] > 0
    assert {"reading", "decoding"} == {key.split(":")[0] for row in found["questions"].values() for key in row}
    assert plot.stat().st_size > 0


def test_nothing_is_measured_if_a_way_is_wrong(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = benchmark.WAYS["sdpa, dense mask"]
    wrong = benchmark.Way(right.build, lambda q, k, v, made: right.run(q, k, v, made) * 1.01, needs_gpu=False)
    monkeypatch.setattr(benchmark, "WAYS", {"sdpa, dense mask": wrong})
    assert benchmark.main(["--rehearse", "--json", str(tmp_path / "a.json")]) == 1
    assert "sdpa, dense mask, causal: out is off by 1.0e-02" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_fails_or_comes_too_late_is_said(benchmark: ModuleType) -> None:
    def fails() -> dict[str, float]:
        raise RuntimeError("no room\nin shared memory")

    later = float("inf")
    assert benchmark.attempted(fails, later) == {"failed": "RuntimeError: no room"}
    assert benchmark.attempted(lambda: {"forward, ms": 1.0}, later) == {"forward, ms": 1.0}
    assert benchmark.attempted(fails, 0.0) == {"left out": "out of time"}
