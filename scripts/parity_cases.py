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
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mmzoo import masks, positions
from mmzoo.attention import allowed
from mmzoo.connectors.perceiver import PerceiverResampler
from mmzoo.language import LanguageModel, MultimodalConfig
from mmzoo.layout import Modality, Role, TokenLayout, batch, image, lay_out, splice, text, video
from mmzoo.masks.ccam import query_layout
from mmzoo.masks.rule import everything, index, not_after, see, visual
from mmzoo.masks.rule import text as text_class
from mmzoo.models.aki import AKI, AKIConfig, aki_image_processor
from mmzoo_training import aki_sft


class Comparison(NamedTuple):
    """One tensor of a case: the largest absolute error, the tolerance (0 = exact), and the verdict."""

    name: str
    max_error: float
    tolerance: float
    passed: bool


class Skipped(Exception):
    """Raised by a runner that lacks what it needs, with the reason."""


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
    return _compare(name, actual.detach().double(), expected.double(), tolerance)


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
    """VisualChat's segment vector [B, L]: 0 padding, 1 text, 2 image."""
    layout = batch([lay_out(text(segments.shape[1]))] * len(segments))
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
        for frames, tokens, queries in case.config.get("mask_cases", []):
            name = f"mask_T{frames}_L{tokens}_N{queries}_{rounding}"
            mask = allowed(rule, query_layout(queries, frames, rounding), lay_out(video(frames, tokens)))[0]
            yield exact(name, mask, case.expected[name])
        for frames, queries in case.config.get("visible_frame_cases", []):
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


def _spliced(case: Case, prefix: str) -> tuple[list[list[int]], TokenLayout]:
    """The expanded ids of each row without padding, and the batch's layout, padded as the ids are."""
    ids, mask = case.inputs[f"{prefix}input_ids"], case.inputs[f"{prefix}attention_mask"].bool()
    config = case.config
    rows = [
        splice(
            row[valid].tolist(),
            [image(config["num_vision_tokens"], grid=False)] * int((row == config["media_token_id"]).sum()),
            place_id=config["media_token_id"],
            answer_marker=config["assistant_token_id"],
            turn_marker=config.get("user_token_id"),
        )
        for row, valid in zip(ids, mask, strict=True)
    ]
    side = "right" if bool(mask[:, 0].all()) else "left"
    length = ids.shape[1] + int((ids == config["media_token_id"]).sum(1).max()) * (config["num_vision_tokens"] - 1)
    return [row for row, _ in rows], batch([layout for _, layout in rows], side, length)


def modality_mutual_masks(case: Case) -> Iterator[Comparison]:
    """aki, mask: from un-expanded ids to the mask; compared on the rows of real tokens."""
    for prefix in case.prefixes("input_ids"):
        _, layout = _spliced(case, prefix)
        mask, valid = allowed(masks.modality_mutual(), layout), layout.valid
        for name in ("mask", "proposed_mask"):
            expected = case.expected.get(f"{prefix}{name}")
            if expected is not None:
                yield exact(f"{prefix}{name}", mask[valid], expected[:, 0][valid])
        if f"{prefix}is_image" in case.expected:
            yield exact(f"{prefix}is_image", layout.visual[valid], case.expected[f"{prefix}is_image"][valid])


def perceiver_resampler(case: Case) -> Iterator[Comparison]:
    """aki, module: the resampler alone."""
    options = case.config["perceiver_resampler"]
    model = PerceiverResampler(**options).eval()
    model.load_state_dict({name.removeprefix("vision_tokenizer."): x for name, x in case.checkpoint.items()})
    seen: dict[str, Tensor] = {}
    for i, (attention, feed) in enumerate(model.layers):
        attention.register_forward_hook(lambda _, __, out, name=f"layers.{i}.attn_out": seen.__setitem__(name, out))
        feed.register_forward_hook(lambda _, __, out, name=f"layers.{i}.ff_out": seen.__setitem__(name, out))
    (features,) = case.inputs.values()
    media = features.shape[:2]
    output = model(features.flatten(0, 1).flatten(1, 2))
    for name, expected in case.expected.items():
        actual = seen[name] if name in seen else output
        yield close(name, actual.unflatten(0, media), expected)


def aki_model(case: Case) -> Iterator[Comparison]:
    """aki, model: from un-expanded ids and pixels to logits, loss and greedy tokens, under MMA and causal."""
    config = case.config
    model = AKI(
        AKIConfig(
            text_config={"model_type": "phi3", **config["lang_config"]},
            vision_config=config["vision_config"],
            num_vision_tokens=config["num_vision_tokens"],
            initial_tokenizer_len=config["initial_tokenizer_len"],
        )
    ).eval()
    model.load_state_dict(case.checkpoint)
    for prefix in case.prefixes("input_ids"):
        ids, layout = _spliced(case, prefix)
        valid = layout.valid
        input_ids = torch.full(valid.shape, config["pad_token_id"])
        input_ids[valid] = torch.tensor([token for row in ids for token in row])
        yield from _aki_scenario(case, prefix, model, input_ids, layout)


