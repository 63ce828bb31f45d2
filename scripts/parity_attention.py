"""The parity cases of attention algorithms in terms of mmzoo_kernels' public code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from parity_cases import Case, Comparison, close, exact
from torch import Tensor

from mmzoo_kernels.core_context import core_context_attention, core_context_mask, core_tokens
from mmzoo_kernels.higher_order import second_order_attention
from mmzoo_kernels.lightning import lightning_attention
from mmzoo_kernels.low_rank_bias import low_rank_bias_attention
from mmzoo_kernels.mosa import DenseHeads, HybridMoSA, MoSA
from mmzoo_kernels.relay import prefix_attention, relay_attention
from mmzoo_kernels.softmax import softmax_attention
from mmzoo_kernels.sparse import drop_attention, group_mask, hash_attention, hash_buckets


def _gradients(case: Case, names: list[str], run: Callable[..., Tensor], tolerance: float) -> Iterator[Comparison]:
    """`out` and the gradients of `(out * grad_out).sum()`, from the inputs of those names."""
    inputs = [case.inputs[name].clone().requires_grad_() for name in names]
    out = run(*inputs)
    yield close("out", out, case.expected["out"], tolerance)
    for name, gradient in zip(names, torch.autograd.grad((out * case.inputs["grad_out"]).sum(), inputs), strict=True):
        yield close(f"grad_{name}", gradient, case.expected[f"grad_{name}"], tolerance)


def _heads_first(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For cases whose tensors are (batch, tokens, heads, ...)."""
    return lambda *tensors: run(*(tensor.transpose(1, 2) for tensor in tensors)).transpose(1, 2)


def lightning(case: Case) -> Iterator[Comparison]:
    """lightning-attention: outputs, gradients and the state, whole and in two parts."""
    inputs, expected, cut = case.inputs, case.expected, case.config["split_for_state_test"]
    slopes, parts = inputs["slopes"], [inputs[name] for name in "qkv"]
    yield from _gradients(case, [*"qkv"], lambda q, k, v: lightning_attention(q, k, v, slopes)[0], 1e-5)
    first, state = lightning_attention(*(x[:, :, :cut] for x in parts), slopes)
    second, state = lightning_attention(*(x[:, :, cut:] for x in parts), slopes, state)
    yield close("out in two parts", torch.cat([first, second], 2), expected["out"], 1e-5)
    yield close("final_state", state, expected["final_state"], 1e-5)


def higher_order(case: Case) -> Iterator[Comparison]:
    """hla2: outputs and gradients relative to the largest output, which grows with the length, and the state."""
    config, expected, scale = case.config, case.expected, float(case.expected["out"].abs().max())
    options = {name: config[name] for name in ("gamma", "ridge", "normalize", "eps")}
    for chunk in (1, 16):
        inputs = [case.inputs[name].clone().requires_grad_() for name in "qkv"]
        out, state = second_order_attention(*inputs, **options, chunk=chunk)
        yield _relative(f"out in chunks of {chunk}", out, expected["out"], scale)
        gradients = torch.autograd.grad((out * case.inputs["grad_out"]).sum(), inputs)
        for name, gradient in zip("qkv", gradients, strict=True):
            recorded = expected[f"grad_{name}"]
            yield _relative(f"grad_{name} in chunks of {chunk}", gradient, recorded, float(recorded.abs().max()))
        (c, m), (g, h) = (part.tensor_split([-1], -1) for part in (state.C, state.G))
        for name, part in {"S": state.S, "C": c, "G": g, "m": m[..., 0], "h": h[..., 0]}.items():
            recorded = expected[f"state_{name}"]
            yield _relative(f"state_{name} in chunks of {chunk}", part, recorded, float(recorded.abs().max()))


def _relative(name: str, actual: Tensor, expected: Tensor, scale: float) -> Comparison:
    return close(f"{name} / {scale:.3g}", actual / scale, expected / scale, 1e-4)


