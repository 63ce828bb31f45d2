"""DeepSpeed-VisualChat's parity cases in terms of mmzoo's public code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from parity_cases import Case, Comparison, _segment_layout, close, exact, greedy, same_strings
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from mmzoo import masks
from mmzoo.attention import allowed, attend
from mmzoo.attention.backends import eager_attention
from mmzoo.attention.transformers import implementation, mask_for
from mmzoo.connectors.visualchat_projections import PerceiverProjection
from mmzoo.encoders.qwen_vit import QwenVisionConfig, QwenVisionTransformer, grid_positions
from mmzoo.language import CACHE
from mmzoo.layout import TokenLayout, batch, image, splice
from mmzoo.models.visualchat import SYSTEM, VisualChat, VisualChatConfig, round_prompt
from mmzoo.processing import IMAGE

UPSTREAM, CLEAN = masks.multimodal_causal(empty="uniform"), masks.multimodal_causal()


def two_softmaxes(case: Case) -> Iterator[Comparison]:
    """mmca-attention, module: both masks, both softmaxes, the output with and without the uniform fallback."""
    inputs, expected, decoding = case.inputs, case.expected, case.config["decode_step"]
    layout = _segment_layout(inputs["token_type"])
    rows = slice(len(layout) - 1, len(layout)) if decoding else slice(None)
    query, key, value = inputs["q"][:, :, rows], inputs["k"], inputs["v"]
    scale, valid, empty = case.config["scale"], layout.valid[:, rows], torch.zeros_like(expected["degenerate_rows"])
    for name, rule in zip(("image", "text"), CLEAN, strict=True):
        mask = allowed(rule, layout, rows=rows)
        yield exact(f"mask_{name}", mask[valid], expected[f"mask_{name}"][valid])
        weights = eager_attention(query, key, value, mask, scale)[1].transpose(1, 2)
        seen = valid & mask.any(-1)
        yield close(f"weights_{name}", weights[seen], expected[f"weights_{name}"].transpose(1, 2)[seen])
        empty |= ~mask.any(-1)
    yield exact("degenerate_rows", empty[valid], expected["degenerate_rows"][valid])
    for attention in ("sdpa", "eager"):
        for name, pair in (("out_upstream", UPSTREAM), ("out_clean", CLEAN)):
            out = attend(query, key, value, pair, layout, rows=rows, attention=attention, scale=scale)
            yield close(f"{name} {attention}", out.transpose(1, 2)[valid], expected[name].transpose(1, 2)[valid])


class _Layer:
    """transformers' LLaMA attention under a pair of rules."""

    def __init__(self, case: Case, attention: str, pair: tuple[masks.Rule, masks.Rule]):
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
        config = LlamaConfig(**{name: case.config[name] for name in names})
        config._attn_implementation = implementation(attention, pair)
        self.attention, self.rotary, self.pair = LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config), pair
        self.attention.load_state_dict(case.checkpoint)

    @torch.no_grad()
    def __call__(self, hidden: Tensor, layout: TokenLayout, cache: DynamicCache) -> tuple[Tensor, Tensor | None]:
        count = hidden.shape[1]
        mask = mask_for(self.pair, layout, count, cache)
        positions = self.rotary(hidden, torch.arange(len(layout))[None, -count:])
        return self.attention(hidden, position_embeddings=positions, attention_mask=mask, **{CACHE: cache})


