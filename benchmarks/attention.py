"""Every backend, rule and length, forward and backward, behind a check that all of them are right.

    python benchmarks/attention.py [--lengths 1024 8192] [--json benchmarks/results/attention.json] [--plot PNG]

First every way is compared with the naive reference in float64; if one is wrong, nothing is measured. The time to build
a mask from a new layout is a column of its own. On a CPU only the check runs, with mmzoo's own kernels in Triton's
interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_cpu import a_video
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from mmzoo import masks
from mmzoo.attention import compact, varlen
from mmzoo.attention.backends import flex
from mmzoo.attention.verdicts import device_name, versions
from mmzoo.errors import UnsupportedMask
from mmzoo.files import replacing
from mmzoo.layout import TokenLayout, lay_out, text, video
from mmzoo_kernels.flash import flash_mask, masked_attention, naive_masked_attention
from mmzoo_kernels.masks import CompactMask

HEADS, HEAD_DIM = 16, 128
DENSE_UP_TO = 25600
RULES: dict[str, tuple[masks.Rule, ...]] = {
    "causal": (masks.causal(),),
    "frame-block-causal": (masks.frame_block_causal(),),
    "modality-mutual": (masks.modality_mutual(),),
    "mmca": masks.multimodal_causal(),
}
Attention = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Way:
    """How a backend goes from compact masks, one a softmax, to what it needs, and then to outputs."""

    build: Callable[[list[CompactMask]], Any]
    run: Attention
    needs_gpu: bool = True
    dense: bool = False


def added(one: Attention) -> Attention:
    """One call a softmax."""
    return lambda q, k, v, made: sum(one(q, k, v, part) for part in made[1:]) + one(q, k, v, made[0])


def created(mask: CompactMask) -> Any:
    b, q = mask.query_sample.shape
    return create_block_mask(mask.mask_mod(), b, None, q, mask.key_sample.shape[1], device=mask.value.device.type)


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def by_calls(query: Tensor, key: Tensor, value: Tensor, made: Any) -> Tensor:
    return varlen.attend_by_calls(query, key, value, made, query.shape[-1] ** -0.5, varlen.torch_varlen)


WAYS = {
    "sdpa, dense mask": Way(lambda ms: [m.dense()[:, None] for m in ms], added(sdpa), needs_gpu=False, dense=True),
    "flex, create_block_mask": Way(lambda ms: [created(m) for m in ms], added(flex)),
    "flex, our block mask": Way(lambda ms: [m.block_mask() for m in ms], added(flex)),
    "varlen": Way(lambda ms: [varlen.calls(m, "any") for m in ms], added(by_calls)),
    "mmzoo_flash": Way(lambda ms: flash_mask(*ms), lambda q, k, v, m: masked_attention(q, k, v, m)[0], needs_gpu=False),
}
IS_CAUSAL = Way(lambda ms: None, lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def ways(rule: str, layout: TokenLayout, device: str) -> dict[str, Way]:
    """Those that can express the rule on that device and at that length."""
    found = {name: way for name, way in WAYS.items() if device == "cuda" or not way.needs_gpu}
    if len(layout) > DENSE_UP_TO:
        found = {name: way for name, way in found.items() if not way.dense}
    try:
        for one in RULES[rule]:
            varlen.calls(compact(one, layout), one.name)
    except UnsupportedMask:
        found.pop("varlen", None)
    return {**found, "sdpa, is_causal": IS_CAUSAL} if rule == "causal" and device == "cuda" else found


def inputs(tokens: int, device: str) -> list[Tensor]:
    """bfloat16, which the interpreter gets wrong."""
    heads, dim, dtype = (HEADS, HEAD_DIM, torch.bfloat16) if device == "cuda" else (1, 16, torch.float32)
    return [torch.randn(1, heads, tokens, dim).to(device, dtype) for _ in range(3)]


def trained(attention: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


def wrong(device: str) -> list[str]:
    """What differs from the naive reference by more than the dtype's rounding allows, relative to the largest value."""
    layout = (
        lay_out(text(11), video(4, 8, 8), text(61)) if device == "cuda" else lay_out(text(3), video(2, 2, 2), text(9))
    )
    layout, found = layout.to(device), []
    for rule, branches in RULES.items():
        compacts, given = [compact(one, layout) for one in branches], inputs(len(layout), device)
        exact = trained(
            lambda q, k, v, ms=compacts: naive_masked_attention(q, k, v, ms)[0], [x.double() for x in given]
        )
        for name, way in ways(rule, layout, device).items():
            made = way.build(compacts)
            ours = trained(lambda q, k, v, way=way, made=made: way.run(q, k, v, made), given)
            for part, actual, right in zip(("out", "grad q", "grad k", "grad v"), ours, exact, strict=True):
                error = float((actual.double() - right).abs().max() / right.abs().max())
                if not error <= (2e-2 if device == "cuda" else 1e-5):
                    found.append(f"{name}, {rule}: {part} is off by {error:.1e} of its largest value")
    return found


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """Median GPU time after two rounds that warm up."""
    times = []
    for i in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end)] if i >= 2 else []
    return sorted(times)[len(times) // 2]


def wall_milliseconds(run: Callable[[], Any], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[1:])[rounds // 2]


def open_pairs(branches: list[CompactMask]) -> int:
    """How many there are in all softmaxes, counted without an L x L matrix."""
    rows = range(0, branches[0].query_sample.shape[1], 1024)
    return sum(int(one.rows(slice(first, first + 1024)).dense().sum()) for one in branches for first in rows)


def measured(way: Way, branches: list[CompactMask], given: list[Tensor], rounds: int) -> dict[str, float]:
    """Times, peak memory beside the inputs, and TFLOP/s of the open pairs alone."""
    made, useful = way.build(branches), 4 * given[0].shape[1] * given[0].shape[-1] * open_pairs(branches)
    leaves = [x.detach().requires_grad_() for x in given]

    def forward() -> None:
        with torch.no_grad():
            way.run(*given, made)

    def training() -> None:
        torch.autograd.grad(way.run(*leaves, made).sum(), leaves)

    forward_ms = milliseconds(forward, rounds)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    training_ms = milliseconds(training, rounds)
    return {
        "building, ms": wall_milliseconds(lambda: way.build(branches)),
        "forward, ms": forward_ms,
        "training, ms": training_ms,
        "peak memory, MB": (torch.cuda.max_memory_allocated() - before) / 2**20,
        "forward, useful TFLOP/s": useful / forward_ms / 1e9,
        "training, useful TFLOP/s": 3.5 * useful / training_ms / 1e9,
    }


def measure(lengths: list[int], rounds: int) -> dict[str, Any]:
    """length -> rule -> way -> numbers; a way that runs out of memory says so."""
    found: dict[str, Any] = {}
    for tokens in lengths:
        layout, given = a_video(tokens).to("cuda"), inputs(tokens, "cuda")
        for rule, branches in RULES.items():
            compacts, row = [compact(one, layout) for one in branches], {}
            for name, way in ways(rule, layout, "cuda").items():
                try:
                    row[name] = measured(way, compacts, given, rounds)
                except torch.OutOfMemoryError:
                    row[name] = {}
            found.setdefault(str(tokens), {})[rule] = row
            for name, numbers in row.items():
                print(tokens, rule, name, {key: round(value, 3) for key, value in numbers.items()} or "out of memory")
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Training time by length, a panel a rule."""
    figure = Figure((4 * len(RULES), 3.5), layout="constrained")
    for axis, rule in zip(figure.subplots(1, len(RULES), sharey=True), RULES, strict=True):
        for name in (*WAYS, "sdpa, is_causal"):
            points = [(int(n), row[rule][name]["training, ms"]) for n, row in results.items() if row[rule].get(name)]
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=rule, xlabel="tokens", ylabel="forward and backward, ms")
    axis.legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 25600, 32768])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if errors := wrong(device):
        print("\n".join(errors), file=sys.stderr)
        return 1
    if device == "cpu":
        print("Every way that runs here is right. Times need a GPU.")
        return 0
    results = measure(options.lengths, options.rounds)
    if options.json:
        said = {"device": device_name(device), "versions": versions(), "date": date.today().isoformat()}
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps({**said, "results": results}, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
