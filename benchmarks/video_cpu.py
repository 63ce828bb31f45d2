"""Cached against recomputed generation by ViD-GPT, and the cost of each chunk, side by side in one run.

python benchmarks/video_cpu.py [--device cpu] [--latents 32] [--small] [--threads 1] [--json FILE]

The shape is ViD-GPT-XL's, in bfloat16 on "cuda". Fewer latents a frame make it bearable on a CPU: at 8 x 8
each layer is as wide and as deep, and both ways have a sixteenth of the tokens. --small takes a few small layers, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from mmzoo.files import replacing
from mmzoo.models.vid_gpt import CONFIGS, Denoising, ViDGPT, ViDGPTCache, ViDGPTRollout

SMALLER = {"hidden_size": 192, "num_layers": 6, "num_attention_heads": 4}
NO_PARTS = {"vae": None, "text_encoder": None, "caption_channels": 0}


def build(device: str, latents: int, small: bool) -> ViDGPT:
    """ViD-GPT-XL, or its small twin, with random weights and without text, as the authors time it."""
    torch.manual_seed(0)
    fields = {**CONFIGS["vid-gpt-xl"], **NO_PARTS, "sample_size": (latents, latents), **(SMALLER if small else {})}
    with torch.device(device):
        model = ViDGPT.build(fields, torch.float32 if device == "cpu" else torch.bfloat16)
    model.eval().requires_grad_(False)
    for layer in model.modules():  # some begin at zero, and would say nothing
        if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
            torch.nn.init.normal_(layer.weight, std=0.02)
    return model


def chunks(model: ViDGPT, frames: int, steps: int, cached: bool) -> tuple[list[float], list[torch.Tensor], int]:
    """Seconds and latents of each chunk after one "begin of video" frame, and bytes of the cache."""
    rollout: ViDGPTRollout = model.rollout(frames, steps=steps, cached=cached)
    seconds, made = [], []
    while sum(one.shape[2] for one in made) < frames:
        start = now(model)
        made.append(rollout.next_latents())
        seconds.append(now(model) - start)
    return seconds, made, rollout.cache.nbytes if rollout.cache else 0


def apart(model: ViDGPT) -> dict[str, float]:
    """How far a pass over one chunk is apart in both ways, before anything is evicted, in float64.

    Of single passes, since a chain of random weights, of which nothing is clipped, makes much of rounding: after a few
    chunks through all layers of ViD-GPT-XL nothing is left of what two orders of summation have in common.
    """
    exact, config = copy.deepcopy(model).double(), model.config
    shape = (1, config.in_channels, 1 + 2 * config.chunk_frames, *config.sample_size)
    frames = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(model.device)
    given, new = frames.split([1 + config.chunk_frames, config.chunk_frames], 2)
    cache, denoising = ViDGPTCache(exact), Denoising(exact, exact.build_scheduler())
    for part, first in zip(given.split([1, config.chunk_frames], 2), (0, 1), strict=True):
        denoising.write(part, first, cache)
    past, t = given.shape[2], torch.tensor([500], device=model.device)
    cached = exact(new, t, first_frame=past, cache=cache)
    again = exact(frames, t, num_prompt_frames=past)[:, :, past:]
    return {
        "largest difference of a pass before eviction, float64": float((cached - again).abs().max()),
        "largest value": float(cached.abs().max()),
    }


def now(model: ViDGPT) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(model: ViDGPT, frames: int, steps: int, rounds: int) -> dict[str, Any]:
    """Both ways by turns: a busy moment of the machine meets both."""
    chunks(model, model.config.chunk_frames, 1, cached=True)
    runs: dict[bool, list[list[float]]] = {True: [], False: []}
    stored = 0
    for _ in range(rounds):
        for cached in (True, False):
            seconds, _, size = chunks(model, frames, steps, cached)
            runs[cached].append(seconds)
            stored = max(stored, size)
    cached, recomputed = ([min(times) for times in zip(*runs[way])] for way in (True, False))
    config = model.config
    kept = config.window + config.chunk_frames + config.prefix_frames
    formula = 2 * config.num_layers * model.tokens_per_frame * config.hidden_size * kept * model.dtype.itemsize
    return {
        "frames": frames,
        "denoising steps": steps,
        "seconds, cached": sum(cached),
        "seconds, recomputed": sum(recomputed),
        "ratio": sum(recomputed) / sum(cached),
        "ratio, window full": recomputed[-1] / cached[-1],
        "seconds a frame of each chunk, cached": [one / config.chunk_frames for one in cached],
        "seconds a frame of each chunk, recomputed": [one / config.chunk_frames for one in recomputed],
        **apart(model),
        "bytes of the cache": stored,
        "bytes by the formula": formula,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--latents", type=int, default=32, help="height and width of a frame's latents")
    parser.add_argument("--small", action="store_true", help="a few small layers")
    parser.add_argument("--frames", type=int, default=80)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps a chunk")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build(options.device, options.latents, options.small)
    on_cpu = options.device == "cpu"
    results = {
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, threads: {options.threads}" if on_cpu else torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "shape": {
            name: model.config[name] for name in ("sample_size", "hidden_size", "num_layers", "window", "chunk_frames")
        },
        **measure(model, options.frames, options.steps, options.rounds),
    }
    path = options.json or Path(__file__).parent / "results" / f"video_{'cpu' if on_cpu else 'gpu'}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
