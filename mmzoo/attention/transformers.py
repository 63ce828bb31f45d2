"""The one place that plugs rules into transformers.

transformers lets a ready 4-D mask through to its backbones untouched; that is all that is used here. `sdpa` is
transformers' own; `eager` is registered by mmzoo under another name, because transformers' own eager attention gives a
query without an open key the mean of all values, and adds a boolean mask to the scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmzoo.attention.backends import backend, eager_attention, flex
from mmzoo.attention.compiler import allowed, compact
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import TokenLayout
from mmzoo.masks.basic import sliding_window
from mmzoo.masks.rule import Rule, after, everything, see

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

IMPLEMENTATIONS = {"eager": "mmzoo_eager", "sdpa": "sdpa", "flex_attention": "mmzoo_flex"}
"""mmzoo's backend name -> the name transformers knows it by."""


def implementation(attention: str, rule: Rule, device: torch.device | str = "cpu") -> str:
    """transformers' name of a backend that can express the rule on that device.

    Raises:
        UnsupportedMask: the backend cannot express it.
    """
    return IMPLEMENTATIONS[backend(attention, rule, device=device).name]


def _mmzoo_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    _refuse_more_than_a_mask("eager", kwargs)
    output, weights = eager_attention(query, key, value, attention_mask, scaling, dropout if module.training else 0.0)
    return output.transpose(1, 2).contiguous(), weights


def _refuse_more_than_a_mask(name: str, kwargs: dict[str, Any]) -> None:
    for extra in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(extra) is not None:
            raise UnsupportedMask(name, "any", f"this backbone's attention needs {extra}", ["sdpa"])


def _mmzoo_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if attention_mask is None or isinstance(attention_mask, Tensor):  # a decoding step
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _refuse_more_than_a_mask("flex_attention", kwargs)
    if dropout and module.training:
        raise UnsupportedMask("flex_attention", "any", "FlexAttention has no dropout", ["sdpa"])
    return flex(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' boolean mask for decoding steps, never left out in favour of an `is_causal` flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


for name, function, mask_function in (
    ("mmzoo_eager", _mmzoo_eager, _explicit_mask),
    ("mmzoo_flex", _mmzoo_flex, sdpa_mask),
):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)


def mask_for(rule: Rule, layout: TokenLayout, num_queries: int, cache: Cache | None = None, layer: int = 0) -> Tensor:
    """The mask of the last `num_queries` tokens of `layout` over the slots of the cache: bool [B, 1, Q, K].

    Args:
        rule: who may look at whom.
        layout: every token so far, those in the cache included.
        num_queries: Q.
        cache: None without one; a static cache has more slots than tokens, a sliding one fewer.
        layer: the layer whose slots are meant; layers of one type have the same.
    """
    rows = slice(len(layout) - num_queries, len(layout))
    slots, first = (len(layout), 0) if cache is None else cache.get_mask_sizes(num_queries, layer)
    keys = layout.padded_to(max(slots + first, len(layout)))
    return allowed(rule, layout, keys, rows=rows)[:, None, :, first : first + slots]


def _recent(window: int) -> Rule:
    """The past as far as a sliding layer reaches; what a rule opens ahead stays open."""
    ahead = Rule("ahead", (see(everything, everything, after()),))
    return sliding_window(window) | ahead


def backbone_mask(
    rule: Rule, layout: TokenLayout, num_queries: int, cache: Cache | None, config: Any
) -> Tensor | BlockMask | dict[str, Tensor]:
    """`mask_for` in the form a backbone takes: a dict where its config names layer types (Qwen2, Qwen3, Gemma ...).

    A sliding layer keeps its window on top of the rule; in Phi-3, which names no layer types, every layer is one.

    Raises:
        UnsupportedMask: a layer is of a type that takes no mask.
    """
    if getattr(config, "_attn_implementation", None) == "mmzoo_flex" and num_queries > 1:
        return _block_mask(rule, layout, num_queries, cache, config)
    types: list[str] = list(getattr(config, "layer_types", None) or ())
    if set(types) <= {"full_attention"}:
        mask = mask_for(rule, layout, num_queries, cache)
        window = None if types else getattr(config, "sliding_window", None)
        if window is None or len(layout) <= window:
            return mask
        return mask & mask_for(_recent(window), layout, num_queries, cache)
    masks = {}
    for kind in dict.fromkeys(types):
        layer = types.index(kind)
        mask = mask_for(rule, layout, num_queries, cache, layer)
        if kind == "sliding_attention":
            mask = mask & mask_for(_recent(config.sliding_window), layout, num_queries, cache, layer)
        elif kind != "full_attention":
            raise UnsupportedMask("transformers", rule.name, f"layers of type {kind!r} take no mask")
        masks[kind] = mask
    return masks


def _block_mask(rule: Rule, layout: TokenLayout, num_queries: int, cache: Cache | None, config: Any) -> BlockMask:
    types = getattr(config, "layer_types", None)
    window = None if types else getattr(config, "sliding_window", None)
    if "sliding_attention" in (types or ()) or (window is not None and len(layout) > window):
        reason = "a sliding layer needs its window on top of the rule, which block masks do not carry"
        raise UnsupportedMask("flex_attention", rule.name, reason, ["sdpa"])
    if cache is not None and cache.get_mask_sizes(num_queries, 0) != (len(layout), 0):
        raise UnsupportedMask("flex_attention", rule.name, "the cache is static or sliding", ["sdpa"])
    return compact(rule, layout).rows(slice(len(layout) - num_queries, len(layout))).block_mask()
