"""Parity cases of LLaVA under other rules: CCA-LLaVA and TC-LLaVA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from parity_cases import Case, Comparison, Runner, close, exact, greedy, same_strings
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from mmzoo import masks, positions
from mmzoo.attention import allowed
from mmzoo.attention.transformers import implementation, mask_for
from mmzoo.layout import Span, TokenLayout, batch, image, lay_out, splice, text, video
from mmzoo.masks import Rule
from mmzoo.models.cca_llava import CCALlava, CCALlavaConfig
from mmzoo.models.llava import SYSTEMS, TINY, Llava, caption, conversation, renamed
from mmzoo.models.tc_llava import TCLlava, TCLlavaConfig
from mmzoo.positions import Scheme

BACKENDS = ("sdpa", "eager")


def _attention_layer(
    case: Case, layout: TokenLayout, rule: Rule, scheme: Scheme, attention: str
) -> tuple[Tensor, Tensor | None]:
    """Output [1, L, D] and, if the backend gives them, weights [1, H, L, L] of LLaMA's self-attention."""
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "rope_theta")
    config = LlamaConfig(**{name: case.config[name] for name in sizes})
    config._attn_implementation = implementation(attention, rule)
    layer = LlamaAttention(config, 0).eval()
    layer.load_state_dict(case.checkpoint)
    hidden = case.inputs["hidden_states"]
    rotary = LlamaRotaryEmbedding(config)(hidden, scheme(layout))
    return layer(hidden, position_embeddings=rotary, attention_mask=mask_for(rule, layout, len(layout)))


def concentric_attention(case: Case) -> Iterator[Comparison]:
    """cca-llava, module: one self-attention layer."""
    config, rule, scheme = case.config, masks.concentric_causal(), positions.concentric
    layout = lay_out(text(config["text_before"]), image(*config["grid"]), text(config["text_after"]))
    yield exact("position_ids", scheme(layout), case.expected["position_ids"])
    yield exact("attention_allow", allowed(rule, layout)[:, None], case.expected["attention_allow"])
    for attention in BACKENDS:
        output, weights = _attention_layer(case, layout, rule, scheme, attention)
        yield close(f"output {attention}", output, case.expected["output"])
        if weights is not None and "attention_weights" in case.expected:
            yield close(f"attention_weights {attention}", weights, case.expected["attention_weights"])


def concentric_model(case: Case) -> Iterator[Comparison]:
    """cca-llava, model: from released names, un-expanded ids and pixels to logits and greedy tokens."""
    model = CCALlava(
        CCALlavaConfig(
            text_config={"model_type": "llama", **case.config["text"]},
            vision_config={"model_type": "clip_vision_model", **case.config["vision"]},
            vision_layer=case.config["mm_vision_select_layer"],
        )
    ).eval()
    model.load_state_dict(renamed(case.checkpoint, case.tensors("vision_tower")))
    ids, layout = _spliced(case, image(*case.config["grid"]))
    pixels = case.inputs["pixel_values"][:, None]
    for attention in BACKENDS:
        model.set_attention(attention)
        outputs = model(ids, layout, pixels, output_hidden_states=True)
        for row, valid in enumerate(layout.valid):
            name = "logits" if "logits" in case.expected else f"logits_sample{row}"
            yield close(f"{name} {attention}", outputs.logits[row : row + 1, valid], case.expected[name])
        for number, hidden in enumerate(outputs.hidden_states):
            if f"hidden_{number}" in case.expected:
                yield close(f"hidden_{number} {attention}", hidden, case.expected[f"hidden_{number}"])
        if "generated_ids" in case.expected:
            yield from _decoded(case, model, attention, "decode_position_ids", ids, layout, pixel_values=pixels)
    if "clip_features" in case.expected:
        yield from _concentric_parts(case, model, ids, layout, pixels)
        yield from _text_only(case, model)


def _concentric_parts(
    case: Case, model: Llava, ids: Tensor, layout: TokenLayout, pixels: Tensor
) -> Iterator[Comparison]:
    yield close("clip_features", model.patch_features(pixels[0]), case.expected["clip_features"])
    yield close("image_features", model.visual_tokens(pixels[0]), case.expected["image_features"])
    yield close("inputs_embeds", model.embed(ids, layout, pixels), case.expected["inputs_embeds"])
    yield exact("position_ids", model.scheme(layout), case.expected["position_ids"])
    yield exact("attention_allow", allowed(model.rule, layout)[:, None], case.expected["attention_allow"])


def _text_only(case: Case, model: Llava) -> Iterator[Comparison]:
    ids = case.inputs["text_only_input_ids"]
    layout = lay_out(text(ids.shape[1]))
    yield exact("text_only_position_ids", model.scheme(layout), case.expected["text_only_position_ids"])
    yield close("text_only_logits", model(ids).logits, case.expected["text_only_logits"])
    tokens, _ = greedy(model, case.expected["text_only_generated_ids"].shape[1], ids, layout)
    yield exact("text_only_generated_ids", tokens, case.expected["text_only_generated_ids"])


