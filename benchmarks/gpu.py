"""What needs a GPU, most important first: are the masks right there, and what do they cost.

    python benchmarks/gpu.py [--only verdicts|tiles|decoding] [--json benchmarks/results/gpu.json]

Ratios come from runs side by side in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from attention_cpu import RULES, a_video

from mmzoo import masks
from mmzoo.attention import compact
from mmzoo.attention.backends import flex
from mmzoo.attention.verdicts import BACKENDS, EXAMPLES, SCENARIOS, device_name, verdict
from mmzoo.files import replacing

DEVICE = "cuda"


def verdicts() -> dict[str, Any]:
    """Every cell of the table, on this GPU."""
    return {
        rule: {name: {s: verdict(rule, name, s, DEVICE).kind for s in SCENARIOS} for name in BACKENDS}
        for rule in EXAMPLES
    }


def milliseconds(run: Callable[[], Any], rounds: int = 20) -> float:
    """Median GPU time of a call, after three that warm up."""
    times = []
    for i in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end)] if i >= 3 else []
    return sorted(times)[len(times) // 2]


def per_tile(rule: masks.Rule, tokens: int, tensors: list[torch.Tensor]) -> dict[str, float]:
    """Milliseconds for every tile that FlexAttention computes, with a reused block mask."""
    blocks = compact(rule, a_video(tokens)).block_mask().to(DEVICE)
    computed = int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())

    def prefill() -> None:
        with torch.no_grad():
            flex(*tensors, blocks)

    def training() -> None:
        leaves = [x.detach().requires_grad_() for x in tensors]
        flex(*leaves, blocks).sum().backward()

    return {"prefill": milliseconds(prefill) / computed, "training": milliseconds(training) / computed}


def tiles() -> dict[str, Any]:
    """The time of each rule for a tile, against plain causal's: 16 heads of 128, bfloat16."""
    found: dict[str, Any] = {}
    for tokens in (8192, 16384):
        tensors = [torch.randn(1, 16, tokens, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
        causal = per_tile(masks.causal(), tokens, tensors)
        rows = {name: per_tile(rule, tokens, tensors) for name, rule in RULES.items()}
        found[str(tokens)] = {name: {step: row[step] / causal[step] for step in row} for name, row in rows.items()}
    return found


def decoding() -> dict[str, Any]:
    """Cached decoding against plain transformers, as on the CPU."""
    import cpu

    with torch.device(DEVICE):
        return {
            f"{attention}, batch {rows}": cpu.decoding(attention, rows) for attention in ("sdpa",) for rows in (1, 8)
        }


def main() -> None:
    parts = {"verdicts": verdicts, "tiles": tiles, "decoding": decoding}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here: torch.cuda.is_available() is false.")
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": device_name(DEVICE),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for name in [options.only] if options.only else parts:
        results[name] = parts[name]()
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({name: results[name]}, indent=1))


if __name__ == "__main__":
    main()
