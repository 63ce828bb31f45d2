"""Loading large checkpoints: host memory, device maps, eight and four bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchFeature, BitsAndBytesConfig

import mmzoo
from mmzoo import hub
from mmzoo.errors import MissingExtra
from mmzoo.language import MultimodalLM
from mmzoo.models.aki import CONFIGS

LARGE = {
    **CONFIGS["aki-tiny"]["text_config"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 9,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
LOAD = """
import json, sys, threading, time
import mmzoo.hub, mmzoo.models.aki  # what importing costs is not what loading costs

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024

before, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], resident())

thread = threading.Thread(target=watch)
thread.start()
model = mmzoo.load(sys.argv[1])
total = sum(float(parameter.sum()) for parameter in model.parameters())  # touches every page
done.set()
thread.join()
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(json.dumps({"peak": peak[0] - before, "weights": size}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_loading_peaks_at_the_size_of_the_weights(tmp_path: Path) -> None:
    folder = hub.save(mmzoo.create("aki-tiny", text_config=LARGE), tmp_path / "large")
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    (folder / "model.safetensors").unlink()
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["weights"] > 2e9
    # Every page was touched, so less than the weights would mean that the watch saw nothing.
    assert 0.9 * measured["weights"] < measured["peak"] < 1.1 * measured["weights"]


MEDIUM = {**CONFIGS["aki-tiny"]["text_config"], "hidden_size": 128, "intermediate_size": 256}
CLIP = np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8)
# Left as they are: what is small, and what has fewer outputs than four-bit kernels for a CPU take.
KEPT = ["vision_encoder", "vision_tokenizer", "lm_head", "additional_fc"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BatchFeature, torch.Tensor]:
    """A checkpoint, a question, and the logits that the model as it was saved gives."""
    torch.manual_seed(0)
    model = mmzoo.create("aki-tiny", text_config=MEDIUM)
    folder = hub.save(model, tmp_path_factory.mktemp("saved") / "medium")
    asked = model.processor.ask("what colour is the circle", video=CLIP)
    with torch.no_grad():
        return folder, asked, model(**asked).logits


def layers(model: MultimodalLM, kind: str) -> int:
    return sum(type(module).__name__ == kind for module in model.lang_model.modules())


@pytest.mark.parametrize(
    ("bits", "kind", "tolerance"), [(8, "Linear8bitLt", 0.03), (4, "Linear4bit", 0.2)], ids=["8 bits", "4 bits"]
)
def test_quantised_loading(saved: Any, bits: int, kind: str, tolerance: float) -> None:
    folder, asked, expected = saved
    quantised = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=KEPT)
    model = mmzoo.load(str(folder), quantization_config=quantised)
    assert layers(model, kind) == 4 * MEDIUM["num_hidden_layers"]
    with torch.no_grad():
        error = (model(**asked).logits - expected).abs().max()
    assert 0 < error < tolerance * expected.abs().max()
    assert model.ask(CLIP, "what colour is the circle", max_new_tokens=2).text


def test_a_device_map_that_leaves_layers_on_disk(saved: Any, tmp_path: Path) -> None:
    folder, asked, expected = saved
    parts = ("vision_encoder", "vision_tokenizer", "lang_model.model.embed_tokens", "lang_model.model.norm")
    places = {
        **dict.fromkeys(
            (*parts, "lang_model.model.rotary_emb", "lang_model.lm_head", "lang_model.model.layers.0"), "cpu"
        ),
        "lang_model.model.layers.1": "disk",
    }
    model = mmzoo.load(str(folder), device_map=places, offload_folder=tmp_path)
    assert model.lang_model.model.layers[1].mlp.down_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(model(**asked).logits, expected)


def test_quantised_loading_without_its_package(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for loading in ({"device_map": "auto"}, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}):
        with pytest.raises(MissingExtra, match=r"accelerate.*mmzoo\[large\]"):
            mmzoo.load(str(saved[0]), **loading)
