"""Callbacks of a training run: exact resume, checkpoint files that are whole or not there, answers, throughput.

Averages of the weights are Lightning's `lightning.pytorch.callbacks.EMAWeightAveraging`.
"""

from __future__ import annotations

import json
import math
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from PIL import Image
from torch import Tensor

from mmzoo.attention import draw
from mmzoo.attention.drawing import MAX_DRAWN
from mmzoo.attention.maps import AttentionMaps
from mmzoo.errors import CheckpointError
from mmzoo.files import replacing
from mmzoo.layout import TokenLayout
from mmzoo.processing import MultimodalProcessor

RESUME = "exact_resume"
NEEDED = ("state_dict", "loops", "optimizer_states", "global_step")
"""Entries without which a checkpoint cannot be resumed."""


class ExactResume(Callback):
    """Makes a resumed run give bit for bit what the unbroken one gives; put it first.

    - Random states of torch, numpy and Python are taken after each training batch, saved, and set again before the
      next: what lies between, such as validation, does not touch the randomness of training.
    - Gradients that wait for further batches (accumulate_grad_batches) are saved, so that a run may be cut anywhere.
    - The position in the data is the loader's own, where it has `state_dict` and `load_state_dict`. It needs a length:
      of a loader without one Lightning fetches a batch ahead, and the position would be one too far.
    - Checkpoints are written and read by `CheckpointFiles`.

    On several processes each has its own random state. Waiting gradients are those of single processes: there, and
    under DeepSpeed, save every n optimizer steps. DeepSpeed writes and reads its checkpoints by itself.
    """

    def __init__(self) -> None:
        self._random: dict[str, Any] | None = None
        self._gradients: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        loaders = loop._combined_loader.flattened
        if math.isinf(trainer.num_training_batches) and any(hasattr(one, "state_dict") for one in loaders):
            rank_zero_warn("A training loader that can resume has no length: it will resume one batch too far.")
        # Lightning does not load them where an epoch was finished, and the loader would start at its first epoch.
        if loop._combined_loader_states_to_load:
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
            iter(loop._data_fetcher)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random is not None:
            set_random_state(self._random, trainer.strategy.root_device)
        for name, parameter in pl_module.named_parameters() if self._gradients else ():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._random = random_state(trainer.strategy.root_device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = self._random or random_state(trainer.strategy.root_device)
        saved: dict[str, Any] = {"random": _of_all_processes(trainer, as_tensors(state))}
        if trainer.state.fn == TrainerFn.FITTING and trainer.fit_loop._should_accumulate():
            if trainer.world_size > 1 or trainer.strategy.handles_gradient_accumulation:
                rank_zero_warn(
                    "This checkpoint lies between optimizer steps, and gradients that wait on several processes or in "
                    "DeepSpeed are not saved. Save every n optimizer steps (every_n_train_steps) to resume exactly."
                )
            else:
                saved["gradients"] = {
                    name: one.grad for name, one in pl_module.named_parameters() if one.grad is not None
                }
        checkpoint[RESUME] = saved

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(RESUME)
        if saved is None:
            rank_zero_warn("The checkpoint was saved without ExactResume: random numbers will be others.")
            return
        processes = len(saved["random"]["torch"])
        if trainer.global_rank < processes:
            self._random = from_tensors({name: x[trainer.global_rank] for name, x in saved["random"].items()})
        if processes != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was saved by {processes} processes, and {trainer.world_size} go on: the losses will "
                "not be those of the unbroken run."
            )
        self._gradients = saved.get("gradients", {})


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of torch, numpy and Python, and of the device if it has one."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The states as tensors alone, which a checkpoint may hold and which processes can exchange."""
    _, keys, position, has_normal, normal = state["numpy"]
    version, words, next_normal = state["python"]
    return {
        **{name: state[name] for name in ("torch", "cuda") if name in state},
        "numpy": torch.tensor([*keys.tolist(), position, has_normal]),
        "numpy_normal": torch.tensor(normal, dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_normal": torch.tensor(math.nan if next_normal is None else next_normal, dtype=torch.float64),
    }


def from_tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `as_tensors`."""
    *keys, position, has_normal = state["numpy"].tolist()
    version, *words = state["python"].tolist()
    normal = float(state["python_normal"])
    return {
        # A copy of its own: torch reads a state as if it began at an aligned address.
        **{name: state[name].cpu().clone() for name in ("torch", "cuda") if name in state},
        "numpy": ("MT19937", np.array(keys, np.uint32), position, has_normal, float(state["numpy_normal"])),
        "python": (version, tuple(words), None if math.isnan(normal) else normal),
    }


def _of_all_processes(trainer: Trainer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each state with a first dimension of processes."""
    if trainer.world_size == 1:
        return {name: x[None] for name, x in state.items()}
    device = trainer.strategy.root_device
    return {name: trainer.strategy.all_gather(x.to(device)).cpu() for name, x in state.items()}


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and read as tensors and plain values alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write under a temporary name beside `path`, then rename.

        Raises:
            CheckpointError: it cannot be written, as on a full disk; earlier checkpoints are as they were.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch wraps what the file says in an error of its own
            raise CheckpointError(
                f"Cannot write the checkpoint {path}: {error}. Earlier ones are intact: make room, and go on with "
                "--resume auto."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read without running code, whatever `weights_only` says. Raises CheckpointError if it is damaged."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)
        return read_checkpoint(Path(path), whole=True)


def read_checkpoint(path: Path, *, whole: bool) -> dict[str, Any]:
    """A checkpoint's entries, tensors on the CPU.

    Args:
        path: a file, or the folder of a sharded checkpoint (FSDP2's or DeepSpeed's), of which the entries beside the
            shards are read.
        whole: check every byte and read the tensors, rather than mapping them into memory.

    Raises:
        CheckpointError: it is not there, damaged, or holds code.
    """
    try:
        files = _checkpoint_files(path)
        for file in files if whole else ():
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"The checkpoint {file} is damaged at {damaged}. Resume from an earlier one.")
        return torch.load(files[0], map_location="cpu", mmap=not whole, weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint {path}.") from error
    except Exception as error:  # torch raises classes of its own, of pickle and of zipfile
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"The checkpoint {path} is damaged: {said}. Resume from an earlier one.") from error


def _checkpoint_files(path: Path) -> list[Path]:
    """The files that torch wrote of a checkpoint, first the one with the entries beside the shards.

    Raises:
        CheckpointError: a folder that was not written to its end.
    """
    if not path.is_dir():
        return [path]
    if (path / ".metadata").is_file():  # FSDP2 writes it last
        return [path / "meta.pt"]
    if (path / "latest").is_file():  # DeepSpeed's first process writes it last; others may still be writing
        folder = path / (path / "latest").read_text().strip()
        states, shards = sorted(folder.glob("*model_states.pt")), sorted(folder.glob("*optim_states.pt"))
        processes = torch.load(states[0], map_location="cpu", mmap=True, weights_only=True)["dp_world_size"]
        if len(shards) in (0, processes):  # ZeRO's stage 0 has none
            return [*states, *shards]
    raise CheckpointError(f"The checkpoint {path} was not written to its end.")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The valid checkpoint of the most steps anywhere in a folder; None if there is none.

    A damaged or half-written one is skipped with a warning that names it.
    """
    steps: dict[Path, tuple[int, float]] = {}
    for path in sorted(Path(folder).rglob("*.ckpt*")):
        if path.name.startswith("."):
            rank_zero_warn(f"{path} was left by a run that was cut while it saved. It is of no use.")
        elif path.suffix == ".ckpt":
            try:
                entries = read_checkpoint(path, whole=False)
                if path.is_file() and not entries.keys() >= set(NEEDED):
                    raise CheckpointError(f"The checkpoint {path} holds weights only.")
                steps[path] = entries["global_step"], path.stat().st_mtime
            except CheckpointError as error:
                rank_zero_warn(f"Skipped: {error}")
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        try:
            read_checkpoint(path, whole=True)
            return path
        except CheckpointError as error:
            rank_zero_warn(f"Skipped: {error}")
    return None


class SampleAnswers(Callback):
    """What the model says to a few questions of the validation set, each time it is validated, and where it looked.

    The log folder has `answers.jsonl`, and for the first question `mask.png`, the mask over its tokens if they are few
    enough to be drawn, and `attention-STEP.png`, the frames where its answer looked. TensorBoard and W&B get answers
    and attention too.

    A sharded model (FSDP2, ZeRO's stage 3) answers on all processes together, the questions of the first.

    Args:
        count: questions; they are those of the first batch.
        max_new_tokens: of an answer.
        attention_tokens: no attention is drawn of a prompt that is longer, or has no media. The weights of all layers
            and heads are kept for it, which take memory with the square of its length.
    """

    def __init__(self, count: int = 4, max_new_tokens: int = 32, attention_tokens: int = 1024):
        self.count, self.max_new_tokens, self.attention_tokens = count, max_new_tokens, attention_tokens

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        from mmzoo_training.finetune import answers, is_sharded, on_all_processes

        if batch_idx or trainer.sanity_checking or trainer.log_dir is None:
            return
        folder, model, options = Path(trainer.log_dir), pl_module.model, {}
        inputs, labels = pl_module.inputs(batch), batch["labels"]
        if is_sharded(model):
            inputs, labels = _of_the_first_process(trainer, (inputs, labels))
            options["synced_gpus"] = trainer.world_size > 1
        elif not trainer.is_global_zero:
            return
        with on_all_processes(model):
            said = answers(model, inputs, labels, self.count, self.max_new_tokens, **options)
            maps = self._attention(model, inputs, labels, **options)
        if trainer.is_global_zero:
            self._write(trainer, folder, said, maps)
            if inputs["layout"].shape[1] <= MAX_DRAWN and not (folder / "mask.png").exists():
                draw(model.rule, TokenLayout(inputs["layout"][:1].cpu()), folder / "mask.png")

    def _attention(self, model: Any, inputs: Any, labels: Tensor, **options: Any) -> AttentionMaps | None:
        """Where the answer to the first question looked."""
        from mmzoo_training.finetune import prompts

        prompt, _ = next(prompts(inputs, labels), ({}, None))
        if prompt.get("pixel_values") is None or prompt["input_ids"].shape[1] > self.attention_tokens:
            return None
        shown = frames_of(model.processor, prompt["pixel_values"])
        return model.attention_maps(prompt, shown, max_new_tokens=self.max_new_tokens, **options)

    def _write(self, trainer: Trainer, folder: Path, said: list[dict[str, str]], maps: AttentionMaps | None) -> None:
        step = trainer.global_step
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "answers.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, **one}) + "\n" for one in said)
        drawn = None if maps is None else maps.draw(folder / f"attention-{step}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = "\n".join(f"- {one['question']} **{one['answer']}** ({one['right']})" for one in said)
                logger.experiment.add_text("answers", text, step)
                if drawn:
                    picture = np.asarray(Image.open(drawn).convert("RGB"))
                    logger.experiment.add_image("attention", picture, step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                rows = [list(one.values()) for one in said]
                logger.log_text("answers", columns=["question", "answer", "right"], data=rows, step=step)
                if drawn:
                    logger.log_image("attention", [str(drawn)], step=step)


def frames_of(processor: MultimodalProcessor, pixel_values: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3]: the images or frames of a batch of one [1, ..., 3, H, W], as the model sees them."""
    normal = processor.image_processor
    mean, std = (torch.tensor(one)[:, None, None] for one in (normal.image_mean, normal.image_std))
    pixels = pixel_values.flatten(0, -4).float().cpu() * std + mean
    return (pixels * 255).round().clamp(0, 255).byte().movedim(1, -1).numpy()


def _of_the_first_process(trainer: Trainer, batch: Any) -> Any:
    """A batch of the first process on every one, each on its own device."""
    on_cpu = move_data_to_device(batch, torch.device("cpu"))
    return trainer.strategy.batch_to_device(trainer.strategy.broadcast(on_cpu))


class Throughput(ThroughputMonitor):
    """Samples and tokens a second, and on devices whose peak is known the model's part of it (MFU).

    The operations are those of the language model alone, two a parameter and token in the forward pass and as many or
    twice as many in the backward pass: a low estimate where the encoder is large.

    Args:
        window_size: batches over which is averaged.
    """

    def __init__(self, window_size: int = 100):
        super().__init__(batch_size_fn=_rows, length_fn=_tokens, window_size=window_size)
        self.flops_per_token = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        parameters = list(pl_module.model.language_model.parameters())
        total, trained = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (True, False))
        self.flops_per_token, pl_module.flops_per_batch = 4 * total + 2 * trained, None

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        pl_module.flops_per_batch = self.flops_per_token * (_tokens(batch) if "layout" in batch else 0)
        super().on_train_batch_end(trainer, pl_module, outputs, batch)


def _rows(batch: Mapping[str, Any]) -> int:
    return len(batch["input_ids"]) if "input_ids" in batch else len(next(iter(batch.values())))


def _tokens(batch: Mapping[str, Any]) -> int:
    """What is not padding; of a batch without text its rows, since Lightning wants at least one token a sample."""
    return int(TokenLayout(batch["layout"]).valid.sum()) if "layout" in batch else _rows(batch)


class LossTrace(Callback):
    """Every training batch's loss in a file, in hexadecimal: two runs can be compared bit for bit.

    Args:
        path: lines "batch loss" are added to it.
    """

    def __init__(self, path: str):
        self.path = Path(path)

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{trainer.fit_loop.total_batch_idx} {float(outputs['loss']).hex()}\n")
