"""What each kind of parity case means, in terms of mmzoo's public code.

A runner takes a case and yields comparisons. It treats the case as data: sizes, seeds, paddings, prefixes and numeric
suffixes of tensor names come from the case's own files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmzoo import masks, positions
from mmzoo.attention import allowed
from mmzoo.layout import Modality, Role, TokenLayout, image, lay_out, text, video
from mmzoo.masks.ccam import query_layout


class Comparison(NamedTuple):
    """One tensor of a case: the largest absolute error, the tolerance (0 = exact), and the verdict."""

    name: str
    max_error: float
    tolerance: float
    passed: bool


class Case:
    """A folder `<system>/<case>/`."""

    def __init__(self, path: Path):
        self.path, self.system, self.name = path, path.parent.name, path.name
        described = json.loads((path / "config.json").read_text())
        self.kind: str = described.get("kind", "")
        self.config: dict[str, Any] = described.get("config", {})

    def tensors(self, name: str) -> dict[str, Tensor]:
        path = self.path / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self.tensors("inputs")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return self.tensors("expected")

    @cached_property
    def checkpoint(self) -> dict[str, Tensor]:
        return self.tensors("checkpoint")

    def prefixes(self, tensor: str) -> list[str]:
        """The scenario prefixes "x." of every input "x.<tensor>"."""
        return [name.removesuffix(tensor) for name in self.inputs if name.endswith(f".{tensor}") or name == tensor]


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> Comparison:
    """Within atol = rtol = tolerance."""
    return _compare(name, actual.double(), expected.double(), tolerance)


def exact(name: str, actual: Tensor, expected: Tensor) -> Comparison:
    """Equal: masks, ids, greedy tokens."""
    return _compare(name, actual.double(), expected.double(), 0.0)


def same_strings(name: str, actual: Any, expected: Any) -> Comparison:
    """Equal JSON values."""
    return Comparison(name, 0.0 if actual == expected else 1.0, 0.0, actual == expected)


def _compare(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> Comparison:
    if actual.shape != expected.shape:
        return Comparison(
            f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}", float("inf"), tolerance, False
        )
    error = (actual - expected).abs()
    passed = bool((error <= tolerance + tolerance * expected.abs()).all())
    return Comparison(name, float(error.max()) if error.numel() else 0.0, tolerance, passed)


def _numbered(names: dict[str, Tensor], stem: str) -> list[int]:
    found = (re.fullmatch(rf"{stem}(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def concentric_layouts(case: Case) -> Iterator[Comparison]:
    """cca-llava, positions: rings, position ids and the mask that belongs to them."""
    for described in case.config["layouts"]:
        name, (rows, columns) = described["name"], described["grid"]
        layout = lay_out(text(described["text_before"]), image(rows, columns), text(described["text_after"]))
        yield exact(f"{name}_position_ids", positions.concentric(layout), case.expected[f"{name}_position_ids"])
        mask = allowed(masks.concentric_causal(), layout)[:, None]
        yield exact(f"{name}_attention_allow", mask, case.expected[f"{name}_attention_allow"])
    for name, expected in case.expected.items():
        size = re.search(r"rings(?:_\d+x\d+)?$", name)
        if size:
            yield exact(name, _ring_table(*expected.shape), expected)


def _ring_table(rows: int, columns: int) -> Tensor:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return positions.rings(row, column, torch.full_like(row, rows), torch.full_like(row, columns))


def temporal_layouts(case: Case) -> Iterator[Comparison]:
    """tc-llava, positions: three masks, both position parts, their sum, and the first decoded position."""
    rules = {
        "causal": masks.causal(),
        "full_visual": masks.full_visual(),
        "frame_block_causal": masks.frame_block_causal(),
    }
    for k, described in enumerate(case.config["layouts"]):
        spans = [text(part[1]) if part[0] == "t" else video(part[1], part[2]) for part in described]
        layout = lay_out(*spans)
        for name, rule in rules.items():
            yield exact(f"{name}{k}", allowed(rule, layout)[:, None], case.expected[f"{name}{k}"])
        sequential, temporal = positions.sequential_position(layout), positions.temporal_position(layout)
        yield exact(f"global_position{k}", sequential, case.expected[f"global_position{k}"])
        yield exact(f"temporal_position{k}", temporal, case.expected[f"temporal_position{k}"])
        for name, expected in case.expected.items():
            if name.startswith(f"rope_position{k}_gamma"):
                scheme = positions.temporal_dual(beta=float(name.partition("gamma")[2]))
                yield close(name, scheme(layout), expected)
        longer = layout.with_answer()
        following = torch.stack(
            [positions.sequential_position(longer)[0, -1], positions.temporal_position(longer)[0, -1]]
        )
        yield exact(f"next_token_position{k}", following, case.expected[f"next_token_position{k}"])


def _segment_layout(segments: Tensor) -> TokenLayout:
    """VisualChat's segment vector [1, L]: 0 padding, 1 text, 2 image."""
    layout = lay_out(text(segments.shape[1]))
    layout = layout.field("modality", torch.where(segments == 2, Modality.IMAGE, Modality.TEXT))
    return layout.field("sample", torch.where(segments == 0, -1, 0))


