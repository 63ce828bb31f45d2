"""The one place that plugs rules into transformers.

transformers lets a ready 4-D mask through to its backbones untouched; that is all that is used here. `sdpa` is
transformers' own; `eager` is registered by mmzoo under another name, because transformers' own eager attention gives a
query without an open key the mean of all values, and adds a boolean mask to the scores. A pair of rules is one mask
with a channel a branch, for attention functions that run two softmaxes and add them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmzoo.attention.backends import WORKING, Rules, backend, eager_attention, flex
from mmzoo.attention.compiler import allowed, compact
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import TokenLayout
from mmzoo.masks.basic import sliding_window
from mmzoo.masks.rule import Rule, after, everything, see

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

IMPLEMENTATIONS = {"eager": "mmzoo_eager", "sdpa": "sdpa", "flex_attention": "mmzoo_flex"}
"""mmzoo's backend name -> the name transformers knows it by."""

PAIR_IMPLEMENTATIONS = {"eager": "mmzoo_eager_pair", "sdpa": "mmzoo_sdpa_pair"}
"""The same for a pair of rules."""


def implementations(rule: Rules) -> dict[str, str]:
    """mmzoo's backend name -> transformers' name, of what runs one rule or a pair."""
    return PAIR_IMPLEMENTATIONS if isinstance(rule, tuple) else IMPLEMENTATIONS


def implementation(attention: str, rule: Rules, device: torch.device | str = "cpu") -> str:
    """transformers' name of a backend that can express the rule on that device.

    Raises:
        UnsupportedMask: the backend cannot express it.
    """
    rules = rule if isinstance(rule, tuple) else (rule,)
    name = backend(attention, *rules, device=device).name
    if name not in implementations(rule):
        reason = "a pair of rules needs two masks in the one that transformers hands on"
        raise UnsupportedMask(name, rules[0].name, reason, WORKING)
    if len({one.fallback is None for one in rules}) == 2 or (len(rules) == 1 and rules[0].fallback):
        reason = "a uniform fallback goes through transformers for both rules of a pair only"
        raise UnsupportedMask("transformers", rules[0].name, reason)
    return implementations(rule)[name]


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


def _two_softmaxes(attention: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., Any]:
    """An attention function run once for each branch of a mask [B, 2 or 4, Q, K], and the results added."""

    def function(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is None or attention_mask.shape[1] not in (2, 4):
            raise UnsupportedMask("transformers", "pair", "it needs a mask of two or four channels, made by mmzoo")
        outputs, weights = zip(
            *(attention(module, query, key, value, attention_mask[:, i : i + 1], *args, **kwargs) for i in (0, 1))
        )
        output, weight = outputs[0] + outputs[1], None if weights[0] is None else weights[0] + weights[1]
        if attention_mask.shape[1] == 4:
            uniform = _fallback_weights(attention_mask, value.dtype)
            mean = (uniform @ value).repeat_interleave(query.shape[1] // value.shape[1], 1)
            output, weight = output + mean.transpose(1, 2), None if weight is None else weight + uniform
        return output, weight

    return function


def _fallback_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, Q, K]: what rows without an open key in a branch take, the mean over the branch's fallback, both added."""
    branches, fallbacks = mask.chunk(2, 1)
    taken = (fallbacks & ~branches.any(-1, keepdim=True)).to(torch.float32)
    return (taken / taken.sum(-1, keepdim=True).clamp(min=1)).sum(1, keepdim=True).to(dtype)


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' boolean mask for decoding steps, never left out in favour of an `is_causal` flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


for name, function, mask_function in (
    ("mmzoo_eager", _mmzoo_eager, _explicit_mask),
    ("mmzoo_flex", _mmzoo_flex, sdpa_mask),
    ("mmzoo_eager_pair", _two_softmaxes(_mmzoo_eager), _explicit_mask),
    ("mmzoo_sdpa_pair", _two_softmaxes(sdpa_attention_forward), _explicit_mask),
):
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)


def mask_for(rule: Rules, layout: TokenLayout, num_queries: int, cache: Cache | None = None, layer: int = 0) -> Tensor:
    """The mask of the last `num_queries` tokens of `layout` over the slots of the cache: bool [B, C, Q, K].

    C is 1 for one rule; 2 for a pair, one channel a branch; 4 for a pair with fallbacks, the branches and then theirs.

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
    branches = rule if isinstance(rule, tuple) else (rule,)
    channels = (*branches, *(one.fallback for one in branches if one.fallback is not None))
    masks = torch.stack([allowed(one, layout, keys, rows=rows) for one in channels], 1)
    return masks[..., first : first + slots]


def _recent(window: int) -> Rule:
    """The past as far as a sliding layer reaches; what a rule opens ahead stays open."""
    ahead = Rule("ahead", (see(everything, everything, after()),))
    return sliding_window(window) | ahead


def backbone_mask(
    rule: Rules, layout: TokenLayout, num_queries: int, cache: Cache | None, config: Any
) -> Tensor | BlockMask | dict[str, Tensor]:
    """`mask_for` in the form a backbone takes: a dict where its config names layer types (Qwen2, Qwen3, Gemma ...).

    A sliding layer keeps its window on top of the rule.

    Raises:
        UnsupportedMask: a layer is of a type that takes no mask.
    """
    if isinstance(rule, Rule) and getattr(config, "_attn_implementation", None) == "mmzoo_flex" and num_queries > 1:
        return _block_mask(rule, layout, num_queries, cache, config)
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
            name = (rule[0] if isinstance(rule, tuple) else rule).name
            raise UnsupportedMask("transformers", name, f"layers of type {kind!r} take no mask")
        masks[kind] = mask
    return masks


def _block_mask(rule: Rule, layout: TokenLayout, num_queries: int, cache: Cache | None, config: Any) -> BlockMask:
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        reason = "a sliding layer needs its window on top of the rule, which block masks do not carry"
        raise UnsupportedMask("flex_attention", rule.name, reason, ["sdpa"])
    if cache is not None and cache.get_mask_sizes(num_queries, 0) != (len(layout), 0):
        raise UnsupportedMask("flex_attention", rule.name, "the cache is static or sliding", ["sdpa"])
    return compact(rule, layout).rows(slice(len(layout) - num_queries, len(layout))).block_mask()
