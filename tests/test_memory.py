"""Loading a large checkpoint needs little more host memory than its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmzoo
from mmzoo import hub
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