def attention_layer(case: Case) -> Iterator[Comparison]:
    """visualchat, attention: prefill, cached decode, weights, and the variant without fallback."""
    layout, expected = _segment_layout(case.inputs["segments"]), case.expected
    valid = layout.valid
    for attention in ("sdpa", "eager"):
        layer, cache = _Layer(case, attention, UPSTREAM), DynamicCache()
        output, weights = layer(case.inputs["hidden_states"], layout, cache)
        yield close(f"output {attention}", output[valid], expected["output"][valid])
        if weights is not None:
            recorded = expected["attention_weights"].transpose(1, 2)[valid]
            yield close("attention_weights", weights.transpose(1, 2)[valid], recorded)
        steps = []
        for i, hidden in enumerate(case.inputs["decode_hidden_states"].split(1, 1), 1):
            steps.append(layer(hidden, layout.with_answer(i), cache)[0])
        yield close(f"decode_output {attention}", torch.cat(steps, 1), expected["decode_output"])
        clean = _Layer(case, attention, CLEAN)(case.inputs["hidden_states"], layout, DynamicCache())[0]
        yield close(f"no_fallback_output {attention}", clean[valid], expected["no_fallback_output"][valid])


def qwen_tower(case: Case) -> Iterator[Comparison]:
    """visualchat, qwen_vit: the tower with its pooling attention."""
    config = case.config
    named = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    named |= {"mlp_size": "intermediate_size", "n_queries": "num_queries"}
    model = QwenVisionTransformer(QwenVisionConfig(**{named.get(name, name): x for name, x in config.items()})).eval()
    yield close("attn_pool.pos_embed", model.attn_pool.pos_embed, case.checkpoint["attn_pool.pos_embed"], 1e-6)
    model.load_state_dict(case.checkpoint)
    yield close("output", model(case.inputs["pixel_values"]).last_hidden_state, case.expected["output"])


