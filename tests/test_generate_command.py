"""`mmzoo generate`, as it is typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mmzoo.cli import _prompts, app
from mmzoo.errors import InputError
from mmzoo.media import read_video, write_video


def run(*arguments: object) -> str:
    found = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def test_a_clip_is_made_and_gone_on_with(tmp_path: Path) -> None:
    made = tmp_path / "made.mp4"
    assert "written" in run("vid-gpt-nano", "--frames", 3, "--steps", 2, "--out", made)
    assert read_video(made, sampling="all").frames.shape == (3, 128, 128, 3)
    run("vid-gpt-nano", "--video", made, "--frames", 6, "--steps", 2, "--out", tmp_path / "on.mp4")
    assert read_video(tmp_path / "on.mp4", sampling="all").frames.shape[0] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.mp4", "on.mp4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--overwrite", "--video", "given.mp4", "--out", "given.mp4"), "go on from"),
        (("--out", "given.mp4"), "exists"),
        (("--out", "a.gif"), ".mp4"),
        (("--dtype", "relu", "--out", "a.mp4"), "--dtype"),
        (("--video", "given.mp4", "--image", "given.png", "--out", "a.mp4"), "not both"),
        (("--video", "given.mp4", "--frames", 4, "--out", "a.mp4"), "nothing would be made"),
        (("--switch", 1, "--out", "a.mp4"), "--switch"),
    ],
)
def test_what_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(np.zeros((4, 16, 16, 3), np.uint8), Path("given.mp4"))
    before = Path("given.mp4").read_bytes()
    with pytest.raises(InputError, match=said):
        run("vid-gpt-nano", *arguments)
    assert Path("given.mp4").read_bytes() == before and [one.name for one in Path().iterdir()] == ["given.mp4"]


def test_times_of_prompts_are_frames_of_the_clip() -> None:
    assert _prompts(["a", "b", "c"], [0.5, 2.0], 16.0) == {"prompt": ["a", "b", "c"], "switches": [8, 32]}
    assert _prompts(["a"], [], 16.0) == {"prompt": "a"} and _prompts([], [], 16.0) == {}
    for seconds in ([], [float("nan")], [1.0, 2.0]):
        with pytest.raises(InputError, match="--switch"):
            _prompts(["a", "b"], seconds, 16.0)
