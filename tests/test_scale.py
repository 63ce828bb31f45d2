"""Training on two processes: FSDP2 and DeepSpeed against one, sharded checkpoints, other numbers of processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmzoo
from mmzoo import hub
from mmzoo_training.callbacks import latest_checkpoint

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'mmzoo[deepspeed]'"
)
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''
import sys
import lightning, torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader
from mmzoo_training.callbacks import ExactResume, SampleAnswers
from mmzoo_training.finetune import Finetune

processes, epochs, folder, resumed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] or None
sharding, start = sys.argv[5], sys.argv[6] or None
torch.set_num_threads(1)
lightning.seed_everything(0)
module = Finetune(
    "llava-tiny", weights=start, lr=1e-2, schedule="constant", train=["lang_model", "mm_projector"],
    save_frozen=start is None,
)
processor = module.model.processor
text = processor.prompt("what colour is the square", "<image>") + "red" + processor.tokenizer.eos_token

class Pictures(torch.utils.data.Dataset):
    """Eight samples of one length, so that a mean of means is the mean."""
    def __len__(self):
        return 8
    def __getitem__(self, i):
        from PIL import Image
        batch = processor(text, images=[Image.new("RGB", (28, 28), (30 * i, 90, 200))], labels=True)
        return {name: value[0] for name, value in batch.items()}

class OnCPU(DeepSpeedStrategy):
    """Lightning's without its refusal of anything but CUDA; DeepSpeed itself has an accelerator for CPUs."""
    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

if sharding == "fsdp":
    strategy = ModelParallelStrategy(
        data_parallel_size=processes, tensor_parallel_size=1, process_group_backend="gloo"
    )
else:
    strategy = OnCPU(stage=int(sharding), process_group_backend="gloo", logging_batch_size_per_gpu=1)
    if sharding == "3":  # or parameters as small as these stay whole
        strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
trainer = lightning.Trainer(
    accelerator="cpu", devices=processes, strategy=strategy, max_epochs=epochs, logger=False,
    enable_progress_bar=False, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=folder,
    callbacks=[ExactResume(), SampleAnswers(count=2, max_new_tokens=4)],
)
loader = DataLoader(Pictures(), batch_size=4 // processes, shuffle=False)
trainer.fit(module, loader, loader, ckpt_path=resumed)
trainer.save_checkpoint(f"{folder}/sharded.ckpt")
module.export(f"{folder}/exported")
'''


def answers(folder: Path) -> list[dict[str, object]]:
    """What was said in validation by a run, which also drew where its answers looked."""
    assert (folder / "attention-4.png").stat().st_size > 0
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def train(
    folder: Path, processes: int, epochs: int, resumed: Path | None = None, *, sharding: str = "fsdp", start: str = ""
) -> dict[str, torch.Tensor]:
    """Eight samples an epoch in two steps, from random weights or the model in the folder `start`."""
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "training", "eval"))
    done = subprocess.run(
        [sys.executable, "train.py", str(processes), str(epochs), str(folder), str(resumed or ""), sharding, start],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "exported" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """What one process trains, and what it says in validation."""
    folder = tmp_path_factory.mktemp("scale") / "alone"
    trained = train(folder, 1, 2)
    return trained, answers(folder)


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_go_on_as_one(alone: Any, tmp_path: Path) -> None:
    two, (one, said) = train(tmp_path / "2", 2, 2), alone
    fresh = mmzoo.create("llava-tiny").state_dict()
    assert any(not torch.equal(one[name], fresh[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)
    assert answers(tmp_path / "2") == said
    assert mmzoo.load(str(tmp_path / "2" / "exported")).processor is not None
    assert (tmp_path / "2" / "sharded.ckpt" / ".metadata").is_file()
    half = train(tmp_path / "half", 2, 1)
    assert any(not torch.equal(half[name], two[name]) for name in half)
    for processes in (2, 1):
        resumed = train(tmp_path / f"on {processes}", processes, 2, tmp_path / "half" / "sharded.ckpt")
        for name in resumed:
            torch.testing.assert_close(resumed[name], two[name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_trains_what_one_process_does(stage: str, alone: Any, tmp_path: Path) -> None:
    two, (one, said) = train(tmp_path / "two", 2, 2, sharding=stage), alone
    half = train(tmp_path / "half", 2, 1, sharding=stage)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)
    assert answers(tmp_path / "two") == said
    assert any(not torch.equal(half[name], two[name]) for name in half)
    found = latest_checkpoint(tmp_path / "half")
    assert found == tmp_path / "half" / "sharded.ckpt"
    resumed = train(tmp_path / "on", 2, 2, found, sharding=stage)
    assert all(torch.equal(resumed[name], two[name]) for name in two)
    next((found / "checkpoint").glob("*_1_*optim_states.pt")).unlink()
    with pytest.warns(UserWarning, match="not written to its end"):
        assert latest_checkpoint(tmp_path / "half") is None


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_leaves_out_frozen_parameters(tmp_path: Path) -> None:
    start = str(hub.save(mmzoo.create("llava-tiny"), tmp_path / "start"))
    two = train(tmp_path / "two", 2, 2, sharding="3", start=start)
    half = train(tmp_path / "half", 2, 1, sharding="3", start=start)
    saved = next((tmp_path / "half" / "sharded.ckpt" / "checkpoint").glob("*model_states.pt"))
    names = torch.load(saved, weights_only=True)["module"].keys()
    assert names and not any("vision_tower" in name for name in names)
    resumed = train(tmp_path / "on", 2, 2, tmp_path / "half" / "sharded.ckpt", sharding="3", start=start)
    assert any(not torch.equal(half[name], two[name]) for name in two)
    assert all(torch.equal(resumed[name], two[name]) for name in two)
