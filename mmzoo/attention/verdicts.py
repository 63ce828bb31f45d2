"""Which backend runs which rule, found out by running it: the table that the documentation publishes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

from mmzoo import masks
from mmzoo.attention.backends import BACKENDS, Backend, Flash, Mask, Rules, attend, missing_package
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import Modality, Role, Span, TokenLayout, batch, image, lay_out, pack, text, video
from mmzoo.masks.ccam import query_layout

SCENARIOS = ("training", "prefill", "decode", "packed", "padded", "GQA")

DIALOGUE = lay_out(text(3), video(2, 3, 3), text(4), text(2, Role.ANSWER), text(2, turn=1), text(1, Role.ANSWER, 1))
PICTURE = lay_out(text(2), image(4, 3), text(3))
FRAMES = lay_out(video(7, 2))
HALVES = lay_out(
    Span(Modality.LATENT, 5, 2, role=Role.PROMPT, grid=False), Span(Modality.LATENT, 5, 2, role=Role.ANSWER, grid=False)
)
SCALES = lay_out(*(Span(Modality.LATENT, rows=side, columns=side) for side in (1, 2, 4)))


@dataclass(frozen=True)
class Example:
    """A rule with layouts that tell it from others.

    Attributes:
        rule: the rule, or the pair of a two-softmax attention.
        queries: one sample.
        keys: one sample; None is self-attention.
        decodes: whether the rule is used for token-by-token decoding.
    """

    rule: Rules
    queries: TokenLayout
    keys: TokenLayout | None = None
    decodes: bool = True


EXAMPLES: dict[str, Callable[[], Example]] = {
    "causal": lambda: Example(masks.causal(), DIALOGUE),
    "bidirectional": lambda: Example(masks.bidirectional(), DIALOGUE, decodes=False),
    "prefix": lambda: Example(masks.prefix(), DIALOGUE),
    "sliding-window": lambda: Example(masks.sliding_window(4), DIALOGUE),
    "modality-mutual": lambda: Example(masks.modality_mutual(), DIALOGUE),
    "concentric-causal": lambda: Example(masks.concentric_causal(), PICTURE),
    "frame-block-causal": lambda: Example(masks.frame_block_causal(), DIALOGUE),
    "full-visual": lambda: Example(masks.full_visual(), DIALOGUE),
    "causal-qformer": lambda: Example(masks.causal_qformer(), lay_out(video(3, 2)), decodes=False),
    "ccam": lambda: Example(masks.causal_cross_attention(), query_layout(6, 4), lay_out(video(4, 3)), decodes=False),
    "mmca": lambda: Example(masks.multimodal_causal(), DIALOGUE),
    "causal-temporal": lambda: Example(masks.causal_temporal(), FRAMES),
    "block-causal": lambda: Example(masks.block_causal(3, window=4), FRAMES),
    "sink-window": lambda: Example(masks.sink_window(5, 2, 2), FRAMES),
    "teacher-forcing": lambda: Example(masks.teacher_forcing(2), HALVES, decodes=False),
    "scale-causal": lambda: Example(masks.scale_causal(), SCALES, decodes=False),
}
"""One for every name in `mmzoo.masks.RULES`."""


@dataclass(frozen=True)
class Verdict:
    """One cell.

    Attributes:
        kind: "equal" (outputs, and gradients in training, ran here), "contents equal" (what the backend would be handed
            against the dense mask, where it cannot run), "refused", "not applicable" or "WRONG".
        detail: the largest error, or the reason.
    """

    kind: str
    detail: str = ""


def verdict(rule: str, attention: str, scenario: str, device: torch.device | str = "cpu") -> Verdict:
    """Runs a rule on a backend, beside eager attention in float64.

    Args:
        rule: a name in `mmzoo.masks.RULES`.
        attention: a backend's name.
        scenario: one of `SCENARIOS`.
        device: where.
    """
    example = EXAMPLES[rule]()
    if scenario == "decode" and not example.decodes:
        return Verdict("not applicable")
    queries, keys, rows = _arranged(example, scenario)
    rules = example.rule if isinstance(example.rule, tuple) else (example.rule,)
    backend = BACKENDS[attention]
    refusals = [reason for one in rules if (reason := backend.refuses(one, torch.device(device)))]
    if refusals and any(backend.refuses(one, torch.device("cuda")) for one in rules):
        return Verdict("refused", refusals[0])
    if missing := missing_package(attention):
        return Verdict("refused", f"the package {missing} is not installed")
    if refusals:
        return _contents(backend, rules, queries, queries if keys is None else keys, rows)
    try:
        error = _error(example, queries, keys, rows, scenario, attention, device)
    except UnsupportedMask as refusal:  # of the rule on this layout
        return Verdict("refused", refusal.reason)
    return Verdict("equal" if error < tolerance(attention) else "WRONG", f"{error:.0e}")


def tolerance(attention: str) -> float:
    """How far outputs and gradients may be from eager attention in float64: flash kernels take half precision only."""
    return 1e-2 if isinstance(BACKENDS[attention], Flash) else 1e-4


def _error(
    example: Example,
    queries: TokenLayout,
    keys: TokenLayout | None,
    rows: slice,
    scenario: str,
    attention: str,
    device: torch.device | str,
) -> float:
    """The largest difference of outputs, and of gradients in training."""
    generator, groups = torch.Generator().manual_seed(0), 1 if scenario == "GQA" else 4
    b, k = (keys or queries).data.shape[:2]
    half = isinstance(BACKENDS[attention], Flash)
    shapes = [(b, 4, len(queries[rows]), 16), (b, groups, k, 16), (b, groups, k, 16)]
    inputs = [torch.randn(shape, generator=generator).to(torch.float16 if half else torch.float32) for shape in shapes]
    queries, keys = queries.to(device), None if keys is None else keys.to(device)

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = query, key, value = [
            x.to(device, dtype, copy=True).requires_grad_(scenario == "training") for x in inputs
        ]
        output = attend(query, key, value, example.rule, queries, keys, rows=rows, attention=name)
        if scenario == "training":
            (output * torch.linspace(-1, 1, output.shape[-1], dtype=dtype, device=device)).sum().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    pairs = zip(run(attention, inputs[0].dtype), run("eager", torch.float64), strict=True)
    return max(float((ours - exact).abs().max()) for ours, exact in pairs)


def _arranged(example: Example, scenario: str) -> tuple[TokenLayout, TokenLayout | None, slice]:
    """Layouts of the scenario, and which rows are asked."""

    def arranged(layout: TokenLayout) -> TokenLayout:
        if scenario == "training":  # more than a tile, and a row of padding
            return batch([pack([layout] * (320 // len(example.queries))), layout])
        if scenario == "packed":
            return pack([layout, layout])
        if scenario == "padded":
            return batch([layout, layout[: max(1, len(layout) - 3)]], "left")
        return layout

    rows = slice(len(example.queries) - 1, len(example.queries)) if scenario == "decode" else slice(None)
    return arranged(example.queries), None if example.keys is None else arranged(example.keys), rows


def _contents(
    backend: Backend, rules: tuple[masks.Rule, ...], queries: TokenLayout, keys: TokenLayout, rows: slice
) -> Verdict:
    """What the backend would be handed against the dense mask, pair by pair."""
    for rule in rules:
        mask = Mask(rule, queries, keys, rows)
        try:
            if not torch.equal(backend.pairs(mask), mask.dense()):
                return Verdict("WRONG", "it is handed another mask")
        except UnsupportedMask as error:  # the rule, on this layout
            return Verdict("refused", error.reason)
    return Verdict("contents equal")


def cell(rule: str, attention: str, device: torch.device | str = "cpu") -> str:
    """One cell of the published table."""
    return summary({scenario: verdict(rule, attention, scenario, device).kind for scenario in SCENARIOS})


def summary(kinds: dict[str, str]) -> str:
    """The kind of all scenarios that apply, or the scenarios of each kind."""
    by_kind: dict[str, list[str]] = {}
    for scenario, kind in kinds.items():
        by_kind.setdefault(kind, []).append(scenario)
    by_kind.pop("not applicable", None)
    if len(by_kind) == 1:
        return next(iter(by_kind))
    return "; ".join(f"{kind}: {', '.join(scenarios)}" for kind, scenarios in by_kind.items())


def reasons(device: torch.device | str = "cpu") -> list[str]:
    """What is refused there and why, a line for each backend and reason."""
    lines = []
    for name in BACKENDS:
        refusing: dict[str, dict[str, None]] = {}
        for rule in EXAMPLES:
            for one in (verdict(rule, name, scenario, device) for scenario in SCENARIOS):
                if one.kind == "refused":
                    refusing.setdefault(one.detail, {})[f"`{rule}`"] = None
        most = max(refusing, key=lambda reason: len(refusing[reason]), default="")
        for reason, rules in refusing.items():
            others = "every rule" if len(rules) == len(EXAMPLES) else "the other rules"
            lines.append(f"`{name}`, {others if reason == most and len(rules) > 5 else ', '.join(rules)}: {reason}")
    return lines


def versions() -> dict[str, str]:
    """Package -> version of what decides these verdicts and is installed."""
    found = {}
    packages = ("torch", "transformers", "triton", "flash-attn", "av", "decord", "timm", "open-clip-torch", "lightning")
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device | str) -> str:
    """What a person calls the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"