def _spliced(case: Case, medium: Span) -> tuple[Tensor, TokenLayout]:
    """Ids [B, L] with media in place, 0 there and on padding, and the layout, padded on the right."""
    given, place = case.inputs["input_ids"], case.config["image_token_index"]
    real = case.inputs.get("attention_mask", torch.ones_like(given)).bool()
    rows = [
        splice(row[valid].tolist(), [medium] * int((row == place).sum()), place_id=place)
        for row, valid in zip(given, real, strict=True)
    ]
    layout = batch([one for _, one in rows])
    ids = torch.zeros_like(layout.sample, dtype=torch.long)
    ids[layout.valid] = torch.tensor([token for row, _ in rows for token in row])
    return ids.masked_fill(layout.visual, 0), layout


def _decoded(
    case: Case, model: Any, attention: str, fed: str, ids: Tensor, layout: TokenLayout, **media: Tensor
) -> Iterator[Comparison]:
    """Greedy tokens, the logits that chose them, and the positions that decoding steps were fed."""
    seen: list[Tensor] = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["position_ids"]), with_kwargs=True
    )
    tokens, logits = greedy(model, case.expected["generated_ids"].shape[1], ids, layout, **media)
    hook.remove()
    yield exact(f"generated_ids {attention}", tokens, case.expected["generated_ids"])
    yield close(f"generated_logits {attention}", logits, case.expected["generated_logits"])
    yield exact(f"{fed} {attention}", torch.cat(seen[1:], 1)[0], case.expected[fed])


def llava_prompts(case: Case) -> Iterator[Comparison]:
    """cca-llava, text: the exact strings of conversations and captions."""
    for number, one in enumerate(case.json(case.config["data_file"])):
        turns = list(zip(one["turns"][::2], one["turns"][1::2], strict=True))
        if one["template"] == "plain":
            ((media, said),) = turns
            prompt = caption(said, media)
        else:
            prompt = conversation(turns, SYSTEMS[one["template"]])
        yield same_strings(f"{number} {one['template']}", prompt, one["prompt"])


TEMPORAL_RULES = {
    "causal": masks.causal(),
    "full_visual": masks.full_visual(),
    "frame_block": masks.frame_block_causal(),
}
_VARIANT = re.compile(
    r"(?:output|logits)_(?:gamma(?P<gamma>[\d.]+)|alpha(?P<alpha>[\d.]+)_beta(?P<beta>[\d.]+))_(?P<mask>\w+)"
)


def _variants(case: Case) -> Iterator[tuple[str, Rule, Scheme]]:
    """The names of expected outputs with the rule and scheme that they name."""
    for match in filter(None, map(_VARIANT.fullmatch, case.expected)):
        alpha, beta = float(match["alpha"] or 1), float(match["gamma"] or match["beta"])
        yield match[0], TEMPORAL_RULES[match["mask"]], positions.temporal_dual(alpha, beta)


def temporal_attention(case: Case) -> Iterator[Comparison]:
    """tc-llava, module: one self-attention layer under three masks and several positions."""
    layout = lay_out(*(text(part[1]) if part[0] == "t" else video(part[1], part[2]) for part in case.config["layout"]))
    for name, rule, scheme in _variants(case):
        for attention in BACKENDS:
            output, _ = _attention_layer(case, layout, rule, scheme, attention)
            yield close(f"{name} {attention}", output, case.expected[name])


def temporal_language_model(case: Case) -> Iterator[Comparison]:
    """tc-llava, model: from un-expanded ids and projected visual tokens to logits and greedy tokens."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*sizes, "num_key_value_heads", "rms_norm_eps")
    text_config = {"model_type": "llama", **{name: case.config[name] for name in names}}
    model = TCLlava(TCLlavaConfig(text_config=text_config, vision_config=TINY["vision_config"])).eval()
    model.lang_model.load_state_dict(case.checkpoint)
    tokens = case.inputs["visual_embeds0"]
    frames, per_frame = tokens.shape[:2]
    model.visual_tokens = lambda pixel_values: tokens  # the case starts behind tower and projector
    pixels = torch.zeros(1, frames, 1)
    ids, layout = _spliced(case, video(frames, per_frame))
    yield close("inputs_embeds", model.embed(ids, layout, pixels), case.expected["inputs_embeds"])
    yield exact("temporal_position", positions.temporal_position(layout), case.expected["temporal_position"])
    own = model.rule, model.scheme
    for attention in BACKENDS:
        model.set_attention(attention)
        for name, model.rule, model.scheme in _variants(case):
            yield close(f"{name} {attention}", model(ids, layout, pixels).logits, case.expected[name])
        model.rule, model.scheme = own
        yield from _layer_outputs(case, model, attention, ids, layout, pixels)
        yield from _decoded(case, model, attention, "decode_rope_position", ids, layout, pixel_values=pixels)


def _layer_outputs(
    case: Case, model: Llava, attention: str, ids: Tensor, layout: TokenLayout, pixels: Tensor
) -> Iterator[Comparison]:
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in model.get_decoder().layers
    ]
    model(ids, layout, pixels)
    for hook in hooks:
        hook.remove()
    for number, output in enumerate(seen):
        name = f"layer_output_{number}"
        yield close(f"{name} {attention}", output, case.expected[name])


RUNNERS: dict[tuple[str, str, str], Runner] = {
    ("cca-llava", "module", "attention"): concentric_attention,
    ("cca-llava", "model", ""): concentric_model,
    ("cca-llava", "text", "prompts"): llava_prompts,
    ("tc-llava", "module", "attention"): temporal_attention,
    ("tc-llava", "model", ""): temporal_language_model,
}
"""As `parity_cases.RUNNERS`."""
