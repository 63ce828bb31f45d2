"""Training on two processes: FSDP2 against one process, sharded checkpoints, another number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmzoo

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''
import sys
import lightning, torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from mmzoo_training.callbacks import ExactResume
from mmzoo_training.finetune import Finetune

processes, epochs, folder, resumed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] or None
torch.set_num_threads(1)
lightning.seed_everything(0)
module = Finetune("llava-tiny", weights=None, lr=1e-2, schedule="constant", train=["lang_model", "mm_projector"])
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

strategy = ModelParallelStrategy(
    data_parallel_size=processes, tensor_parallel_size=1, process_group_backend="gloo"
)
trainer = lightning.Trainer(
    accelerator="cpu", devices=processes, strategy=strategy, max_epochs=epochs, logger=False,
    enable_progress_bar=False, enable_checkpointing=False, callbacks=[ExactResume()], default_root_dir=folder,
)
trainer.fit(module, DataLoader(Pictures(), batch_size=4 // processes, shuffle=False), ckpt_path=resumed)
trainer.save_checkpoint(f"{folder}/sharded.ckpt")
module.export(f"{folder}/exported")
'''


def train(folder: Path, processes: int, epochs: int, resumed: Path | None = None) -> dict[str, torch.Tensor]:
    folder.mkdir()
    (folder / "train.py").write_text(SCRIPT)
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "training", "eval"))
    done = subprocess.run(
        [sys.executable, "train.py", str(processes), str(epochs), str(folder), str(resumed or "")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "exported" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_go_on_as_one(tmp_path: Path) -> None:
    one, two = (train(tmp_path / f"{n}", n, 2) for n in (1, 2))
    fresh = mmzoo.create("llava-tiny").state_dict()
    assert any(not torch.equal(one[name], fresh[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)
    assert mmzoo.load(str(tmp_path / "2" / "exported")).processor is not None
    assert (tmp_path / "2" / "sharded.ckpt" / ".metadata").is_file()
    half = train(tmp_path / "half", 2, 1)
    assert any(not torch.equal(half[name], two[name]) for name in half)
    for processes in (2, 1):
        resumed = train(tmp_path / f"on {processes}", processes, 2, tmp_path / "half" / "sharded.ckpt")
        for name in resumed:
            torch.testing.assert_close(resumed[name], two[name], atol=2e-4, rtol=1e-3)
