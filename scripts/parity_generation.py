"""Parity cases of ARPG and ARFlow in terms of mmzoo's public code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from parity_cases import Case, Comparison, close, exact

from mmzoo.models.arflow import GateRetention
from mmzoo.models.arpg import ARPG, layouts, rotation

_NAMES = {
    "dim": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_attention_heads",
    "multiple_of": "multiple_of",
    "vocab_size": "vocab_size",
    "num_classes": "num_classes",
}


def _arpg(case: Case) -> ARPG:
    sizes = {ours: case.config[theirs] for theirs, ours in _NAMES.items()}
    model = ARPG(**sizes, side=round(case.config["block_size"] ** 0.5), dropout=0.0, class_dropout=0.0)
    model.load_state_dict(case.checkpoint)
    return model


def arpg_training(case: Case) -> Iterator[Comparison]:
    """arpg, model: the rotations of all places, and logits and loss of a training step."""
    model, inputs, expected = _arpg(case).train(), case.inputs, case.expected
    yield exact("orders", inputs["order_noise"].argsort(1), inputs["orders"])
    raster = torch.arange(model.num_codes)[None]
    class_token, places = (
        rotation(layout, 2 * expected["freqs_cis"].shape[1], model.config.rope_theta)
        for layout in layouts(raster, model.config.side)
    )
    table = [torch.cat([given[0, :1, 0], turned[0, :, 0]]) for given, turned in zip(class_token, places, strict=True)]
    yield close("freqs_cis", torch.stack(table, -1), expected["freqs_cis"], 1e-6)
    given = inputs["input_ids"], inputs["class_ids"], inputs["orders"]
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        yield close(f"logits {attention}", model(*given), expected["logits"])
        yield close(f"loss {attention}", model.loss(*given)[None], expected["loss"])


def arpg_generation(case: Case) -> Iterator[Comparison]:
    """arpg, sampling: what each step reads, its logits, and the codes; with the cache, and all at once without."""
    model, inputs, expected, config = _arpg(case).eval(), case.inputs, case.expected, case.config
    order, classes, counts = inputs["order_noise"].argsort(), inputs["class_ids"], expected["num_pred"]
    yield exact("orders", order, inputs["orders"])
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        options = {name: config[name] for name in ("top_k", "guidance_scale")}
        options |= {"guidance": config["cfg_schedule"], "schedule": config["sample_schedule"]}
        steps = list(model.decode(classes, steps=config["num_iter"], order=order, **options))
        yield exact(f"num_pred {attention}", torch.tensor([len(step.places) for step in steps]), counts)
        for i, step in enumerate(steps):
            yield exact(f"input_ids_step{i} {attention}", step.input_ids, expected[f"input_ids_step{i}"])
            yield close(f"logits_step{i} {attention}", step.logits, expected[f"logits_step{i}"])
        codes = model.generate(classes, steps=config["num_iter"], order=order, **options)
        yield exact(f"tokens {attention}", codes, expected["tokens"])
        labels = torch.cat([classes, torch.full_like(classes, model.config.num_classes)])
        with torch.no_grad():
            at_once = model(codes.repeat(2, 1), labels, order.expand(len(labels), -1), counts.tolist())
        for i, logits in enumerate(at_once.split(counts.tolist(), 1)):
            yield close(f"logits_step{i} {attention}, without a cache", logits, expected[f"logits_step{i}"])


def hybrid_linear_attention(case: Case) -> Iterator[Comparison]:
    """arflow, module: all images at once, and one by one with the state carried."""
    config, inputs, expected = case.config, case.inputs, case.expected
    sizes = [config[name] for name in ("dim", "n_self_heads", "chunk_size", "gate_logit_normalizer", "norm_eps")]
    module = GateRetention(*sizes)
    module.load_state_dict(case.checkpoint)
    out, last = module(inputs["x"], inputs["c"])
    yield close("out", out, expected["out"])
    yield close("last_state", last, expected["last_state"])
    state, outputs = None, []
    for x, c in zip(*(inputs[name].split(config["chunk_size"], 1) for name in ("x", "c")), strict=True):
        out, state = module(x, c, state)
        outputs.append(out)
    yield close("out_incremental", torch.cat(outputs, 1), expected["out_incremental"])
    yield close("last_state, one by one", state, expected["last_state"])


RUNNERS = {
    ("arpg", "model", "training_forward"): arpg_training,
    ("arpg", "sampling", "generate"): arpg_generation,
    ("arflow", "module", "hybrid_linear_attention"): hybrid_linear_attention,
}
