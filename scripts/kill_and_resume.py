"""Kill a training run again and again, resume it each time, and compare its losses with those of an unbroken run.

    python scripts/kill_and_resume.py [--kills 20] [--steps 120] [--config aki-nano] [--accumulate 1] [--keep FOLDER]

The run is a nano recipe, shortened, that saves after every second optimizer step, validates now and then, averages its
weights, and draws from each random generator in every batch. It gets SIGKILL at random points, also while it saves and
while it starts; `--resume auto` finds the latest valid checkpoint. Each loss of every batch that any attempt computed
has to have the bits of the unbroken run's. Exit status 1 if one has not.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

os.environ.setdefault("OMP_NUM_THREADS", "1")  # nano models are fastest on one thread, and processes inherit it
SHORT = {
    "trainer.log_every_n_steps": 10,
    "trainer.val_check_interval": 20,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "data.init_args.batch_size": 2,
    "data.init_args.val_clips": 2,
    "data.init_args.describe_clips": 4,
    "data.init_args.questions_per_clip": 2,
}


class Flicker(lightning.Callback):
    """Lets each random generator change the brightness of a batch, so that its state matters."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        shift = random.randint(0, 9) + int(np.random.randint(0, 9)) + int(torch.randint(0, 9, ()))
        batch["frames"] = (batch["frames"].int() + shift).clamp(max=255).to(torch.uint8)


def command(config: str, steps: int, accumulate: int, folder: Path) -> list[str]:
    """A process that trains in a folder, going on from what is there."""
    options = {
        **SHORT,
        "trainer.max_steps": steps // accumulate,
        "trainer.accumulate_grad_batches": accumulate,
        "trainer.default_root_dir": folder,
        "model.init_args.describe_steps": steps // 3,
        "model.init_args.answer_steps": steps,
        "resume": "auto",
    }
    callbacks = [
        ("lightning.pytorch.callbacks.EMAWeightAveraging", {"decay": 0.9}),
        ("lightning.pytorch.callbacks.ModelCheckpoint", {"every_n_train_steps": 2, "save_top_k": 1}),
        ("mmzoo_training.callbacks.LossTrace", {"path": folder / "losses.txt"}),
        ("kill_and_resume.Flicker", {}),
    ]
    arguments = ["fit", "--config", config, *(f"--{name}={value}" for name, value in options.items())]
    arguments.append("--trainer.callbacks=null")
    for name, values in callbacks:
        arguments.append(f"--trainer.callbacks+={name}")
        arguments += [f"--trainer.callbacks.{key}={value}" for key, value in values.items()]
    start = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from mmzoo_training.cli import main; main({arguments!r})"
    )
    return [sys.executable, "-c", start]


def losses(folder: Path) -> list[tuple[int, str]]:
    """(batch, loss) of every line that was written to its end, in the order of writing."""
    path = folder / "losses.txt"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [(int(step), loss) for step, loss in (line.split() for line in lines if line.endswith("\n"))]


def killed(run: list[str], folder: Path, at: int, rng: random.Random) -> bool:
    """Run until batch `at` is reached, then a little longer, then kill; False if the run ended before."""
    with (folder / "output.txt").open("a") as output:
        process = subprocess.Popen(run, stdout=output, stderr=output)
        try:
            while process.poll() is None and (losses(folder) or [(-1, "")])[-1][0] < at:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.2))
            ended = process.poll() is not None
        finally:
            process.kill()
            process.wait()
    return not ended


def compare(config: str, steps: int, kills: int, accumulate: int, seed: int, folder: Path) -> tuple[Table, bool]:
    """The table of all kills, and whether every loss has the bits of the unbroken run's."""
    rng = random.Random(seed)
    whole, cut = folder / "unbroken", folder / "killed"
    for place in (whole, cut):
        place.mkdir(parents=True)
    output = (folder / "unbroken.txt").open("w")
    subprocess.run(command(config, steps, accumulate, whole), check=True, stdout=output, stderr=output)
    expected = dict(losses(whole))
    table = Table("kill", "last batch", "resumed at", "losses computed", "of other bits")
    run, seen, exact = command(config, steps, accumulate, cut), 0, len(expected) == steps
    for number, at in enumerate([*sorted(rng.sample(range(steps - 1), kills)), None], 1):
        if at is None:
            with (folder / "last.txt").open("w") as output:
                subprocess.run(run, check=True, stdout=output, stderr=output)
        elif not killed(run, cut, at, rng):
            raise SystemExit(f"The run ended by itself before kill {number}: see {cut / 'output.txt'}.")
        new = losses(cut)[seen:]
        seen += len(new)
        wrong = sum(loss != expected[step] for step, loss in new)
        exact &= wrong == 0
        first, last = (str(new[i][0]) if new else "-" for i in (0, -1))
        table.add_row("(to the end)" if at is None else str(number), last, first, str(len(new)), str(wrong))
    exact &= {step for step, _ in losses(cut)} == set(range(steps))
    return table, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120, help="batches of the run")
    parser.add_argument("--config", default="aki-nano", help="a recipe in the world")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of an optimizer step")
    parser.add_argument("--seed", type=int, default=0, help="of the points at which it is killed")
    parser.add_argument("--keep", type=Path, help="an empty or new folder for everything the runs write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.keep or Path(temporary)).absolute()
        table, exact = compare(given.config, given.steps, given.kills, given.accumulate, given.seed, folder)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(table)
    console.print("every loss has the bits of the unbroken run" if exact else "losses differ")
    sys.exit(not exact)


if __name__ == "__main__":
    main()
