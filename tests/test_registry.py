"""The face: names, entries, loading, and what goes wrong with checkpoints."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import runpy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmzoo
from mmzoo import hub, registry
from mmzoo.errors import CheckpointError, InputError, MissingExtra, UnknownModel, UnsupportedMask, VideoReadError


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations of a test end with it."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.save(mmzoo.create("aki-tiny"), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "damaged")


TOY = """
from mmzoo.models.aki import CONFIGS as AKI, MODEL, PROCESSOR, is_release, processor, read_release
CONFIGS = {"toy-tiny": {**AKI["aki-tiny"], "rule": "causal"}}
"""


def test_a_new_model_is_one_file_and_one_line(
    own_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    mmzoo.register(
        mmzoo.Entry("toy-tiny", "toys.toy", "video-text-to-text", "causal", "sequential", "none", "a toy", None, None)
    )
    assert mmzoo.list_models("toy-*") == ["toy-tiny"]
    model = mmzoo.load("toy-tiny", weights=None)
    assert model.rule.name == "causal"
    assert mmzoo.load(str(hub.save(model, tmp_path / "saved"))).rule.name == "causal"


@pytest.mark.parametrize("device", ["foo", "", "hpu", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    device: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = rf"The device '{device}' cannot be used here: .+\. Use one of cpu"
    with pytest.raises(InputError, match=said):
        mmzoo.create("aki-tiny", device=device)
    monkeypatch.setattr(hub, "load_from", None)  # which might download
    with pytest.raises(InputError, match=said):
        mmzoo.load(str(saved), device=device)


def test_a_name_is_registered_once(own_registry: None) -> None:
    entry = registry.entry("aki-tiny")
    assert mmzoo.register(entry) == entry
    with pytest.raises(InputError, match="aki-tiny"):
        mmzoo.register(replace(entry, rule="causal"))


@pytest.mark.parametrize("make", [mmzoo.load, mmzoo.create])
def test_an_unknown_name_gives_the_closest_three(make: object, own_registry: None) -> None:
    entry = registry.entry("aki-tiny")
    for name in ("aki-huge", "bki-4b", "something-else"):
        mmzoo.register(replace(entry, name=name))
    with pytest.raises(UnknownModel, match="closest names are .*aki-4b") as raised:
        make("aki-4c")  # type: ignore[operator]
    assert "something-else" not in str(raised.value)
    assert len(str(raised.value).split("closest names are ")[1].split(".")[0].split(", ")) == 3


def test_models_are_listed_in_natural_order_and_filtered(own_registry: None) -> None:
    entry = registry.entry("aki-tiny")
    for name in ("zoo-10b", "zoo-2b"):
        mmzoo.register(replace(entry, name=name, task="image-text-to-text"))
    mmzoo.register(replace(entry, name="zoo-3b", weights="hf-hub:some/thing", license="mit"))
    assert mmzoo.list_models("zoo-*") == ["zoo-2b", "zoo-3b", "zoo-10b"]
    assert mmzoo.list_models("zoo-*", task="image-text-to-text") == ["zoo-2b", "zoo-10b"]
    assert mmzoo.list_models("zoo-*", pretrained=True) == ["zoo-3b"]
    assert mmzoo.list_models("zoo-*", pretrained=False) == ["zoo-2b", "zoo-10b"]
    assert mmzoo.list_models("nothing*") == []


def test_a_non_commercial_licence_is_shown(own_registry: None, saved: Path) -> None:
    mmzoo.register(replace(registry.entry("aki-tiny"), name="aki-nc", weights=str(saved), license="cc-by-nc-4.0"))
    with pytest.warns(registry.NonCommercialWeights, match="cc-by-nc-4.0: non-commercial"):
        mmzoo.load("aki-nc")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_a_backend_that_cannot_carry_the_mask_is_refused(attention: str) -> None:
    with pytest.raises(UnsupportedMask, match=f"{attention}.*modality-mutual.*sdpa"):
        mmzoo.load("aki-tiny", weights=None, attention=attention)


def test_dtype_is_used(saved: Path) -> None:
    assert mmzoo.create("aki-tiny", dtype=torch.float64).dtype == torch.float64
    assert mmzoo.load(str(saved), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert mmzoo.load(str(saved)).dtype == torch.float32


def test_overrides_reach_the_configuration() -> None:
    assert mmzoo.create("aki-tiny", rule="causal").rule.name == "causal"


def test_weights_may_come_from_another_place(saved: Path) -> None:
    model = mmzoo.load("aki-tiny", weights=str(saved))
    assert torch.equal(
        model.state_dict()["vision_tokenizer.latents"],
        load_file(saved / "model.safetensors")["vision_tokenizer.latents"],
    )


def test_missing_unexpected_and_misshapen_tensors_are_listed(damaged: Path) -> None:
    state = load_file(damaged / "model.safetensors")
    state.pop("vision_tokenizer.latents")
    state["something.else"] = torch.zeros(1)
    state["lang_model.model.norm.weight"] = torch.zeros(3)
    save_file(state, damaged / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        mmzoo.load(str(damaged))
    assert raised.value.missing == ["vision_tokenizer.latents"]
    assert raised.value.unexpected == ["something.else"]
    assert raised.value.misshapen == [("lang_model.model.norm.weight", (3,), (32,))]
    for part in ("missing: vision_tokenizer.latents", "unexpected: something.else", "is (3,), the model has (32,)"):
        assert part in str(raised.value)


def test_a_damaged_file_is_a_checkpoint_error(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        mmzoo.load(str(damaged))
    path.unlink()
    with pytest.raises(CheckpointError, match="lacks the file model.safetensors"):
        mmzoo.load(str(damaged))


def test_a_changed_bit_is_seen_where_the_digest_is_known(own_registry: None, damaged: Path) -> None:
    path = damaged / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entry = replace(
        registry.entry("aki-tiny"), name="aki-sealed", weights=str(damaged), license="mit", sha256={path.name: digest}
    )
    mmzoo.register(entry)
    mmzoo.load("aki-sealed")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        mmzoo.load("aki-sealed")


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_configuration_is_a_checkpoint_error(damaged: Path, content: str) -> None:
    (damaged / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="config.json"):
        mmzoo.load(str(damaged))


def test_a_foreign_checkpoint_is_refused(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(CheckpointError, match="model_type 'llava'"):
        mmzoo.load(str(damaged))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "model.bin"])
def test_an_index_may_not_leave_the_folder(damaged: Path, shard: str) -> None:
    index = {"metadata": {}, "weight_map": {"vision_tokenizer.latents": shard}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no file of this checkpoint"):
        mmzoo.load(str(damaged))


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": {}}', '{"metadata": {}, "weight_map": []}'])
def test_a_damaged_index_is_a_checkpoint_error(damaged: Path, index: str) -> None:
    (damaged / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        mmzoo.load(str(damaged))


def test_shards_are_read_and_missed(damaged: Path) -> None:
    state = load_file(damaged / "model.safetensors")
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, damaged / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    (damaged / "model.safetensors").unlink()
    assert set(mmzoo.load(str(damaged)).state_dict()) == set(names)
    (damaged / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the file b.safetensors"):
        mmzoo.load(str(damaged))


def test_a_folder_that_is_not_there_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        mmzoo.load(f"{tmp_path}/nowhere")


def test_a_failed_download_is_an_error_not_random_weights() -> None:
    with pytest.raises(CheckpointError, match="Cannot download hf-hub:nobody/nothing"):
        mmzoo.load("hf-hub:nobody/nothing")
    with pytest.raises(CheckpointError, match="Cannot download"):
        mmzoo.load("aki-4b")


def test_saving_leaves_other_files_and_replaces_its_own(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    hub.save(mmzoo.create("aki-tiny"), tmp_path)
    hub.save(mmzoo.create("aki-tiny", rule="causal"), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert mmzoo.load(str(tmp_path)).rule.name == "causal"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in saved.iterdir()} | {"notes.txt"}


def test_transformers_loads_our_models_by_its_auto_classes(saved: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import mmzoo.hf  # noqa: F401

    model = AutoModelForImageTextToText.from_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved)
    ours = mmzoo.load(str(saved))
    assert type(model) is type(ours)
    assert processor.to_dict() == ours.processor.to_dict()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize(
    "error",
    [
        VideoReadError("a.mp4", "pyav 18", "no frames"),
        MissingExtra("av", "video", "Reading"),
        UnsupportedMask("flash", "causal", "because"),
        CheckpointError("bad", missing=["a"], misshapen=[("b", (1,), (2,))]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_the_way_from_another_process(error: Exception) -> None:
    again = copy.copy(error)
    assert type(again) is type(error)
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_digests_hold_for_the_weights_they_were_taken_of(own_registry: None, saved: Path, tmp_path: Path) -> None:
    digests = {"model.safetensors": "0" * 64}
    mmzoo.register(
        replace(registry.entry("aki-tiny"), name="aki-known", weights=str(saved), license="mit", sha256=digests)
    )
    with pytest.raises(CheckpointError, match="sha256"):
        mmzoo.load("aki-known")
    own = shutil.copytree(saved, tmp_path / "retrained")
    assert mmzoo.load("aki-known", weights=str(own)).processor is not None


def test_importing_a_generator_gives_no_advice_on_4_bit_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    diffusers = pytest.importorskip("diffusers")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    class Advising(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name == "ModelMixin":
                logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "none")
                logger.warning("another message")
            return getattr(diffusers, name)

    monkeypatch.setitem(sys.modules, "diffusers", Advising("diffusers"))
    runpy.run_path(str(Path(mmzoo.__file__).parent / "generation.py"))
    assert {record.getMessage() for record in caplog.records} == {"another message"}
    logger.warning("Failed to load CPU gemm_4bit_forward for someone else")
    assert caplog.messages[-1] == "Failed to load CPU gemm_4bit_forward for someone else"


def test_the_base_of_the_generators_is_imported_before_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    order: list[str] = []
    monkeypatch.setattr(registry.importlib, "import_module", order.append)
    _ = registry.entry("vid-gpt-nano").module
    assert order == ["mmzoo.generation", "mmzoo.models.vid_gpt"]