def perceiver_projection(case: Case) -> Iterator[Comparison]:
    """visualchat, projection_perceiver."""
    config = case.config
    width, queries = config["lang_dim"], config["num_queries"]
    model = PerceiverProjection(config["vision_hidden"], width, queries, width // config["num_heads"]).eval()
    yield close("pos_embed", grid_positions(int(queries**0.5), width), case.checkpoint["pos_embed"], 1e-6)
    model.load_state_dict(case.checkpoint)
    yield close("output", model(case.inputs["vision_features"]), case.expected["output"])


def conversation_strings(case: Case) -> Iterator[Comparison]:
    """visualchat, prompts: every round of every conversation."""
    for i, conversation in enumerate(case.json(case.config["data_file"])):
        seen = 0
        for j, one in enumerate(conversation):
            images, system = [IMAGE] * one["new_images"], "" if j else SYSTEM
            text = round_prompt(one["question"], images, seen=seen, system=system)
            yield same_strings(f"conversation {i}, round {j}", text, one["prompt"])
            seen += one["new_images"]


def _model(case: Case) -> VisualChat:
    config = VisualChatConfig(
        text_config={"model_type": "llama", "tie_word_embeddings": False, **case.config["language"]},
        vision_config={"model_type": "clip_vision_model", **case.config["vision"]},
        projection=case.config["vis_proj"],
        own_prompt_embeddings=True,
        image_order="upstream",
        empty_branch="upstream",
    )
    model = VisualChat(config).eval()
    prefixes = ("vis_encoder.vision_model.", "vis_encoder.")  # transformers' CLIP has lost the first one
    model.load_state_dict({name.replace(*prefixes): tensor for name, tensor in case.checkpoint.items()})
    return model


def _spliced(
    case: Case, model: VisualChat, ids: Tensor, valid: Tensor, multiple: int = 1
) -> tuple[Tensor, TokenLayout]:
    """Ids with image tokens in place and padding on the right, and their layout."""
    place, rows = case.config["image_token_id"], []
    for row, known in zip(ids, valid, strict=True):
        spans = [image(model.config.num_vision_tokens, grid=False)] * int((row == place).sum())
        rows.append(splice(row[known].tolist(), spans, place_id=place))
    longest = max(len(layout) for _, layout in rows)
    layout = batch([layout for _, layout in rows], "right", longest + -longest % multiple)
    spliced = torch.full(layout.sample.shape, case.config["pad_token_id"])
    spliced[layout.valid] = torch.tensor([token for row, _ in rows for token in row])
    return spliced, layout


def _segments(layout: TokenLayout) -> Tensor:
    return torch.where(layout.valid, 1 + layout.visual.int(), 0)


def whole_model(case: Case) -> Iterator[Comparison]:
    """visualchat, model: from un-expanded ids and pixels to logits, loss and greedy tokens."""
    model, inputs = _model(case), case.inputs
    yield from _forward(case, model)
    ids = inputs["gen_input_ids"]
    spliced, layout = _spliced(case, model, ids, torch.ones_like(ids, dtype=torch.bool))
    yield exact("gen_segments", _segments(layout), case.expected["gen_segments"])
    pixels = inputs["gen_pixel_values"][None]
    yield close("gen_inputs_embeds", model.embed(spliced, layout, pixels), case.expected["gen_inputs_embeds"])
    expected = case.expected["generated_ids"]
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        for kind in ("dynamic", "static"):
            options: dict[str, Any] = {"pixel_values": pixels, "cache_implementation": kind}
            tokens, logits = greedy(model, expected.shape[1], spliced, layout, **options)
            yield exact(f"generated_ids {attention} {kind}", tokens, expected)
            yield close(f"generated_logits {attention} {kind}", logits, case.expected["generated_logits"])
    yield from _decoding(case, model, layout)


def _forward(case: Case, model: VisualChat) -> Iterator[Comparison]:
    inputs, expected = case.inputs, case.expected
    known = inputs["attention_mask"].bool()
    spliced, layout = _spliced(case, model, inputs["input_ids"], known, multiple=8)
    valid = layout.valid
    yield exact("segments", _segments(layout), expected["segments"])
    position_ids = expected["position_ids"].expand_as(valid)
    yield exact("position_ids", model.scheme(layout)[valid], position_ids[valid])
    for channel, name in enumerate(("img_mask_state", "txt_mask_state")):
        opened = mask_for(model.rule, layout, len(layout))[:, channel]
        yield exact(name, opened[valid], (expected[name][:, 0] == 0)[valid])
    features = model.patch_features(inputs["pixel_values"])
    yield close("vision_features", features, expected["vision_features"])
    yield close("image_embeds", model.projection(features), expected["image_embeds"])
    images = inputs["pixel_values"].split(inputs["image_num"].tolist())
    pixels = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    yield close("inputs_embeds", model.embed(spliced, layout, pixels), expected["inputs_embeds"])
    labels = torch.full_like(spliced, case.config["label_padding"])
    labels[valid & ~layout.visual] = inputs["labels"][known & (inputs["input_ids"] != case.config["image_token_id"])]
    yield exact("spliced_labels", labels, expected["spliced_labels"])
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        outputs = model(spliced, layout, pixel_values=pixels, labels=labels)
        yield close(f"logits {attention}", outputs.logits[valid], expected["logits"][valid])
        yield close(f"loss {attention}", outputs.loss, expected["loss"])


def _decoding(case: Case, model: VisualChat, layout: TokenLayout) -> Iterator[Comparison]:
    """The masks and positions of the decoding steps."""
    steps = case.expected["decode_position_ids"]
    for i, position in enumerate(steps, 1):
        longer = layout.with_answer(i)
        yield exact(f"decode_position_id_{i}", model.scheme(longer)[:, -1], position[None])
        mask = mask_for(model.rule, longer, 1)
        for channel, name in enumerate(("img", "txt")):
            opened = case.expected[f"decode_{name}_mask_state_{i}"] == 0
            yield exact(f"decode_{name}_mask_{i}", mask[:, channel, None], opened)


RUNNERS = {
    ("mmca-attention", "module", ""): two_softmaxes,
    ("visualchat", "module", "attention"): attention_layer,
    ("visualchat", "module", "qwen_vit"): qwen_tower,
    ("visualchat", "module", "projection_perceiver"): perceiver_projection,
    ("visualchat", "text", "prompts"): conversation_strings,
    ("visualchat", "model", ""): whole_model,
}