def _spliced_labels(case: Case, prefix: str, layout: TokenLayout) -> Tensor:
    """The case's labels with -100 in the places of media, and on padding."""
    given, ids = case.inputs[f"{prefix}labels"], case.inputs[f"{prefix}input_ids"]
    kept = case.inputs[f"{prefix}attention_mask"].bool() & (ids != case.config["media_token_id"])
    labels = torch.full(layout.sample.shape, -100)
    labels[layout.valid & ~layout.visual] = given[kept]
    return labels


def _aki_scenario(case: Case, prefix: str, model: AKI, input_ids: Tensor, layout: TokenLayout) -> Iterator[Comparison]:
    expected = {name.removeprefix(prefix): x for name, x in case.expected.items() if name.startswith(prefix)}
    pixels, valid = case.inputs[f"{prefix}pixel_values"], layout.valid
    yield exact(f"{prefix}mask", allowed(masks.modality_mutual(), layout)[valid], expected["mask"][:, 0][valid])
    yield close(
        f"{prefix}inputs_embeds", model.embed(input_ids, layout, pixels)[valid], expected["inputs_embeds"][valid]
    )
    flat = pixels.flatten(0, 2)
    yield close(f"{prefix}vision_features", model.vision_encoder(flat).last_hidden_state, expected["vision_features"])
    tokens = model.visual_tokens(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
    yield close(f"{prefix}vision_tokens", tokens, expected["vision_tokens"])
    labels = None
    if "expanded_labels" in expected:
        labels = _spliced_labels(case, prefix, layout)
        yield exact(f"{prefix}expanded_labels", labels, expected["expanded_labels"])
    for name, rule in (("mma", masks.modality_mutual()), ("causal", masks.causal())):
        model.rule = rule
        for attention in ("sdpa", "eager"):
            model.set_attention(attention)
            outputs = model(input_ids, layout, pixel_values=pixels, labels=labels)
            logits = expected[f"logits_{name}"]
            yield close(f"{prefix}logits_{name} {attention}", outputs.logits[valid], logits[valid])
            if labels is not None:
                yield close(f"{prefix}loss_{name} {attention}", outputs.loss[None], expected[f"loss_{name}"])
            if f"generated_{name}" in expected:
                steps = expected[f"generated_{name}"].shape[1]
                generated, step_logits = greedy(model, steps, input_ids, layout, pixel_values=pixels)
                yield exact(f"{prefix}generated_{name} {attention}", generated, expected[f"generated_{name}"])
                yield close(f"{prefix}step_logits_{name} {attention}", step_logits, expected[f"step_logits_{name}"])


def aki_pixels(case: Case) -> Iterator[Comparison]:
    """aki, preprocess: image files to pixels, RGB first (and, for the record, upstream's other order)."""
    config = case.config
    side, mean, std = config["n_px"], config["norm_mean"], config["norm_std"]
    processor = aki_image_processor(side, mean, std)
    for name, expected in case.expected.items():
        stem, _, order = name.partition(".pixels_")
        picture = Image.open(case.path / f"{stem}.png")
        if order == "resize_first":
            picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        pixels = processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        yield close(name, pixels, expected, 1e-5)


def aki_text(case: Case) -> Iterator[Comparison]:
    """aki, text: training strings, labels, collation and the learning-rate schedule."""
    given, expected = case.json(case.config["inputs_file"]), case.json(case.config["expected_file"])
    assistant, pad = case.config.get("assistant_token_id", 32001), case.config.get("pad_token_id", 32011)

    def encoded() -> list[dict[str, list[int]]]:
        return [aki_sft.encode(ids, given["encode"]["max_length"], assistant) for ids in given["encode"]["ids"]]

    actual: dict[str, Callable[[], Any]] = {
        "templates": lambda: [aki_sft.sft_text(x["dataset"], x["example"], x["has_image"]) for x in given["templates"]],
        "llava": lambda: [turn for record in given["llava"] for turn in aki_sft.llava_samples(record, "IMAGES")],
        "vsr": lambda: [
            aki_sft.vsr_sample(row, {"train": "TRAIN", "val": "VAL"}, upstream_split=True) for row in given["vsr"]
        ],
        "boxes": lambda: [aki_sft.box(*row) for row in given["boxes"]],
        "encode": encoded,
        "collate": lambda: aki_sft.collate(encoded(), given["encode"]["max_length"] + 1, pad),
    }
    for key in case.config["keys"]:
        if key == "lr_schedule":
            yield close(key, *_relative_rates(given[key], expected[key]), 1e-6)
        else:
            yield same_strings(key, actual[key](), expected[key])


def _relative_rates(schedule: dict[str, Any], expected: list[float]) -> tuple[Tensor, Tensor]:
    sizes = [schedule[name] for name in ("lr", "min_lr", "warmup_steps", "total_steps")]
    rates = [aki_sft.learning_rate(step, *sizes) for step in schedule["steps"]]
    return torch.tensor(rates).double() / sizes[0], torch.tensor(expected).double() / sizes[0]


MASK_KINDS = {
    "mma": masks.modality_mutual(),
    "fbc": masks.frame_block_causal(),
    "modal_sep": masks.Rule(
        "modality-separate",
        (see(visual, visual, not_after(index)), see(text_class, everything, not_after(index))),
    ),
}


def masked_language_model(case: Case) -> Iterator[Comparison]:
    """hf5-masked-lm: a stock backbone under a rule; forward, gradient and generate() on every backend and cache."""
    inputs, expected = case.inputs, case.expected
    config = MultimodalConfig(text_config=dict(case.config["text_config"]))
    model = LanguageModel(config).eval()
    model.model.load_state_dict(case.checkpoint)
    model.rule = MASK_KINDS[case.config["mask_kind"]]
    layout = _language_layout(inputs)
    ids, position_ids, valid = inputs["input_ids"], inputs["position_ids"], inputs["attention_mask_2d"].bool()
    yield exact("allowed", allowed(model.rule, layout)[valid], expected["allowed"][valid])
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        embeds = model.embed(ids, layout).detach().requires_grad_()
        logits = model(inputs_embeds=embeds, layout=layout, position_ids=position_ids).logits
        yield close(f"logits {attention}", logits[valid], expected["logits"][valid])
        torch.nn.functional.cross_entropy(logits[valid], ids[valid]).backward()
        yield close(f"grad_inputs_embeds {attention}", embeds.grad, expected["grad_inputs_embeds"])
        for cache in ("dynamic", "static"):
            tokens, steps = greedy(
                model, case.config["new_tokens"], ids, layout, position_ids=position_ids, cache_implementation=cache
            )
            yield exact(f"generated {attention} {cache}", tokens, expected["generated"])
            yield close(f"step_logits {attention} {cache}", steps, expected["step_logits"])


def _language_layout(inputs: dict[str, Tensor]) -> TokenLayout:
    rows, length = inputs["input_ids"].shape
    layout = batch([lay_out(text(length))] * rows)
    seen = inputs["modality"] == 1
    for name, values in {
        "sample": inputs["segment"],
        "modality": torch.where(seen, Modality.VIDEO, Modality.TEXT),
        "role": torch.where(inputs["is_prompt"] == 1, Role.PROMPT, Role.ANSWER),
        "frame": inputs["frame"],
    }.items():
        layout = layout.field(name, values)
    return layout


def greedy(model: Any, new_tokens: int, ids: Tensor, layout: TokenLayout, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The new tokens [B, N] and the logits [B, N, V] that chose them; end-of-sequence is ignored."""
    outputs = model.generate(
        ids,
        layout,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        **kwargs,
    )
    return outputs.sequences[:, ids.shape[1] :], torch.stack(outputs.logits, 1)


Runner = Callable[[Case], Iterator[Comparison]]
RUNNERS: dict[tuple[str, str, str], Runner] = {
    ("cca-llava", "positions", "masks_positions"): concentric_layouts,
    ("tc-llava", "positions", "masks_positions"): temporal_layouts,
    ("visualchat", "mask", "masks"): two_softmax_masks,
    ("video-ccam-definition", "mask", "mask"): cross_attention_masks,
    ("longlive", "mask", "block_masks"): frame_block_masks,
    ("aki", "mask", "mask"): modality_mutual_masks,
    ("aki", "module", "resampler"): perceiver_resampler,
    ("aki", "model", "model"): aki_model,
    ("aki", "preprocess", "preprocess"): aki_pixels,
    ("aki", "text", "text"): aki_text,
    ("hf5-masked-lm", "model", ""): masked_language_model,
}
"""(system, kind, beginning of the case's name) -> runner."""


def run_case(case: Case) -> list[Comparison] | None:
    """The comparisons of one case; None if no runner knows it."""
    import parity_choice  # which build on this module
    import parity_favor
    import parity_llava
    import parity_open
    import parity_video_ccam
    import parity_visualchat

    runners = dict(RUNNERS)
    for module in (parity_choice, parity_favor, parity_llava, parity_open, parity_video_ccam, parity_visualchat):
        runners |= module.RUNNERS
    for (system, kind, beginning), runner in runners.items():
        if (case.system, case.kind) == (system, kind) and case.name.startswith(beginning):
            return list(runner(case))
    return None
