"""The command line as a newcomer meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import mmzoo
from mmzoo import cli, hub
from mmzoo.attention import drawing
from mmzoo.masks import RULES
from mmzoo.world import make_clip, write_clip


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["mmzoo", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert raised.value.code == 1
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(hub.save(mmzoo.create("aki-tiny"), tmp_path_factory.mktemp("tiny") / "model"))


def test_models_are_listed() -> None:
    assert "aki-tiny" in run("list")
    assert "aki-4b" not in run("list", "*-tiny")
    generators = run("list", "--task", "text-to-video")
    assert "longlive-1.3b" in generators and "aki-4b" not in generators


def test_no_name_is_cut() -> None:
    shown = run("list")
    assert "…" not in shown
    assert all(name in shown for name in mmzoo.list_models())


def test_info_shows_size_and_rule() -> None:
    shown = run("info", "aki-4b")
    for part in ("4,330,957,954 parameters", "cc-by-nc-4.0", "visual -> text up to the first answer: always"):
        assert part in shown


def test_ask_answers_and_draws(tiny: str, tmp_path: Path) -> None:
    write_clip(make_clip(0), tmp_path / "clip.mp4")
    shown = run("ask", tiny, "what colour is the square", "--video", f"{tmp_path}/clip.mp4", "-o", f"{tmp_path}/out")
    assert "what colour is the square" in shown
    assert "decord" in shown or "pyav" in shown
    with Image.open(tmp_path / "out" / "frames.png") as sheet, Image.open(tmp_path / "out" / "mask.png") as mask:
        assert min(*sheet.size, *mask.size) > 100
        # The frames of the clip are on the sheet: colours that no caption has.
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_ask_takes_an_image(tiny: str, tmp_path: Path) -> None:
    Image.fromarray(make_clip(0).frames[4]).save(tmp_path / "frame.png")
    run("ask", tiny, "what colour is the square", "--image", f"{tmp_path}/frame.png", "-o", f"{tmp_path}/out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mask.png"]


@pytest.mark.parametrize("command", ["ask", "attend"])
def test_a_generator_is_not_asked(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    folder = str(hub.save(mmzoo.create("vid-gpt-tiny"), tmp_path / "generator"))
    shown = failure(monkeypatch, capsys, command, folder, "why", "--image", "x.png")
    assert f"InputError: {folder} generates and answers no questions; `mmzoo generate`" in shown


def test_demo_answers_about_the_shipped_clips(tmp_path: Path) -> None:
    shown = run("demo", "-o", str(tmp_path))
    assert "right answer" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "appear_frames.png",
        "appear_mask.png",
        "collision_frames.png",
        "collision_mask.png",
    ]


@pytest.mark.parametrize("name", RULES)
def test_every_mask_is_drawn(name: str, tmp_path: Path) -> None:
    shown = run("mask", name, "-o", f"{tmp_path}/mask.png")
    assert "Rule" in shown
    assert (tmp_path / "mask.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "--task", "nonsense"], "No model is for the task 'nonsense'. The tasks are image-text-to-text, "),
        (["mask", "causal", "-o", "mask.foo"], "'mask.foo' does not end in .png"),
        (["attend", "aki-5b", "why", "--image", "x.png", "-o", "map.jpg"], "'map.jpg' does not end in .png"),
        (["info", "aki-5b"], "UnknownModel: Unknown model 'aki-5b'"),
        (["ask", "aki-tiny", "why"], "Give one of --video and --image"),
        (["ask", "aki-tiny", "why", "--image", "x.png"], "NoPretrainedWeights"),
        (["mask", "moebius"], "Unknown rule 'moebius'"),
        (["mask", "causal", "--layout", "text:many"], "Cannot read the span 'text:many'"),
        (
            ["mask", "causal", "--layout", "text:4001"],
            "The layout has 4,001 tokens; a mask is drawn over at most 4,000",
        ),
        (["mask", "causal", "--layout", "video:9999x9999x9999"], "The layout has 999,700,029,999 tokens"),
        (["mask", "causal", "--layout", ""], "The layout '' has no tokens. Write spans such as text:4"),
        (["mask", "causal", "--layout", "text:0"], "The layout 'text:0' has no tokens. Write spans such as text:4"),
        (["fit", "--config", "nothing"], "No recipe or file named 'nothing'"),
    ],
)
def test_errors_are_one_paragraph_without_traceback(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = failure(monkeypatch, capsys, *arguments)
    assert said in shown
    assert "Traceback" not in shown


def test_an_unreadable_video_names_path_and_decoder(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    shown = failure(monkeypatch, capsys, "ask", tiny, "why", "--video", f"{tmp_path}/text.mp4")
    assert "VideoReadError" in shown
    assert "text.mp4" in shown


def test_training_without_lightning_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mmzoo_training.cli", None)
    assert "mmzoo[train]" in failure(monkeypatch, capsys, "fit", "--config", "aki-nano")


def test_a_mask_that_is_too_large_to_draw_is_said_so_beside_the_answer(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "MAX_DRAWN", 8)
    Image.fromarray(make_clip(0).frames[4]).save(tmp_path / "frame.png")
    shown = run("ask", tiny, "what", "--image", f"{tmp_path}/frame.png", "-o", f"{tmp_path}/out")
    assert "confidence" in shown
    assert "not drawn" in shown
    assert not (tmp_path / "out").exists()
