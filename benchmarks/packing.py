"""What packing gains over padding: useful tokens in a step of the same size, and in a second.

    python benchmarks/packing.py [--json FILE]

The set mixes lengths as a training mixture does: questions without media, about one picture and about clips, of one to
six turns. Every way of batching gets the same tokens a step, padding included. Times are of forward and backward passes
of a small model on one CPU thread, batches ready; the ways take turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from datetime import date
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from PIL import Image

import mmzoo
from mmzoo.files import replacing
from mmzoo.layout import TokenLayout
from mmzoo.world import make_clip
from mmzoo_training.data import RecordData, Source

MODEL, SAMPLES, MAX_TOKENS, ROWS, STEPS = "cca-nano", 3000, 256, 8, 12
BUDGET = ROWS * MAX_TOKENS
WAYS = {
    "padding": {"pack": False, "window": 1},
    "padding, like lengths together": {"pack": False, "window": 512},
    "packing": {"pack": True, "window": 512},
}


def write_records(folder: Path) -> Path:
    """A third without media, a third about a picture, a third about a clip."""
    rng, clips, lines = random.Random(0), [make_clip(seed) for seed in range(24)], []
    for c, clip in enumerate(clips):
        for t, frame in enumerate(clip.frames):
            Image.fromarray(frame).save(folder / f"{c}_{t}.png")
    for i in range(SAMPLES):
        c = rng.randrange(len(clips))
        asked = rng.choices(clips[c].questions, k=rng.randint(1, 6))
        texts = [text for question in asked for text in (question.text, question.answer)]
        record: dict[str, Any] = {}
        if i % 3 == 1:
            texts[0], record["images"] = "<image>" + texts[0], [f"{c}_0.png"]
        if i % 3 == 2:
            texts[0] = "<video>" + texts[0]
            record["videos"] = [[f"{c}_{t}.png" for t in range(len(clips[c].frames))]]
        record["messages"] = [{"role": ("user", "assistant")[t % 2], "content": one} for t, one in enumerate(texts)]
        lines.append(json.dumps(record))
    path = folder / "mixed.jsonl"
    path.write_text("\n".join(lines))
    return path


def loader_of(path: Path, **options: Any) -> Any:
    data = RecordData(
        [Source(path)], None, MODEL, max_tokens=MAX_TOKENS, batch_size=BUDGET, batch_tokens=BUDGET, **options
    )
    return data.train_dataloader()


def of_an_epoch(loader: Any) -> dict[str, float]:
    """From lengths alone: what a step holds."""
    steps = loader.plan(0)
    useful = [sum(loader.lengths[i] for row in step for i in row) for step in steps]
    shapes = [(len(step), max(sum(loader.lengths[i] for i in row) for row in step)) for step in steps]
    return {
        "steps of an epoch": len(steps),
        "useful tokens a step": mean(useful),
        "tokens a step with padding": mean(rows * width for rows, width in shapes),
        "useful of all": sum(useful) / sum(rows * width for rows, width in shapes),
    }


def seconds(model: Any, batch: dict[str, Any]) -> float:
    inputs = {key: value for key, value in batch.items() if key != "source"}
    start = time.perf_counter()
    model(**inputs).loss.backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = mmzoo.create(MODEL).train()
    with tempfile.TemporaryDirectory() as folder:
        path = write_records(Path(folder))
        loaders = {way: loader_of(path, **batching) for way, batching in WAYS.items()}
        found = {way: of_an_epoch(loader) for way, loader in loaders.items()}
        batches = {way: list(islice(loader, STEPS)) for way, loader in loaders.items()}
    useful = {way: [int(TokenLayout(one["layout"]).valid.sum()) for one in some] for way, some in batches.items()}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds(model, batches["packing"][0])
    for step in range(STEPS):
        for way, some in batches.items():
            rates[way].append(useful[way][step] / seconds(model, some[step]))
    for way, row in found.items():
        row["useful tokens a second"] = median(rates[way])
    lengths = sorted(loaders["packing"].lengths)
    result = {
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": MODEL,
        "samples": SAMPLES,
        "lengths, shortest, median, longest": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "tokens a step at most": BUDGET,
        "ways": found,
        "packing over padding": {
            key: found["packing"][key] / found["padding"][key]
            for key in ("useful tokens a step", "useful tokens a second")
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