def core_context(case: Case) -> Iterator[Comparison]:
    """core-context-attention: who is seen, the core tokens, outputs and gradients."""
    config, expected = case.config, case.expected
    options = {"group": config["group_size"], "window": config["window_size"]}
    yield exact("allowed", core_context_mask(config["seq"], **options), expected["allowed"])
    query = case.inputs["q"]
    raw = (case.inputs[name].repeat_interleave(config["heads"] // config["kv_heads"], 1) for name in "kv")
    for name, core in zip("kv", core_tokens(query, *raw, **options, pooling=config["pooling"]), strict=True):
        yield close(f"core_{name}", core, expected[f"core_{name}"])
    run = lambda q, k, v: core_context_attention(q, k, v, **options, pooling=config["pooling"])  # noqa: E731
    yield from _gradients(case, [*"qkv"], run, 1e-4)


def low_rank_bias(case: Case) -> Iterator[Comparison]:
    """flashbias: outputs and all gradients."""
    causal, scale = case.config["causal"], case.config["softmax_scale"]
    biases = (case.inputs[f"{name}_bias"].transpose(1, 2) for name in "qk")
    yield close("bias_dense", next(biases) @ next(biases).mT, case.expected["bias_dense"])

    def run(*tensors: Tensor) -> Tensor:
        return low_rank_bias_attention(*tensors, causal=causal, scale=scale)

    yield from _gradients(case, ["q", "k", "v", "q_bias", "k_bias"], _heads_first(run), 1e-4)


def dropped(case: Case) -> Iterator[Comparison]:
    """qk-sparse: who is seen, outputs and gradients."""
    keep = [case.inputs[f"keep_{name}"].transpose(1, 2) for name in "qk"]
    groups = (torch.where(one, 0, -1).flatten(0, 1) for one in keep)
    allowed = group_mask(*groups, 0).dense().unflatten(0, keep[0].shape[:2])
    yield exact("allowed", allowed, case.expected["allowed"])

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key = F.normalize(key, dim=-1) if case.config["l2_normalize_keys"] else key
        return drop_attention(query, key, value, *keep)

    yield from _gradients(case, [*"qkv"], _heads_first(run), 1e-4)


def hashed(case: Case) -> Iterator[Comparison]:
    """hash-sparse: buckets, who is seen, outputs and gradients."""
    projection, buckets = case.inputs["rand_matrix"], []
    for name in "qk":
        buckets.append(hash_buckets(case.inputs[name], projection))
        yield exact(f"hash_{name}", buckets[-1], case.expected[f"hash_{name}"])
    allowed = group_mask(*(one.flatten(0, 1) for one in buckets), 1).dense().unflatten(0, buckets[0].shape[:2])
    yield exact("allowed", allowed, case.expected["allowed"])
    yield from _gradients(case, [*"qkv"], lambda q, k, v: hash_attention(q, k, v, projection), 1e-4)


def mosa(case: Case) -> Iterator[Comparison]:
    """mosa: the chosen tokens as sets, output and gradient, from the authors' parameter names."""
    config, rotated = case.config, {"rotate_fraction": case.config["rotate_fraction"]}
    sparse = MoSA(
        *(config[name] for name in ("hidden", "head_hidden", "mosa_heads", "sparsity")),
        include_first=bool(config["include_first"]),
        **rotated,
    )
    model: torch.nn.Module = sparse
    if config["kind"] == "hybrid":
        dense = DenseHeads(*(config[name] for name in ("hidden", "head_hidden", "dense_heads")), **rotated)
        model = HybridMoSA(sparse, dense)
    model.load_state_dict(case.checkpoint)
    scores, places = sparse.route(case.inputs["x"])
    order, recorded = places.argsort(-1), case.expected["topk_index"].argsort(-1)
    yield exact("topk_index", places.gather(-1, order), case.expected["topk_index"].long().gather(-1, recorded))
    yield close("topk_score", scores.gather(-1, order), case.expected["topk_score"].gather(-1, recorded))
    yield from _gradients(case, ["x"], model, 1e-4)


def relay(case: Case) -> Iterator[Comparison]:
    """relay-attention: both parts and what they are together."""
    inputs, expected, scale = case.inputs, case.expected, case.config["scale"]
    query = inputs["q"][:, :, None]
    prefix, own = ([inputs[f"{part}_{name}"].transpose(1, 2) for name in "kv"] for part in ("prefix", "user"))
    mask = (torch.arange(own[0].shape[2]) < inputs["user_len"][:, None])[:, None, None]
    found = {
        "_prefix": prefix_attention(query, *prefix, scale=scale),
        "_user": softmax_attention(query, *own, mask, scale),
        "": relay_attention(query, prefix, own, mask, scale),
    }
    for part, (out, lse) in found.items():
        yield close(f"out{part}", out[:, :, 0], expected[f"out{part}"], 1e-5)
        yield close(f"lse{part}", lse[:, :, 0], expected[f"lse{part}"], 1e-5)


def compressed_convolution(case: Case) -> Iterator[Comparison]:
    """cca-compressed-conv: transformers' layer, whole, and a prefill followed by single tokens."""
    from transformers import DynamicCache, ZayaConfig
    from transformers.models.zaya.modeling_zaya import ZayaAttention

    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "cca_time0", "cca_time1")
    known: dict[str, Any] = {name: case.config[name] for name in (*names, "attention_bias")}
    config = ZayaConfig(**known, num_hidden_layers=1, layer_types=["hybrid"], attn_implementation="eager")
    layer = ZayaAttention(config, 0).eval()
    layer.load_state_dict(case.checkpoint)
    inputs, valid = case.inputs, case.inputs["valid"]
    with torch.no_grad():
        query, key, value = layer.qkv_proj(inputs["hidden_states"], None, valid)
        normed = layer.qk_norm(query, key)
    names = ("q_before_norm", "k_before_norm", "value", "q_normed", "k_normed")
    for name, found in zip(names, (query, key, value, *normed), strict=True):
        yield close(name, found[valid], case.expected[name][valid])
    mask = torch.where(inputs["allowed"], 0.0, torch.finfo(torch.float32).min)[:, None]
    length, cut, cache = valid.shape[1], case.config["prefill_tokens_for_cache_test"], DynamicCache(config=config)
    cuts = [0, cut, *range(cut + 1, length + 1)]
    for name, spans, kept in (("", [(0, length)], None), (" in steps", list(zip(cuts, cuts[1:], strict=False)), cache)):
        parts = []
        for start, stop in spans:
            rows = slice(start, stop)
            masks = {"causal": mask[:, :, rows, :stop], "conv": valid[:, rows]}
            angles = (inputs["cos"][:, rows], inputs["sin"][:, rows])
            with torch.no_grad():
                parts.append(layer(inputs["hidden_states"][:, rows], masks, kept, angles)[0])
        yield close(f"attn_out{name}", torch.cat(parts, 1)[valid], case.expected["attn_out"][valid])


RUNNERS = {
    ("lightning-attention", "module", ""): lightning,
    ("hla2", "module", ""): higher_order,
    ("core-context-attention", "module", ""): core_context,
    ("flashbias", "module", ""): low_rank_bias,
    ("qk-sparse", "module", ""): dropped,
    ("hash-sparse", "module", ""): hashed,
    ("mosa", "module", ""): mosa,
    ("relay-attention", "module", ""): relay,
    ("cca-compressed-conv", "module", ""): compressed_convolution,
}
