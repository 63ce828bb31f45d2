"""The one place that plugs rules into transformers.

transformers lets a ready 4-D mask through to its backbones untouched; that is all that is used here. `sdpa` is
transformers' own; `eager` is registered by mmzoo under another name, because transformers' own eager attention gives a
query without an open key the mean of all values, and adds a boolean mask to the scores.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask

from mmzoo.attention.backends import backend, eager_attention
from mmzoo.attention.compiler import allowed
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import TokenLayout
from mmzoo.masks.basic import sliding_window
from mmzoo.masks.rule import Rule, after, everything, see

IMPLEMENTATIONS = {"eager": "mmzoo_eager", "sdpa": "sdpa"}
"""mmzoo's backend name -> the name transformers knows it by."""


def implementation(attention: str, rule: Rule) -> str:
    """transformers' name of a backend that can express the rule.

    Raises:
        UnsupportedMask: the backend cannot express it.
    """
    return IMPLEMENTATIONS[backend(attention, rule).name]


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
    refused = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if refused:
        raise UnsupportedMask("eager", "any", f"this backbone's attention needs {refused[0]}", ["sdpa"])
    output, weights = eager_attention(query, key, value, attention_mask, scaling, dropout if module.training else 0.0)
    return output.transpose(1, 2).contiguous(), weights


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' boolean mask for decoding steps, never left out in favour of an `is_causal` flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("mmzoo_eager", _mmzoo_eager)
AttentionMaskInterface.register("mmzoo_eager", _explicit_mask)


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
) -> Tensor | dict[str, Tensor]:
    """`mask_for` in the form a backbone takes: a dict where its config names layer types (Qwen2, Qwen3, Gemma ...).

    A sliding layer keeps its window on top of the rule.

    Raises:
        UnsupportedMask: a layer is of a type that takes no mask.
    """
    types: list[str] = list(getattr(config, "layer_types", None) or ())
    if set(types) <= {"full_attention"}:
        return mask_for(rule, layout, num_queries, cache)
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
