"""Every registered generator, by walking the registry, and a family of these tests' own, so that the walk is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mmzoo
from mmzoo import registry
from mmzoo.cards import card
from mmzoo.errors import CheckpointError
from mmzoo.generation import Generator
from mmzoo.registry import Entry, entry
from tests import drift

ROOT = Path(__file__).resolve().parent.parent
DRIFT = Entry(
    "drift-tiny", "tests.drift", "text-to-video", "causal-temporal", "sequential", "none", "Noise", library="diffusers"
)
NAMES = [name for name in mmzoo.list_models() if entry(name).library == "diffusers"]
SMALL = [*(name for name in NAMES if name.endswith(("-tiny", "-nano"))), "drift-tiny"]
SIZES: dict[str, tuple[int, int]] = {
    "vid-gpt-xl": (663, 910_210_464),
    "longlive-1.3b": (825, 1_418_996_800),
    "arpg-300m": (198, 319_845_376),
    "arpg-700m": (294, 718_997_760),
    "arpg-1b": (390, 1_302_449_664),
}
"""Name -> tensors and parameters, as the specification gives them."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._ENTRIES, "drift-tiny", DRIFT)


def a_model(name: str) -> Generator:
    """A small model whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    model = mmzoo.create(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: Generator, name: str, batch_size: int) -> dict[str, Any]:
    torch.manual_seed(1)
    return entry(name).module.example_inputs(model, batch_size)


def tensors(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_meta_as_its_specification_says(name: str) -> None:
    state = mmzoo.create(name, device="meta").state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    if name not in SMALL:
        assert (len(state), sum(tensor.numel() for tensor in state.values())) == SIZES[name]


@pytest.mark.parametrize("name", SMALL)
def test_entry_and_model_agree(name: str) -> None:
    model = mmzoo.create(name)
    assert model.rule.name == entry(name).rule == model.rule_name
    assert isinstance(model, Generator) and not model.training
    assert entry(name).summary in card(entry(name))


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_an_effect(name: str) -> None:
    model = a_model(name)
    tensors(model(**inputs(model, name, 2))).square().mean().backward()
    still = [key for key, one in model.named_parameters() if one.grad is None or not bool(one.grad.abs().sum() > 0)]
    assert not still


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    model = a_model(name)
    batch = inputs(model, name, 2)
    with torch.no_grad():
        whole = tensors(model(**batch))
        for i in range(2):
            one = {
                key: value[i : i + 1] if isinstance(value, Tensor) and len(value) == 2 else value
                for key, value in batch.items()
            }
            torch.testing.assert_close(tensors(model(**one))[0], whole[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_sdpa_and_eager_agree(name: str) -> None:
    model = a_model(name)
    batch = inputs(model, name, 1)
    with torch.no_grad():
        first = tensors(model(**batch))
        model.set_attention("eager")
        torch.testing.assert_close(tensors(model(**batch)), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_a_clip_is_a_function_of_its_seed_and_can_be_gone_on_with(name: str, tmp_path: Path) -> None:
    model = mmzoo.create(name)
    options = entry(name).module.example_options(model)
    count = 10
    whole = torch.cat(list(model.rollout(count, seed=3, **options)))
    assert whole.dtype == torch.uint8 and whole.shape[0] == count and whole.shape[3] == 3
    assert torch.equal(torch.cat(list(model.rollout(count, seed=3, **options))), whole)
    assert not torch.equal(torch.cat(list(model.rollout(count, seed=4, **options))), whole)
    begun = model.rollout(count, seed=3, **options)
    first = next(begun)
    torch.save(begun.state_dict(), tmp_path / "state.pt")
    again = model.rollout(count, seed=3, **options)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.cat([first, *again]), whole)


@pytest.mark.parametrize("name", SMALL)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = a_model(name)
    model.save_pretrained(tmp_path)
    again = mmzoo.load(str(tmp_path))
    batch = inputs(model, name, 1)
    with torch.no_grad():
        assert torch.equal(tensors(again(**batch)), tensors(model(**batch)))
    assert mmzoo.push(model, "org/name", dry_run=tmp_path / "pushed")
    assert name.rpartition("-")[0] or "diffusers" in (tmp_path / "pushed" / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if (entry(name).weights or "").startswith("package:")])
def test_shipped_weights_load_and_run(name: str) -> None:
    model = mmzoo.load(name)
    assert len(next(iter(model.rollout(4, **entry(name).module.example_options(model))))) > 0


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    drift.Drift(size=4).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"_class_name": "Drift", "size": 5}')
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        mmzoo.load(str(tmp_path / "a"))
    with pytest.raises(CheckpointError) as caught:
        mmzoo.load(str(tmp_path / "a"), verify=False)
    assert caught.value.misshapen == [("weight", (4,), (5,))]
    (tmp_path / "a" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CheckpointError, match="no generator of mmzoo"):
        mmzoo.load(str(tmp_path / "a"), verify=False)


def test_a_wan_of_diffusers_is_loaded_under_longlives_window(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    tiny = mmzoo.create("longlive-tiny")
    wan = WanTransformer3DModel(**{key: tiny.config[key] for key in entry("longlive-tiny").module._WAN})
    wan.save_pretrained(tmp_path)
    model = mmzoo.load("longlive-tiny", weights=str(tmp_path))
    assert model.rule.name == "sink-window"
    assert model.state_dict().keys() == wan.state_dict().keys()
    assert all(torch.equal(one, wan.state_dict()[key]) for key, one in model.state_dict().items())
    assert type(mmzoo.load(str(tmp_path))) is type(model)


def test_the_authors_longlive_is_loaded_by_its_name(tmp_path: Path) -> None:
    model = a_model("longlive-tiny")
    model.save_pretrained(tmp_path / "own")
    module = entry("longlive-tiny").module
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match="config.json"):
        mmzoo.load("longlive-tiny", weights=str(tmp_path))
    (tmp_path / module.BASE).write_bytes(b"no file of torch")
    with pytest.raises(CheckpointError):
        mmzoo.load("longlive-tiny", weights=str(tmp_path))
