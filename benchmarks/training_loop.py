"""What Lightning's loop costs over a hand-written one: the same model, the same batches, in turns in one process.

    python benchmarks/training_loop.py [--rounds 15] [--steps 20] [--output benchmarks/results/training_loop.json]

Both loops run forward, backward, clipping, AdamW and the schedule; Lightning's has exact resume and logs the loss. The
ratio of each round is of loops that ran one after the other. Counted is the CPU time of one thread, which other
processes hardly disturb.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger

from mmzoo.files import replacing
from mmzoo_training.callbacks import ExactResume
from mmzoo_training.world import QuestionBatches, WorldData, WorldQuestions

LIMIT = 1.05


class Given:
    """The same batches again and again, as a loader."""

    def __init__(self, batches: list[dict[str, Any]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):  # noqa: ANN204
        return iter(self.batches)


class Clock(lightning.Callback):
    """CPU seconds from the start of the first batch to the end of the last: what a long run repeats."""

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds = time.process_time() - self.started


def module(steps: int) -> WorldQuestions:
    torch.manual_seed(0)
    return WorldQuestions("aki-nano", describe_steps=0, answer_steps=steps)


def plain(batches: list[dict[str, Any]]) -> float:
    """CPU seconds of the loop that one would write by hand."""
    model = module(len(batches))
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    model.train()
    started = time.process_time()
    for batch in batches:
        loss, _ = model.answers(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.process_time() - started


def with_lightning(batches: list[dict[str, Any]], folder: str) -> float:
    """CPU seconds of the same steps in Lightning's loop."""
    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        log_every_n_steps=50,
        logger=CSVLogger(folder),
        callbacks=[ExactResume(), clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module(len(batches)), Given(batches))
    return clock.seconds


def measure(rounds: int, steps: int, batch_size: int) -> dict[str, Any]:
    source = QuestionBatches(module(1).model.processor, WorldData(batch_size=batch_size, describe_steps=0), "train")
    batches = [source.new(number) for number in range(steps)]
    with tempfile.TemporaryDirectory() as folder:
        plain(batches), with_lightning(batches, folder)
        pairs = [(plain(batches), with_lightning(batches, folder)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "batch_size": batch_size,
        "plain loop, CPU ms a step": 1000 * statistics.median(a for a, _ in pairs) / steps,
        "Lightning, CPU ms a step": 1000 * statistics.median(b for _, b in pairs) / steps,
        "ratio, median": statistics.median(ratios),
        "ratio, quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "limit": LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training_loop.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, one thread",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": lightning.__version__,
        },
        "model": "aki-nano in the world, questions",
        "rounds": given.rounds,
        "steps": given.steps,
        "measured": [measure(given.rounds, given.steps, batch_size) for batch_size in (12,)],
    }
    with replacing(given.output) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
