"""LongLive on a GPU: frames a second with and without the autoencoder, and where the time goes.

    python benchmarks/video_gpu.py [--only curve variants profile recache] [--json benchmarks/results/video_gpu.json]
    python benchmarks/video_gpu.py --small        # the same at test size, on whatever there is

longlive-1.3b with random weights at 480 x 832 in bfloat16: 12 frames a block once the clip has begun, each block five
passes. The authors report 20.7 frames a second on an H100. All of it takes a few minutes; variants are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

import mmzoo
from mmzoo.attention.verdicts import device_name, versions
from mmzoo.files import replacing
from mmzoo.models import longlive
from mmzoo.models.longlive import LongLive, Stream, StreamingDecoder

KINDS = {
    "self-attention, softmax(QK)V": "attend over frames",
    "self-attention, projections, norms, rotation, cache": "_over_frames",
    "cross-attention": "_over_text",
    "feed-forward": "ffn",
    "block, in all": "block",
}
COUNTED = {"self-attention, projections, norms, rotation, cache": "self-attention, softmax(QK)V"}
"""Of which a part is listed by itself."""


class Setting:
    """A model, an autoencoder and prompts with random numbers, at full size or at test size."""

    def __init__(self, small: bool, device: str):
        self.device = torch.device(device)
        dtype = torch.float32 if small or self.device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        name = "longlive-tiny" if small else "longlive-1.3b"
        self.model: LongLive = mmzoo.create(name, device=device, dtype=dtype)  # type: ignore[assignment]
        sizes: dict[str, Any] = {"base_dim": 8, "z_dim": 3} if small else {}
        moments = {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3} if small else {}
        with self.device:
            self.vae = AutoencoderKLWan(**sizes, **moments).to(dtype).eval()
        config = self.model.config
        self.prompts = torch.randn(1, config.text_length, config.text_dim, device=self.device, dtype=dtype)
        self.random = torch.Generator().manual_seed(0)
        self.full = config.window // config.frames_per_block
        self.frames = 4 * config.frames_per_block

    def stream(self, blocks: int) -> Stream:
        """A stream that has so many blocks behind it."""
        stream = Stream(self.model, self.prompts)
        for _ in range(blocks):
            stream.keep(stream.noise(self.random))
        return stream

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def curve(setting: Setting) -> dict[str, Any]:
    """Seconds of each block of one clip, the tokens it sees, and the cache against its formula."""
    warm, stream, rows = setting.stream(0), setting.stream(0), []
    warm.block(setting.random)
    for _ in range(3 * setting.full):
        seconds = setting.seconds(lambda: stream.block(setting.random))
        seen = len(stream.cache.frames.frames)
        rows.append({"frames seen": seen, "seconds": seconds})
    config, frames = setting.model.config, stream.cache.frames
    width = config.num_attention_heads * config.attention_head_dim
    item = setting.prompts.element_size()
    formula = 2 * config.num_layers * frames.window * frames.tokens_per_frame * width * item
    found: dict[str, Any] = {"blocks": rows, "cache bytes": stream.cache.nbytes, "by the formula": formula}
    if setting.device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return found


@contextmanager
def compiled() -> Iterator[None]:
    """What runs element by element, compiled."""
    names = ("_modulated", "_gated", "rotate")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(longlive, name, torch.compile(getattr(longlive, name))))
        yield


def cudnn() -> Any:
    chosen = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(chosen, set_priority=True)


@contextmanager
def both() -> Iterator[None]:
    with compiled(), cudnn():
        yield


VARIANTS: dict[str, Callable[[], Any]] = {
    "as it is": nullcontext,
    "cuDNN's attention first": cudnn,
    "element-wise parts compiled": compiled,
    "both": both,
}


def variants(setting: Setting, rounds: int = 4) -> dict[str, Any]:
    """Frames a second with a full window, without and with the autoencoder, by what else may be chosen."""
    stream, decoder = setting.stream(setting.full + 1), StreamingDecoder(setting.vae)
    decoder(stream.latents[:, :, -setting.model.config.frames_per_block :])
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    decoding = []
    for number in range(rounds + 1):  # the first warms up, and compiles
        for name, context in VARIANTS.items():
            with context():
                seconds = setting.seconds(lambda: stream.block(setting.random))
            times[name] += [seconds] if number else []
        latents = stream.latents[:, :, -setting.model.config.frames_per_block :]
        seconds = setting.seconds(lambda latents=latents: decoder(latents))
        decoding += [seconds] if number else []
    decode = median(decoding)
    rows = {
        name: {
            "seconds a block": median(found),
            "frames a second, latents only": setting.frames / median(found),
            "frames a second, with the autoencoder": setting.frames / (median(found) + decode),
        }
        for name, found in times.items()
    }
    return {"decoding a block, seconds": decode, "variants": rows}


@contextmanager
def named() -> Iterator[None]:
    """The parts of a block under names that the profiler shows."""
    block, attend = longlive.Block, longlive.attend

    def under(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return run

    def attending(query: Any, key: Any, value: Any, mask: Any, attention: str) -> Any:
        text = key.shape[1] < query.shape[1]  # fewer words than tokens of a block
        with record_function("attend to text" if text else "attend over frames"):
            return attend(query, key, value, mask, attention)

    with ExitStack() as stack:
        for name in ("_over_frames", "_over_text"):
            stack.enter_context(patch.object(block, name, under(name, getattr(block, name))))
        stack.enter_context(patch.object(block, "forward", under("block", block.forward)))
        feed_forward = longlive.WanTransformerBlock.__init__.__globals__["FeedForward"]
        stack.enter_context(patch.object(feed_forward, "forward", under("ffn", feed_forward.forward)))
        stack.enter_context(patch.object(longlive, "attend", attending))
        yield


def profiled(setting: Setting) -> dict[str, Any]:
    """Milliseconds of one block by kind of layer, and the kernels that take most."""
    stream = setting.stream(setting.full + 1)
    stream.block(setting.random)
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with named(), profile(activities=activities) as seen:
        stream.block(setting.random)
        setting.wait()
    events = {event.key: event for event in seen.key_averages()}

    def milliseconds(key: str) -> float:
        event = events.get(key)
        return 0.0 if event is None else (event.device_time_total if on_gpu else event.cpu_time_total) / 1000

    kinds = {kind: milliseconds(key) for kind, key in KINDS.items()}
    for whole, part in COUNTED.items():
        kinds[whole] -= kinds[part]
    parts = [kind for kind in kinds if kind != "block, in all"]
    kinds["modulation, norms, gates"] = kinds["block, in all"] - sum(kinds[kind] for kind in parts)

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    top = sorted(events.values(), key=own, reverse=True)[:15]
    return {"milliseconds": kinds, "kernels": {event.key[:100]: own(event) / 1000 for event in top}}


def recaching(setting: Setting) -> dict[str, float]:
    """Seconds of a change of prompt with a full window, by rule and sink; the second of two."""
    found = {}
    for recache in ("bidirectional", "block-causal"):
        for global_sink in (True, False):
            seconds = 0.0
            for _ in range(2):
                stream = setting.stream(setting.full + 1)
                stream.global_sink = global_sink
                stream.recache_rule = stream.model.rule if recache == "block-causal" else stream.recache_rule
                seconds = setting.seconds(lambda stream=stream: stream.switch(setting.prompts))
            found[f"{recache}, {'sink kept' if global_sink else 'sink moved'}"] = seconds
    return found


PARTS: dict[str, Callable[[Setting], Any]] = {
    "curve": curve,
    "variants": variants,
    "profile": profiled,
    "recache": recaching,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="at test size")
    parser.add_argument("--json", type=Path, help="write the numbers here, with those that stand there already")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.small:
        print("There is no GPU. Give --small to run this at test size.", file=sys.stderr)
        return 1
    with torch.no_grad():
        setting = Setting(options.small, device)
        found = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
        for name in options.only:
            measured_on = {"date": date.today().isoformat(), "device": device_name(device), "versions": versions()}
            found[name] = {**measured_on, "results": PARTS[name](setting)}
            print(json.dumps({name: found[name]}), flush=True)
            if options.json:
                with replacing(options.json) as temporary:
                    temporary.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
