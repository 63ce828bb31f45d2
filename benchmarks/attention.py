"""Every backend, rule and length, forward and backward, behind a check that all of them are right.

    python benchmarks/attention.py [--only causal mmca questions] [--lengths 1024 6784] [--minutes 8]
        [--json benchmarks/results/attention.json] [--plot docs/images/attention.png]

First every way is compared with the naive reference in float64; if one is wrong, nothing is measured. What a new layout
in every step costs is a column of its own. The part `questions` asks eight questions on one video of ten thousand
tokens. What is not begun after `--minutes` is left out, and said; results are written after each length.

On a CPU only the check runs, with mmzoo's own kernels in Triton's interpreter (TRITON_INTERPRET=1); `--rehearse` goes
through everything there in small, to see that it runs. Its times mean nothing, and its files say so.
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
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

from mmzoo import masks
from mmzoo.attention import compact, varlen
from mmzoo.attention.backends import flex
from mmzoo.attention.prefix import PrefixCache, SharedMask
from mmzoo.attention.verdicts import device_name, versions
from mmzoo.errors import UnsupportedMask
from mmzoo.files import replacing
from mmzoo.layout import TokenLayout, lay_out, text, video
from mmzoo_kernels.flash import flash_mask, masked_attention, naive_masked_attention
from mmzoo_kernels.masks import CompactMask
from mmzoo_kernels.softmax import fast_softmax_attention


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        heads, head_dim, dtype: of the layer.
        lengths: tokens; half of them are a video.
        side: tokens of a frame's side.
        rounds: of which the median is taken.
        questions, video, words, answer: how many questions follow a video of how many tokens, of how many tokens each,
            and how many tokens of an answer are there already when the next is decoded.
        grouped: query and key/value heads of the layers that answer.
    """

    heads: int = 16
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = (1024, 4096, 6784, 8192, 16384, 25600, 32768)
    side: int = 12
    rounds: int = 10
    questions: int = 8
    video: int = 10240
    words: int = 64
    answer: int = 128
    grouped: tuple[tuple[int, int], ...] = ((32, 32), (28, 4))


GPU = Sizes()
# float32, because the interpreter gets bfloat16 wrong.
SMALL = Sizes(1, 16, torch.float32, (64, 96), 2, 1, 2, 32, 4, 5, ((2, 2), (4, 2)))
DENSE_UP_TO = 25600
STEPS = 5
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


def dense(mask: CompactMask) -> tuple[Tensor, Tensor]:
    """The mask, and the queries without an open key, to which some of SDPA's kernels give a mean of values."""
    opened = mask.dense()[:, None]
    return opened, ~opened.any(-1, keepdim=True)


def sdpa(query: Tensor, key: Tensor, value: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=made[0]).masked_fill(made[1], 0)


def by_calls(query: Tensor, key: Tensor, value: Tensor, made: Any) -> Tensor:
    return varlen.attend_by_calls(query, key, value, made, query.shape[-1] ** -0.5, varlen.torch_varlen)


WAYS = {
    "sdpa, dense mask": Way(lambda ms: [dense(m) for m in ms], added(sdpa), needs_gpu=False, dense=True),
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


def inputs(tokens: int, device: str, sizes: Sizes) -> list[Tensor]:
    shape = (1, sizes.heads, tokens, sizes.head_dim)
    return [torch.randn(shape).to(device, sizes.dtype) for _ in range(3)]


def trained(attention: Callable[..., Tensor], given: list[Tensor], pulled: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, pulled)]


def wrong(device: str, sizes: Sizes) -> list[str]:
    """What differs from the naive reference by more than the dtype's rounding allows, relative to the largest value."""
    layout = (
        lay_out(text(11), video(4, 8, 8), text(61)) if device == "cuda" else lay_out(text(3), video(2, 2, 2), text(9))
    )
    layout, found = layout.to(device), []
    for rule, branches in RULES.items():
        compacts, given = [compact(one, layout) for one in branches], inputs(len(layout), device, sizes)
        pulled = torch.randn_like(given[0])
        exact = trained(
            lambda q, k, v, ms=compacts: naive_masked_attention(q, k, v, ms)[0],
            [x.double() for x in given],
            pulled.double(),
        )
        for name, way in ways(rule, layout, device).items():
            made = way.build(compacts)
            ours = trained(lambda q, k, v, way=way, made=made: way.run(q, k, v, made), given, pulled)
            for part, actual, right in zip(("out", "grad q", "grad k", "grad v"), ours, exact, strict=True):
                error = float((actual.double() - right).abs().max() / right.abs().max())
                if not error <= (2e-2 if device == "cuda" else 1e-5):
                    found.append(f"{name}, {rule}: {part} is off by {error:.1e} of its largest value")
    return found


