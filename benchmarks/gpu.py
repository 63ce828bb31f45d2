"""What needs a GPU, most important first: are the masks right there, and what do they cost.

    python benchmarks/gpu.py [--only verdicts tiles backends head_dims decoding] [--json benchmarks/results/gpu.json]

Ratios come from runs side by side in one process. Each part takes well under ten minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_cpu import RULES, a_video

from mmzoo import masks
from mmzoo.attention import compact, varlen
from mmzoo.attention.backends import Mask, flex
from mmzoo.attention.verdicts import BACKENDS, EXAMPLES, SCENARIOS, device_name, verdict, versions
from mmzoo.files import replacing
from mmzoo.layout import lay_out, text

DEVICE = "cuda"
HEADS, HEAD_DIM = 16, 128
HEAD_DIMS = (8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)
COMPARED = {"causal": masks.causal(), **RULES}


def in_parallel(function: Callable[[Any], Any], items: Any) -> dict[str, Any]:
    """One process an item: compiling takes the processor, not the GPU."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(15, os.cpu_count() or 1), mp_context=context) as pool:
        return {str(item): found for item, found in zip(items, pool.map(function, items), strict=True)}


def of_one_rule(rule: str) -> dict[str, dict[str, dict[str, str]]]:
    return {name: {s: vars(verdict(rule, name, s, DEVICE)) for s in SCENARIOS} for name in BACKENDS}


def verdicts() -> dict[str, Any]:
    """Every cell of the table, on this GPU."""
    return in_parallel(of_one_rule, tuple(EXAMPLES))


def milliseconds(*runs: Callable[[], Any], rounds: int = 20) -> list[float]:
    """Median GPU time of each call; the calls take turns, after three rounds that warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(rounds + 3):
        for run, found in zip(runs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found += [start.elapsed_time(end)] if i >= 3 else []
    return [sorted(found)[len(found) // 2] for found in times]


def tensors(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(1, HEADS, tokens, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]


def steps(attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Prefill, and a training step forward and backward."""

    def prefill() -> None:
        with torch.no_grad():
            attention(*inputs)

    def training() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        attention(*leaves).sum().backward()

    return {"prefill": prefill, "training": training}


def tiles() -> dict[str, Any]:
    """The time of each rule for a computed tile, against plain causal's, with reused block masks."""
    found: dict[str, Any] = {}
    for tokens in (8192, 16384, 32768):
        inputs, layout = tensors(tokens), a_video(tokens).to(DEVICE)
        blocks = {name: compact(rule, layout).block_mask() for name, rule in COMPARED.items()}
        computed = {name: int((one.kv_num_blocks + one.full_kv_num_blocks).sum()) for name, one in blocks.items()}
        partial = {name: int(one.kv_num_blocks.sum()) for name, one in blocks.items()}
        runs = {name: steps(lambda q, k, v, one=one: flex(q, k, v, one), inputs) for name, one in blocks.items()}
        rows = {name: {"computed tiles": computed[name], "partial tiles": partial[name]} for name in blocks}
        for step in ("prefill", "training"):
            times = dict(zip(runs, milliseconds(*(one[step] for one in runs.values())), strict=True))
            for name, row in rows.items():
                row[f"{step}, ms"] = times[name]
                ratio = times[name] / computed[name] / (times["causal"] / computed["causal"])
                row[f"{step}, per tile over causal"] = ratio
        found[str(tokens)] = rows
    return found


def backends() -> dict[str, Any]:
    """Milliseconds of causal and frame-wise block causal attention by backend; what a dense mask costs in SDPA."""
    found: dict[str, Any] = {}
    for tokens in (1024, 4096, 8192, 16384):
        inputs, layout = tensors(tokens), a_video(tokens).to(DEVICE)
        found[str(tokens)] = {}
        for name in ("causal", "frame-block-causal"):
            mask = Mask(COMPARED[name], layout, layout, slice(None))
            dense, blocks, calls = mask.dense()[:, None], mask.blocks(), mask.calls()
            ways: dict[str, Callable[..., torch.Tensor]] = {
                "sdpa, is_causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                "sdpa, dense mask": lambda q, k, v, m=dense: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
                "flex_attention": lambda q, k, v, m=blocks: flex(q, k, v, m),
                "varlen": lambda q, k, v, m=calls: varlen.attend_by_calls(
                    q, k, v, m, HEAD_DIM**-0.5, varlen.torch_varlen
                ),
            }
            if name != "causal":
                del ways["sdpa, is_causal"]
            runs = {way: steps(attention, inputs) for way, attention in ways.items()}
            for step in ("prefill", "training"):
                times = milliseconds(*(one[step] for one in runs.values()), rounds=10)
                found[str(tokens)][f"{name}, {step}, ms"] = dict(zip(runs, times, strict=True))
    return found


def of_one_head_dim(head_dim: int) -> dict[str, str]:
    """What the two libraries say themselves, whatever mmzoo refuses."""
    layout, found = lay_out(text(300)).to(DEVICE), {}
    mask = Mask(masks.causal(), layout, layout, slice(None))
    for name, attention in {
        "flex_attention": lambda q, k, v: flex(q, k, v, mask.blocks()),
        "varlen": lambda q, k, v: varlen.attend_by_calls(q, k, v, mask.calls(), 1.0, varlen.torch_varlen),
    }.items():
        leaves = [
            torch.randn(1, 2, 300, head_dim, device=DEVICE, dtype=torch.float16, requires_grad=True) for _ in range(3)
        ]
        try:
            attention(*leaves).sum().backward()
            torch.cuda.synchronize()
            found[name] = "runs"
        except Exception as error:  # whatever the library raises is the finding
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return found


def head_dims() -> dict[str, Any]:
    """Which head dims the fused kernels take, forward and backward."""
    return in_parallel(of_one_head_dim, HEAD_DIMS)


def decoding() -> dict[str, Any]:
    """Cached decoding against plain transformers, as on the CPU."""
    import cpu

    with torch.device(DEVICE):
        return {f"sdpa, batch {rows}": cpu.decoding("sdpa", rows) for rows in (1, 8)}


def main() -> None:
    parts = {
        "verdicts": verdicts,
        "tiles": tiles,
        "backends": backends,
        "head_dims": head_dims,
        "decoding": decoding,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here: torch.cuda.is_available() is false.")
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.only:
        measured_on = {"date": date.today().isoformat(), "device": device_name(DEVICE), "versions": versions()}
        results[name] = {**measured_on, "results": parts[name]()}
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: results[name]}), flush=True)


if __name__ == "__main__":
    main()
