"""Where an answer looked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_models import a_model, clip
from typer.testing import CliRunner

import mmzoo
from mmzoo import cli, hub
from mmzoo.attention.maps import AttentionMaps
from mmzoo.errors import InputError
from mmzoo.language import MultimodalLM
from mmzoo.world import make_clip, write_clip

QUESTION = "how many objects are there"


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return a_model("aki-tiny")


@pytest.fixture(scope="module")
def maps(model: MultimodalLM) -> AttentionMaps:
    return model.attend(clip(0), QUESTION, max_new_tokens=4)


def test_every_row_is_a_distribution_and_the_shares_add_up(maps: AttentionMaps) -> None:
    ones = torch.ones(maps.weights.shape[:3])
    torch.testing.assert_close(maps.weights.sum(-1), ones)
    torch.testing.assert_close(sum(maps.by_class().values()), ones)
    torch.testing.assert_close(maps.by_frame().sum(-1), maps.by_class()["image"])
    torch.testing.assert_close(maps.by_patch().sum(-1), maps.by_frame())
    assert maps.by_patch().shape == (2, 4, 4, 4, 16)


def test_attending_answers_as_asking_does_and_changes_nothing(model: MultimodalLM, maps: AttentionMaps) -> None:
    answer = model.ask(clip(0), QUESTION, max_new_tokens=4)
    assert (answer.text, answer.confidence) == (maps.answer.text, maps.answer.confidence)
    assert len(maps.tokens) == 4
    assert model.language_model.config._attn_implementation == "sdpa"


def test_an_answer_about_text_alone_looks_nowhere(model: MultimodalLM) -> None:
    with pytest.raises(InputError, match="looks at no picture"):
        model.attention_maps(model.processor(QUESTION), clip(0))


def test_the_rule_closes_what_it_closes(model: MultimodalLM, maps: AttentionMaps) -> None:
    # The first answer token is predicted by the last token of the prompt, which sees no answer.
    assert maps.by_class()["answer text"][:, :, 0].abs().max() == 0
    assert maps.by_class()["answer text"][:, :, 1].min() > 0


def test_the_weights_are_those_that_made_the_output(model: MultimodalLM, maps: AttentionMaps) -> None:
    """A value that a token ignores may be anything: raising its weight in the picture must raise its influence."""
    attention = model.lang_model.model.layers[-1].self_attn
    seen: dict[str, torch.Tensor] = {}
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("out", args[0]))
    inputs = model.processor.ask(QUESTION, video=clip(0))
    values: dict[str, torch.Tensor] = {}
    other = attention.qkv_proj.register_forward_hook(lambda _, __, out: values.__setitem__("qkv", out))
    model(**inputs)
    hook.remove()
    other.remove()
    heads, groups, size = 4, 2, 8
    value = values["qkv"][0, :, -groups * size :].unflatten(-1, (groups, size)).repeat_interleave(heads // groups, 1)
    length = inputs["input_ids"].shape[1]
    expected = torch.einsum("hl,lhd->hd", maps.weights[-1, :, 0, :length], value)
    torch.testing.assert_close(seen["out"][0, -1].unflatten(-1, (heads, size)), expected, atol=1e-4, rtol=1e-4)


def test_a_picture_shows_every_frame(maps: AttentionMaps, tmp_path: Path) -> None:
    for options in ({}, {"layer": 1}, {"layer": 0, "head": 2}, {"token": 1}):
        with Image.open(maps.draw(tmp_path / "map.png", **options)) as picture:
            assert picture.width > 4 * 100
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(("what", "last"), [("layer", 1), ("head", 3), ("token", 3)])
def test_what_is_not_there_is_not_drawn(what: str, last: int, maps: AttentionMaps, tmp_path: Path) -> None:
    for number in (last, -last - 1):
        maps.draw(tmp_path / "map.png", **{what: number})
    for number in (last + 1, -last - 2):
        with pytest.raises(InputError, match=f"There is no {what} {number}. Choose from 0 to {last}"):
            maps.draw(tmp_path / "other.png", **{what: number})
    with pytest.raises(InputError, match="does not end in .png"):
        maps.draw(tmp_path / "map.jpg")
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_without_compression_a_token_is_a_patch() -> None:
    model = mmzoo.create("aki-tiny", connector="linear", num_vision_tokens=16)
    maps = model.attend(Image.fromarray(clip(0)[0]), QUESTION, max_new_tokens=2)
    assert torch.equal(maps.patch_weights, torch.eye(16)[None])
    assert torch.equal(maps.by_patch(), maps.by_token())
    assert len(maps.frames) == 1


def test_the_command_draws(model: MultimodalLM, tmp_path: Path) -> None:
    folder = hub.save(model, tmp_path / "model")
    write_clip(make_clip(1), tmp_path / "clip.mp4")
    arguments = ["attend", str(folder), QUESTION, "--video", f"{tmp_path}/clip.mp4", "-o", f"{tmp_path}/map.png"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "looked at prompt text" in result.output
    assert (tmp_path / "map.png").is_file()
