"""Clips into files: the same after any interrupt, and to look at while they grow."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.generating import _key, enlarged, generate
from mmzoo.media import VideoWriter, read_video, write_video
from tests.drift import Drift, DriftRollout


def test_an_interrupted_clip_goes_on_as_if_nothing_had_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = Drift(), list[tuple[int, int]]()
    whole = generate(model, tmp_path / "whole.mp4", 20)
    assert read_video(whole, sampling="all").frames.shape == (20, 128, 128, 3)
    cut = tmp_path / "cut.mp4"
    real = DriftRollout._block

    def breaks(self: DriftRollout) -> Tensor:
        if self.done == 12:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(DriftRollout, "_block", breaks)
    with pytest.raises(KeyboardInterrupt):
        generate(model, cut, 20)
    assert not cut.exists() and (tmp_path / "cut.mp4.parts" / "state.pt").is_file()
    (tmp_path / "cut.mp4.parts" / "000012.npy").write_bytes(b"torn")
    monkeypatch.setattr(DriftRollout, "_block", real)
    generate(model, cut, 20, advance=lambda done, total: told.append((done, total)))
    assert cut.read_bytes() == whole.read_bytes()
    assert told[0] == (12, 20) and told[-1] == (20, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mp4", "whole.mp4"]


def test_large_states_are_not_written_after_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came after the last state is made again: as soon as one takes long, the next one waits."""
    model, save, states = Drift(), torch.save, list[int]()

    def slow(state: dict, path: Path) -> None:
        states.append(state["done"])
        save(state, path)

    def stop(done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    whole = generate(model, tmp_path / "whole.mp4", 20)
    monkeypatch.setattr(torch, "save", slow)
    monkeypatch.setattr("mmzoo.generating.time", SimpleNamespace(monotonic=itertools.count().__next__))
    with pytest.raises(KeyboardInterrupt):
        generate(model, tmp_path / "cut.mp4", 20, advance=stop)
    monkeypatch.undo()
    assert len(states) == 1 and len(list((tmp_path / "cut.mp4.parts").glob("*.npy"))) > 1
    told = list[int]()
    generate(model, tmp_path / "cut.mp4", 20, advance=lambda done, total: told.append(done))
    assert told[0] == states[0]
    assert (tmp_path / "cut.mp4").read_bytes() == whole.read_bytes()


def test_another_clip_under_the_same_name_is_refused(tmp_path: Path) -> None:
    model = Drift()

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tmp_path / "a.mp4", 20, advance=stop)
    with pytest.raises(InputError, match="Another clip"):
        generate(model, tmp_path / "a.mp4", 20, seed=1)
    (tmp_path / "a.mp4.parts" / "state.pt").write_bytes(b"no state")
    with pytest.raises(InputError, match="damaged"):
        generate(model, tmp_path / "a.mp4", 20)


def test_what_is_there_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists"):
        generate(Drift(), path, 3)
    assert path.read_bytes() == b"mine"
    assert read_video(generate(Drift(), path, 3, overwrite=True), sampling="all").frames.shape[0] == 3
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        generate(Drift(), tmp_path / "folder.mp4", 3, overwrite=True)


def test_a_clip_with_a_block_missing_does_not_go_on(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(Drift(), tmp_path / "a.mp4", 20, advance=stop)
    (tmp_path / "a.mp4.parts" / "000003.npy").unlink()
    with pytest.raises(InputError, match="missing"):
        generate(Drift(), tmp_path / "a.mp4", 20)


def test_all_that_decides_a_clip_is_in_its_key() -> None:
    model, features = Drift(), torch.ones(2, 4)
    keys = {_key(model, 3, {"prompt": (features, None)})}
    for prompt in (features + 1, features.T.contiguous(), features.double(), features.bfloat16()):
        keys.add(_key(model, 3, {"prompt": (prompt, None)}))
    for change in ({"_parts": {"vae": torch.nn.Linear(2, 2)}}, {"attention": "eager"}):
        changed = Drift()
        vars(changed).update(change)
        keys.add(_key(changed, 3, {"prompt": (features, None)}))
    model.register_to_config(start=3)
    keys.add(_key(model, 3, {"prompt": (features, None)}))
    assert len(keys) == 8


def test_small_frames_keep_their_colours_in_a_file(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    assert enlarged(np.zeros((1, 480, 832, 3), np.uint8)).shape == (1, 480, 832, 3)
    write_video(enlarged(frames), tmp_path / "a.mp4")
    back = read_video(tmp_path / "a.mp4", sampling="all").frames.reshape(4, 16, 8, 16, 8, 3).mean((2, 4))
    write_video(frames, tmp_path / "small.mp4")
    small = read_video(tmp_path / "small.mp4", sampling="all").frames
    assert np.abs(back - frames).mean() < 0.2 * np.abs(small.astype(float) - frames).mean()


def test_wrong_options_are_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not take prompt"):
        generate(Drift(), tmp_path / "a.mp4", 3, prompt="a cat")
    with pytest.raises(InputError, match=r"\.mp4"):
        generate(Drift(), tmp_path / "a.gif", 3)
    with pytest.raises(InputError, match="at least one frame"):
        generate(Drift(), tmp_path / "b.mp4", 0)
    with pytest.raises(UnsupportedMask, match="sdpa and eager"):
        Drift().set_attention("flex_attention")
    with pytest.raises(InputError, match="prompt"):
        Drift().rollout(3).switch("a dog")
    with pytest.raises(InputError, match="state"):
        Drift().rollout(3).load_state_dict({"done": 5, "random": torch.Generator().get_state()})


def test_a_growing_file_can_be_read_before_it_is_finished(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "a.mp4", growing=True) as writer:
        writer.write(np.concatenate([frames] * 20))
        assert read_video(tmp_path / "a.mp4", sampling="all", backend="pyav", allow_short=True).num_total >= 60
    assert read_video(tmp_path / "a.mp4", sampling="all", backend="pyav").num_total == 120


def test_blocks_make_the_file_of_the_whole(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "whole.mp4")
    with VideoWriter(tmp_path / "blocks.mp4") as writer:
        for block in np.split(frames, [1, 5]):
            writer.write(block)
        with pytest.raises(InputError, match="32x32"):
            writer.write(np.zeros((1, 16, 16, 3), np.uint8))
    assert (tmp_path / "blocks.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
