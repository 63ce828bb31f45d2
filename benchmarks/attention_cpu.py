"""What a mask costs on a CPU: building it, and giving up SDPA's causal fast path.

    python benchmarks/attention_cpu.py [--json FILE] [--plot PNG]

Every number is the best of several runs on one thread, and every ratio comes from runs side by side.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.attention.flex_attention import create_block_mask

from mmzoo import masks
from mmzoo.attention import allowed, compact
from mmzoo.files import replacing
from mmzoo.layout import TokenLayout, lay_out, text, video

RULES = {"modality-mutual": masks.modality_mutual(), "frame-block-causal": masks.frame_block_causal()}
TOKENS = (1024, 4096, 8192, 16384, 32768)
DENSE_UP_TO = 8192


def a_video(tokens: int) -> TokenLayout:
    """Half text, half frames of 12 x 12 tokens."""
    frames = tokens // 2 // 144
    return lay_out(text(64), video(frames, 12, 12), text(tokens - 64 - 144 * frames))


def seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Best wall seconds of several calls, after one that warms up."""
    run()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def building(tokens: int) -> dict[str, Any]:
    """Milliseconds to go from the layout to a mask."""
    layout, found = a_video(tokens), {}
    for name, rule in RULES.items():
        row = {"tiles, ms": 1e3 * seconds(lambda rule=rule: compact(rule, layout).block_mask())}
        if tokens <= DENSE_UP_TO:
            row["dense, ms"] = 1e3 * seconds(lambda rule=rule: allowed(rule, layout), 3)
            mod = compact(rule, layout).mask_mod()
            row["create_block_mask, ms"] = 1e3 * seconds(
                lambda mod=mod: create_block_mask(mod, 1, 1, tokens, tokens, device="cpu"), 2
            )
        blocks = compact(rule, layout).block_mask()
        row["block mask, bytes a token"] = (
            sum(
                x.numel() * x.element_size()
                for x in (blocks.kv_indices, blocks.full_kv_indices, blocks.q_indices, blocks.full_q_indices)
            )
            / tokens
        )
        found[name] = row
    return found


def fast_path(tokens: int) -> dict[str, float]:
    """What a dense mask costs against `is_causal=True` in SDPA's forward: 8 heads of 64."""
    query, key, value = torch.randn(3, 1, 8, tokens, 64)
    mask = allowed(RULES["modality-mutual"], a_video(tokens))[:, None]
    with torch.no_grad():
        causal = seconds(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), 3)
        masked = seconds(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask), 3)
    return {"causal, ms": 1e3 * causal, "dense mask, ms": 1e3 * masked, "ratio": masked / causal}


def plot(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for way, style in (("tiles, ms", "o-"), ("dense, ms", "s--"), ("create_block_mask, ms", "^:")):
        rows = {int(n): row["modality-mutual"] for n, row in results["building"].items()}
        points = [(n, row[way]) for n, row in rows.items() if way in row]
        axis.plot(*zip(*points, strict=True), style, label=way.removesuffix(", ms"))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("milliseconds")
    axis.set_title(f"from a layout to a mask (modality-mutual, {results['device']})", fontsize=10)
    axis.legend()
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=here / "results" / "attention_cpu.json")
    parser.add_argument("--plot", type=Path, default=here.parent / "docs" / "images" / "attention_cpu.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, one thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "building": {str(tokens): building(tokens) for tokens in TOKENS},
        "SDPA, dense mask against is_causal": {str(tokens): fast_path(tokens) for tokens in (1024, 4096, 8192)},
    }
    with replacing(options.json) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, options.plot)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
