"""The one place that plugs rules into transformers.

transformers lets a ready 4-D mask through to its backbones untouched; that is all that is used here. `sdpa` is
transformers' own; `eager` is registered by mmzoo under another name, because transformers' own eager attention gives a
query without an open key the mean of all values, and adds a boolean mask to the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask

from mmzoo.attention.backends import backend, eager_attention
from mmzoo.attention.compiler import allowed
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import TokenLayout
from mmzoo.masks.rule import Rule

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


def mask_for(rule: Rule, layout: TokenLayout, num_queries: int, cache: Cache | None = None) -> Tensor:
    """The mask of the last `num_queries` tokens of `layout` over the slots of the cache: bool [B, 1, Q, K].

    Args:
        layout: every token so far, those in the cache included.
        cache: None without one; a static cache has more slots than tokens, a sliding one fewer.
    """
    keys = layout
    rows = slice(len(layout) - num_queries, len(layout))
    slots, first = (len(layout), 0) if cache is None else cache.get_mask_sizes(num_queries, 0)
    if slots + first > len(layout):
        keys = layout.padded_to(slots + first)
    mask = allowed(rule, layout, keys, rows=rows)
    return mask[:, None, :, first : first + slots]


def by_layer_type(mask: Tensor, config: Any) -> Tensor | dict[str, Tensor]:
    """The mask in the form a backbone takes: a dict where its config names layer types (Qwen2, Qwen3, Gemma ...).

    A sliding layer keeps its window on top of the rule.
    """
    types = set(getattr(config, "layer_types", None) or ())
    if types <= {"full_attention"}:
        return mask
    unknown = types - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedMask("transformers", "any", f"layers of type {sorted(unknown)[0]!r} take no mask", [])
    near = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device)
    near = near.triu(mask.shape[-1] - mask.shape[-2] - config.sliding_window + 1)
    return {"full_attention": mask, "sliding_attention": mask & near}
