"""Write the tables of docs/benchmarks.md, and the picture of the GPU's results, from benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmzoo.files import replacing

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"


def table(rows: dict[str, dict[str, float]], first: str) -> str:
    """A Markdown table, one line a row."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| {first} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[column]:.4g}" if column in row else "" for column in names) + " |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def replaced(page: str, name: str, content: str) -> str:
    """The page with what stands between two markers replaced."""
    marked = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
    return re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _: marked, page, flags=re.DOTALL)


def on(part: dict[str, Any]) -> str:
    """Where and when a part was measured."""
    versions = ", ".join(f"{name} {part['versions'][name]}" for name in ("torch", "triton", "transformers"))
    return f"{part['device']}, {versions}, {part['date']}:\n\n"


def per_tile(part: dict[str, Any]) -> str:
    """Each rule's time for a computed tile over plain causal's."""
    rows = {
        f"{rule}, {tokens} tokens": {name.replace("per tile over causal", "ratio"): row[name] for name in row}
        for tokens, by_rule in part["results"].items()
        for rule, row in by_rule.items()
    }
    return on(part) + table(rows, "rule")


def by_backend(part: dict[str, Any]) -> str:
    """Milliseconds of frame-wise block causal and of causal attention by backend."""
    rows: dict[str, dict[str, float]] = {}
    for tokens, steps in part["results"].items():
        for step, ways in steps.items():
            for way, value in ways.items():
                name = f"{step.removesuffix(', ms')}: {way}"
                rows.setdefault(name, {})[f"{tokens}"] = value
    return on(part) + table(rows, "ms by number of tokens")


def draw_backends(part: dict[str, Any], path: Path) -> None:
    """Frame-wise block causal attention: milliseconds over tokens, a line a backend."""
    figure = Figure(figsize=(8, 3.6))
    for axis, step in zip(figure.subplots(1, 2), ("prefill", "training"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for tokens, steps in part["results"].items():
            for way, value in steps[f"frame-block-causal, {step}, ms"].items():
                lines.setdefault(way, []).append((int(tokens), value))
            causal = steps[f"causal, {step}, ms"]["sdpa, is_causal"]
            lines.setdefault("plain causal: sdpa, is_causal", []).append((int(tokens), causal))
        for (way, points), style in zip(lines.items(), ("s--", "o-", "^-", ":"), strict=True):
            axis.plot(*zip(*points, strict=True), style, label=way)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.set_title(f"{step}, milliseconds", fontsize=10)
    axis.legend(fontsize=8)
    figure.suptitle(f"frame-wise block causal attention, 16 heads of 128, {part['device']}", fontsize=10)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_video(found: dict[str, Any], path: Path) -> None:
    """Seconds of every frame of a clip, with the cache and computed again."""
    figure = Figure(figsize=(8, 3.2))
    axis, chunk = figure.subplots(), found["shape"]["chunk_frames"]
    for way, style in (("recomputed", "s--"), ("cached", "o-")):
        seconds = found[f"seconds a frame of each chunk, {way}"]
        axis.plot([chunk * (i + 1) for i in range(len(seconds))], seconds, style, label=way)
    axis.axvline(found["shape"]["window"], color="grey", linestyle=":", label="the window is full")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("frames made")
    axis.set_ylabel("seconds a frame")
    axis.legend(fontsize=8)
    figure.suptitle(f"ViD-GPT-XL's layers, {found['denoising steps']} steps, {found['device']}", fontsize=10)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main() -> None:
    cpu: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text())
    attention: dict[str, Any] = json.loads((RESULTS / "attention_cpu.json").read_text())
    page = PAGE.read_text()
    page = replaced(page, "dense", table(attention["SDPA, dense mask against is_causal"], "tokens"))
    decoding = {name.removeprefix("decoding, "): row for name, row in cpu.items() if name.startswith("decoding")}
    page = replaced(page, "decoding", table(decoding, "attention"))
    page = replaced(page, "imports", table({"median of 7": cpu["import"]}, ""))
    gpu: dict[str, Any] = json.loads((RESULTS / "gpu.json").read_text())
    page = replaced(page, "tiles", per_tile(gpu["tiles"]))
    page = replaced(page, "backends", by_backend(gpu["backends"]))
    page = replaced(page, "gpu decoding", on(gpu["decoding"]) + table(gpu["decoding"]["results"], "attention"))
    draw_backends(gpu["backends"], ROOT / "docs" / "images" / "attention_gpu.png")
    draw_video(json.loads((RESULTS / "video_cpu.json").read_text()), ROOT / "docs" / "images" / "video-cost.png")
    with replacing(PAGE) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    main()