def waited(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], rounds: int, device: str) -> float:
    """Median GPU time after two rounds that warm up."""
    if device != "cuda":
        return wall_milliseconds(run, rounds, device)
    times = []
    for i in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end)] if i >= 2 else []
    return sorted(times)[len(times) // 2]


def wall_milliseconds(run: Callable[[], Any], rounds: int, device: str) -> float:
    """Median wall time after a round that warms up."""
    times = []
    for _ in range(rounds + 1):
        waited(device)
        start = time.perf_counter()
        run()
        waited(device)
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[1:])[rounds // 2]


def a_video(tokens: int, side: int, first: int = 0) -> TokenLayout:
    """Half text, half frames, which begin later if `first` says so."""
    frames = tokens // 2 // side**2
    before = min(tokens // 16 + first, tokens - frames * side**2)
    return lay_out(text(before), video(frames, side, side), text(tokens - before - frames * side**2))


def open_pairs(branches: list[CompactMask]) -> int:
    """How many there are in all softmaxes, counted without an L x L matrix."""
    rows = range(0, branches[0].query_sample.shape[1], 1024)
    return sum(int(one.rows(slice(first, first + 1024)).dense().sum()) for one in branches for first in rows)


def measured(
    way: Way, rule: str, layouts: list[TokenLayout], given: list[Tensor], useful: float, rounds: int
) -> dict[str, float]:
    """Times, peak memory beside the inputs, and TFLOP/s of the open pairs alone."""
    device, steps = given[0].device.type, iter(layouts * rounds)
    compacts = [compact(one, layouts[0]) for one in RULES[rule]]
    made, pulled = way.build(compacts), torch.randn_like(given[0])
    leaves = [x.detach().requires_grad_() for x in given]

    def forward() -> None:
        with torch.no_grad():
            way.run(*given, made)

    def training() -> None:
        torch.autograd.grad(way.run(*leaves, made), leaves, pulled)

    def a_step() -> None:
        layout = next(steps)
        new = way.build([compact(one, layout) for one in RULES[rule]])
        torch.autograd.grad(way.run(*leaves, new), leaves, pulled)

    found = {"building, ms": wall_milliseconds(lambda: way.build(compacts), STEPS, device)}
    found["forward, ms"] = milliseconds(forward, rounds, device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found["training, ms"] = milliseconds(training, rounds, device)
    if device == "cuda":
        found["peak memory, MB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    found["training, a new layout each step, ms"] = wall_milliseconds(a_step, len(layouts) - 1, device)
    found["forward, useful TFLOP/s"] = useful / found["forward, ms"] / 1e9
    found["training, useful TFLOP/s"] = 3.5 * useful / found["training, ms"] / 1e9
    return found


def attempted(run: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """What was measured, or why not: one way that fails at one length does not take the rest with it."""
    if time.monotonic() > deadline:
        return {"left out": "out of time"}
    try:
        return run()
    except torch.OutOfMemoryError:
        return {"left out": "out of memory"}
    except RuntimeError as error:
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def measure(tokens: int, rules: list[str], device: str, sizes: Sizes, deadline: float) -> dict[str, Any]:
    """rule -> way -> numbers."""
    found: dict[str, Any] = {}
    layouts = [a_video(tokens, sizes.side, 8 * i).to(device) for i in range(STEPS)]
    given = inputs(tokens, device, sizes)
    for rule in rules:
        pairs = open_pairs([compact(one, layouts[0]) for one in RULES[rule]])
        useful, found[rule] = 4.0 * sizes.heads * sizes.head_dim * pairs, {}
        for name, way in ways(rule, layouts[0], device).items():
            run = lambda w=way, r=rule, u=useful: measured(w, r, layouts, given, u, sizes.rounds)  # noqa: E731
            found[rule][name] = attempted(run, deadline)
            print(tokens, rule, name, rounded(found[rule][name]), flush=True)
    return found


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in numbers.items()}


def questions(heads: int, groups: int, device: str, sizes: Sizes) -> dict[str, float]:
    """A layer that reads questions, and then decodes their answers, after one video: its keys once, or in every row."""
    b, p, dim = sizes.questions, sizes.video, sizes.head_dim

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dim).to(device, sizes.dtype)

    once = [drawn(1, groups, p) for _ in range(2)]
    cache = DynamicCache()
    cache.update(*once, 0)
    prefix, found = PrefixCache(cache), {}
    for what, new, own in (("reading", sizes.words, sizes.words), ("decoding", 1, sizes.answer)):
        query, *after = drawn(b, heads, new), drawn(b, groups, own), drawn(b, groups, own)
        whole = [torch.cat([x.expand(b, -1, -1, -1), y], 2) for x, y in zip(once, after)]
        layout = lay_out(text(p + own)).to(device)
        mask = compact(masks.causal(), TokenLayout(layout.data.expand(b, -1, -1))).rows(slice(-new, None))
        opened = mask.dense()[:, None] if new > 1 else None  # an answer's next token sees everything
        fused = SharedMask(*map(flash_mask, prefix.split(mask, "causal")))
        runs = {
            "sdpa, the video in every row": lambda q=query, w=whole, m=opened: F.scaled_dot_product_attention(
                q, *w, attn_mask=m, enable_gqa=heads != groups
            ),
            "sdpa, the video once": lambda q=query, a=after, m=opened: prefix.attend(
                0, q, *a, SharedMask(None, None) if m is None else m, fast_softmax_attention
            ),
            "mmzoo_flash, the video once": lambda q=query, a=after, m=fused: prefix.attend(0, q, *a, m, by_kernel),
        }
        with torch.no_grad():
            right = runs["sdpa, the video in every row"]()
            for name, run in runs.items():
                error = float((run() - right).abs().max() / right.abs().max())
                if not error <= 2e-2:
                    raise RuntimeError(f"{name}, {what}: off by {error:.1e} of the largest value")
                found[f"{what}: {name}, ms"] = milliseconds(run, sizes.rounds, device)
    return found


def by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float | None) -> tuple[Tensor, Tensor]:
    out, lse = masked_attention(query, key, value, mask, scale)
    return out, lse[0]


def draw(results: dict[str, Any], device: str, path: Path) -> None:
    """Training time by length, a panel a rule."""
    rules = list(dict.fromkeys(rule for row in results.values() for rule in row))
    figure = Figure((4 * len(rules), 3.5), layout="constrained")
    for axis, rule in zip(figure.subplots(1, len(rules), sharey=True, squeeze=False)[0], rules, strict=True):
        for name in (*WAYS, "sdpa, is_causal"):
            rows = {int(n): row.get(rule, {}).get(name, {}) for n, row in results.items()}
            points = [(n, numbers["training, ms"]) for n, numbers in rows.items() if "training, ms" in numbers]
            if points:
                axis.loglog(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=rule, xlabel="tokens", ylabel="forward and backward, ms")
        axis.legend(fontsize="small")
    figure.suptitle(device)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write(results: dict[str, Any], device: str, options: argparse.Namespace) -> None:
    if options.json:
        said = {"device": device, "versions": versions(), "date": date.today().isoformat()}
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps({**said, **results}, indent=1) + "\n")
    if options.plot and any(results["lengths"].values()):
        draw(results["lengths"], device, options.plot)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*RULES, "questions"], default=[*RULES, "questions"])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rehearse", action="store_true", help="everything in small, on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    device = "cuda" if torch.cuda.is_available() and not options.rehearse else "cpu"
    sizes = GPU if device == "cuda" else SMALL
    if device == "cpu":
        torch.set_num_threads(1)
    if errors := wrong(device, sizes):
        print("\n".join(errors), file=sys.stderr)
        return 1
    print("Every way that runs here is right.", flush=True)
    if device == "cpu" and not options.rehearse:
        print("Times need a GPU.")
        return 0
    called = device_name(device) if device == "cuda" else "a rehearsal on a CPU, whose times mean nothing"
    results: dict[str, Any] = {"questions": {}, "lengths": {}}
    for heads, groups in sizes.grouped if "questions" in options.only else ():
        name = f"{heads} heads, {groups} of keys"
        run = lambda h=heads, g=groups: questions(h, g, device, sizes)  # noqa: E731
        results["questions"][name] = attempted(run, deadline)
        print(name, rounded(results["questions"][name]), flush=True)
    for tokens in options.lengths or sizes.lengths:
        rules = [rule for rule in RULES if rule in options.only]
        results["lengths"][str(tokens)] = measure(tokens, rules, device, sizes, deadline)
        write(results, called, options)
    rows = [
        *results["questions"].values(),
        *(n for r in results["lengths"].values() for w in r.values() for n in w.values()),
    ]
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