def two_softmax_masks(case: Case) -> Iterator[Comparison]:
    """visualchat, mask: state 0 = open; in a row without any, upstream takes the mean over state 1."""
    for stem, last_only in (("segments", False), ("decode_segments", True)):
        for k in _numbered(case.inputs, stem):
            layout = _segment_layout(case.inputs[f"{stem}{k}"])
            rows = slice(len(layout) - 1, len(layout)) if last_only else slice(None)
            prefix = "decode_" if last_only else ""
            for name, rule in zip(("img", "txt"), masks.multimodal_causal(empty="uniform"), strict=True):
                state = case.expected[f"{prefix}{name}_mask_state{k}"][:, 0]
                valid = layout.valid[:, rows]
                opened = allowed(rule, layout, rows=rows)
                yield exact(f"{prefix}{name}_mask{k}", opened[valid], (state == 0)[valid])
                assert rule.fallback is not None
                empty = valid & ~opened.any(-1)
                fallback = allowed(rule.fallback, layout, rows=rows)
                known = layout.valid[:, None].expand_as(fallback)[empty]
                yield exact(f"{prefix}{name}_fallback{k}", fallback[empty] & known, (state == 1)[empty] & known)


def cross_attention_masks(case: Case) -> Iterator[Comparison]:
    """video-ccam-definition, mask: query to frame, under the three roundings."""
    rule = masks.causal_cross_attention()
    for rounding in case.config["rules"]:
        for frames, tokens, queries in case.config["mask_cases"]:
            name = f"mask_T{frames}_L{tokens}_N{queries}_{rounding}"
            mask = allowed(rule, query_layout(queries, frames, rounding), lay_out(video(frames, tokens)))[0]
            yield exact(name, mask, case.expected[name])
        for frames, queries in case.config["visible_frame_cases"]:
            name = f"visible_frames_T{frames}_N{queries}_{rounding}"
            mask = allowed(rule, query_layout(queries, frames, rounding), lay_out(video(frames, 1)))[0]
            yield exact(name, mask.sum(-1), case.expected[name])


def frame_block_masks(case: Case) -> Iterator[Comparison]:
    """longlive, mask: the training masks over latent frames."""
    for described in case.config["masks"]:
        frames, tokens, block = described["num_frames"], described["frame_seqlen"], described["num_frame_per_block"]
        window = None if described["local_attn_size"] == -1 else described["local_attn_size"]
        clip = lay_out(video(frames, tokens))
        if described["type"] == "teacher_forcing":
            noisy = clip.field("role", torch.full_like(clip.role, Role.ANSWER))
            layout = TokenLayout(torch.cat([clip.data, noisy.data], 1))
            layout = layout.field("index", torch.arange(len(layout))[None])
            rule = masks.teacher_forcing(block)
        else:
            layout = clip
            rule = masks.block_causal(block, window=window, first_frame_alone=described["type"] == "i2v")
        yield exact(described["name"], allowed(rule, layout)[0], case.expected[described["name"]])


Runner = Callable[[Case], Iterator[Comparison]]
RUNNERS: dict[tuple[str, str, str], Runner] = {
    ("cca-llava", "positions", "masks_positions"): concentric_layouts,
    ("tc-llava", "positions", "masks_positions"): temporal_layouts,
    ("visualchat", "mask", "masks"): two_softmax_masks,
    ("video-ccam-definition", "mask", "mask"): cross_attention_masks,
    ("longlive", "mask", "block_masks"): frame_block_masks,
}
"""(system, kind, beginning of the case's name) -> runner."""


def run_case(case: Case) -> list[Comparison] | None:
    """The comparisons of one case; None if no runner knows it."""
    for (system, kind, beginning), runner in RUNNERS.items():
        if (case.system, case.kind) == (system, kind) and case.name.startswith(beginning):
            return list(runner(case))
    return None
