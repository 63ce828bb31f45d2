"""The one place that plugs rules into transformers.

transformers lets a ready 4-D mask through to its backbones untouched; that is all that is used here. `sdpa` is
transformers' own; `eager` is registered by mmzoo under another name, because transformers' own eager attention gives a
query without an open key the mean of all values, and adds a boolean mask to the scores. What is no 4-D mask travels
beside an empty one. A pair of rules is one mask with a channel a branch, for attention functions that run two softmaxes
and add them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmzoo.attention.backends import (
    BACKENDS,
    WORKING,
    Flash,
    Fused,
    backend,
    eager_attention,
    flex,
    flex_with_lse,
)
from mmzoo.attention.compiler import Rules, allowed, compact
from mmzoo.attention.prefix import PrefixCache, SharedMask
from mmzoo.attention.varlen import Call, calls
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import TokenLayout
from mmzoo.masks.basic import sliding_window
from mmzoo.masks.rule import Rule, after, everything, see
from mmzoo_kernels.flash import FlashMask, flash_mask, masked_attention
from mmzoo_kernels.masks import CompactMask
from mmzoo_kernels.relay import Attention as SplitAttention
from mmzoo_kernels.softmax import fast_softmax_attention, softmax_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""transformers' attention function: output [B, Q, H, D], and weights [B, H, Q, K] or None."""

FLASH = {
    "varlen": "mmzoo_varlen",
    # transformers takes any name with "flash" in it for its own.
    "flash_attention_2": "mmzoo_varlen_2",
    "flash_attention_3": "mmzoo_varlen_3",
}
OWN = {"mmzoo_flash": "mmzoo_fused"}
IMPLEMENTATIONS = {"eager": "mmzoo_eager", "sdpa": "sdpa", "flex_attention": "mmzoo_flex", **FLASH, **OWN}
"""mmzoo's backend name -> the name transformers knows it by."""

PAIR_IMPLEMENTATIONS = {
    name: f"mmzoo_{name.replace('flash_attention', 'varlen').replace('mmzoo_flash', 'fused')}_pair"
    for name in IMPLEMENTATIONS
}
"""The same for a pair of rules."""

SHARED_IMPLEMENTATIONS = {
    "eager": "mmzoo_eager_shared",
    "sdpa": "mmzoo_sdpa_shared",
    "flex_attention": "mmzoo_flex_shared",
    "mmzoo_flash": "mmzoo_fused_shared",
}
"""The same for one rule after a shared prefix, of the backends that give a log-sum-exp."""

FUSED = ("flex_attention", *FLASH, *OWN)


def implementations(rule: Rules) -> dict[str, str]:
    """mmzoo's backend name -> transformers' name, of what runs one rule or a pair."""
    return PAIR_IMPLEMENTATIONS if isinstance(rule, tuple) else IMPLEMENTATIONS


def implementation(attention: str, rule: Rules, device: torch.device | str = "cpu", head_dim: int | None = None) -> str:
    """transformers' name of a backend that can express the rule on that device, with heads of that size.

    Raises:
        UnsupportedMask: the backend cannot express it.
        MissingExtra: its package is not installed.
    """
    rules = rule if isinstance(rule, tuple) else (rule,)
    name = backend(attention, *rules, device=device, head_dim=head_dim).name
    fallbacks = [one for one in rules if one.fallback is not None]
    if fallbacks and len(fallbacks) != 2:
        reason = "a uniform fallback goes through transformers for both rules of a pair only"
        raise UnsupportedMask("transformers", rules[0].name, reason)
    if fallbacks and name in FUSED:
        raise UnsupportedMask(name, rules[0].name, "its uniform fallback needs the dense mask", WORKING)
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
) -> tuple[Tensor, Tensor | None]:
    _refuse_more_than_a_mask("eager", kwargs)
    output, weights = eager_attention(query, key, value, attention_mask, scaling, dropout if module.training else 0.0)
    return output.transpose(1, 2).contiguous(), weights


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
    if attention_mask is None or isinstance(attention_mask, Tensor):
        _refuse_dense("flex_attention", query)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _refuse_more_than_a_mask("flex_attention", kwargs)
    _refuse_dropout("flex_attention", module, dropout)
    return flex(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _flash_function(name: str) -> Attention:
    def mmzoo_flash(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        flash_calls: tuple[Call, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if flash_calls is None:
            _refuse_dense(name, query)
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        _refuse_more_than_a_mask(name, kwargs)
        _refuse_dropout(name, module, dropout)
        flash, scale = BACKENDS[name], query.shape[-1] ** -0.5 if scaling is None else scaling
        assert isinstance(flash, Flash)
        return flash.run(query, key, value, flash_calls, scale).transpose(1, 2).contiguous(), None

    return mmzoo_flash


def _mmzoo_fused(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    fused_mask: FlashMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if fused_mask is None:
        _refuse_dense("mmzoo_flash", query)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    _refuse_more_than_a_mask("mmzoo_flash", kwargs)
    _refuse_dropout("mmzoo_flash", module, dropout)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Fused().run(query, key, value, fused_mask, scale).transpose(1, 2).contiguous(), None


def _shared_function(few_queries: SplitAttention, many_queries: SplitAttention) -> Attention:
    """Attention after a shared prefix: under dense masks, or under those that were made for `many_queries`."""

    def mmzoo_shared(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        *,
        shared_prefix: PrefixCache,
        shared_mask: SharedMask | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        _refuse_more_than_a_mask("a shared prefix", kwargs)
        _refuse_dropout("a shared prefix", module, dropout)
        layer: Any = module.layer_idx
        mask = attention_mask if shared_mask is None else shared_mask
        assert mask is not None
        run = few_queries if shared_mask is None else many_queries
        output = shared_prefix.attend(layer, query, key, value, mask, run, scaling)
        return output.transpose(1, 2).contiguous(), None

    return mmzoo_shared


def _fused_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: FlashMask, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, lse = masked_attention(query, key, value, mask, scale)
    return out, lse[0]


def _refuse_more_than_a_mask(name: str, kwargs: dict[str, Any]) -> None:
    for extra in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(extra) is not None:
            raise UnsupportedMask(name, "any", f"this backbone's attention needs {extra}", ["sdpa"])


def _refuse_dense(name: str, query: Tensor) -> None:
    """Only a decoding step, one query, runs under an ordinary mask."""
    if query.shape[2] > 1:
        reason = "it was handed a dense mask or none; model.mask(layout, num_queries) makes what it takes"
        raise UnsupportedMask(name, "any", reason, ["sdpa"])


def _refuse_dropout(name: str, module: nn.Module, dropout: float) -> None:
    if dropout and module.training:
        raise UnsupportedMask(name, "any", "it has no dropout", ["sdpa"])


def _two_softmaxes(attention: Attention) -> Attention:
    """An attention function run once for each branch, and the results added.

    Branches are channels of a mask [B, 2 or 4, Q, K], or what `passed_on` makes of a `Pair`.
    """

    def mmzoo_pair(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        branches: tuple[dict[str, Any], dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if kwargs.get("fused_mask") is not None:  # holds both branches
            return attention(module, query, key, value, attention_mask, **kwargs)
        if branches is not None:
            (one, _), (other, _) = (attention(module, query, key, value, **branch, **kwargs) for branch in branches)
            return one + other, None
        if attention_mask is None or attention_mask.shape[1] not in (2, 4):
            raise UnsupportedMask("transformers", "pair", "it needs a mask of two or four channels, made by mmzoo")
        if query.shape[2] == 1 and attention is not _mmzoo_eager and not (module.training and kwargs.get("dropout")):
            return _one_query(query, key, value, attention_mask, kwargs.get("scaling")), None
        channels = [attention_mask[:, i : i + 1] for i in (0, 1)]
        (one, weights), (other, more) = (
            attention(module, query, key, value, channel, **kwargs) for channel in channels
        )
        output = _where_open(one, channels[0]) + _where_open(other, channels[1])
        weights = None if weights is None or more is None else weights + more
        if attention_mask.shape[1] == 4:
            uniform = _fallback_weights(attention_mask, value.dtype)
            mean = (uniform @ value).repeat_interleave(query.shape[1] // value.shape[1], 1)
            output, weights = output + mean.transpose(1, 2), None if weights is None else weights + uniform
        return output, weights

    return mmzoo_pair


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """A decoding step [B, 1, H, D] of both softmaxes: the scores are made once, and no key or value is repeated."""
    grouped = query[:, :, 0].unflatten(1, (key.shape[1], -1))  # [B, G, H / G, D]
    scores = grouped @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))[..., None, :]
    closed = ~mask[:, None, None, :2, 0]
    weights = scores.masked_fill(closed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(closed, 0).sum(-2)
    if mask.shape[1] == 4:
        weights = weights + _fallback_weights(mask, scores.dtype)
    return (weights.to(value.dtype) @ value).flatten(1, 2)[:, None]


def _where_open(output: Tensor, mask: Tensor) -> Tensor:
    """Output [B, Q, H, D], 0 for queries without an open key in the mask [B, 1, Q, K], where SDPA may give a mean."""
    return output.masked_fill(~mask.any(-1).transpose(1, 2)[..., None], 0)


def _fallback_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, Q, K]: what rows without an open key in a branch take, the mean over the branch's fallback, both added."""
    branches, fallbacks = mask.chunk(2, 1)
    taken = (fallbacks & ~branches.any(-1, keepdim=True)).to(torch.float32)
    return (taken / taken.sum(-1, keepdim=True).clamp(min=1)).sum(1, keepdim=True).to(dtype)


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' boolean mask for decoding steps, never left out in favour of an `is_causal` flag."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _only_while_decoding(*args: Any, q_length: int, **kwargs: Any) -> Tensor | None:
    """transformers' boolean mask for one query; at prefill what travels beside it says everything."""
    return sdpa_mask(*args, q_length=q_length, **kwargs) if q_length == 1 else None


_FUNCTIONS: dict[str, tuple[Attention, Callable[..., Tensor | None]]] = {
    "eager": (_mmzoo_eager, _explicit_mask),
    "flex_attention": (_mmzoo_flex, sdpa_mask),
    **{name: (_flash_function(name), _only_while_decoding) for name in FLASH},
    "mmzoo_flash": (_mmzoo_fused, _only_while_decoding),
}
for name, (function, mask_function) in _FUNCTIONS.items():
    AttentionInterface.register(IMPLEMENTATIONS[name], function)
    AttentionMaskInterface.register(IMPLEMENTATIONS[name], mask_function)
_SHARED_FUNCTIONS: dict[str, tuple[SplitAttention, SplitAttention]] = {
    "eager": (softmax_attention, softmax_attention),
    "sdpa": (fast_softmax_attention, fast_softmax_attention),
    "flex_attention": (fast_softmax_attention, flex_with_lse),
    "mmzoo_flash": (fast_softmax_attention, _fused_with_lse),
}
for name, known_as in SHARED_IMPLEMENTATIONS.items():
    AttentionInterface.register(known_as, _shared_function(*_SHARED_FUNCTIONS[name]))
    AttentionMaskInterface.register(known_as, _explicit_mask)
for name, known_as in PAIR_IMPLEMENTATIONS.items():
    single = sdpa_attention_forward if name == "sdpa" else _FUNCTIONS[name][0]
    AttentionInterface.register(known_as, _two_softmaxes(single))
    AttentionMaskInterface.register(known_as, _only_while_decoding if name in FUSED else _explicit_mask)


@dataclass(frozen=True)
class Pair:
    """The fused masks of a pair of rules: two block masks, or the calls of each branch."""

    branches: tuple[Any, Any]


def passed_on(mask: Any) -> dict[str, Any]:
    """How a mask made by `backbone_mask` is handed to a backbone."""
    if isinstance(mask, Pair):
        return {"attention_mask": None, "branches": tuple(passed_on(branch) for branch in mask.branches)}
    if isinstance(mask, FlashMask):
        return {"attention_mask": None, "fused_mask": mask}
    if isinstance(mask, SharedMask):
        return {"attention_mask": None, "shared_mask": mask}
    if isinstance(mask, tuple):
        return {"attention_mask": None, "flash_calls": mask}
    return {"attention_mask": mask}


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
) -> Tensor | BlockMask | FlashMask | SharedMask | tuple[Call, ...] | Pair | dict[str, Tensor]:
    """`mask_for` in the form a backbone takes: a dict where its config names layer types (Qwen2, Qwen3, Gemma ...).

    A sliding layer keeps its window on top of the rule; in Phi-3, which names no layer types, every layer is one.
    FlexAttention is given a block mask, flash its calls, mmzoo's own kernels what `flash_mask` makes.

    Raises:
        UnsupportedMask: a layer is of a type that takes no mask.
    """
    chosen = {known_as: name for name, known_as in implementations(rule).items()}
    attention = chosen.get(str(getattr(config, "_attn_implementation", None)), "sdpa")
    if num_queries > 1 and attention in FUSED:
        return _fused_mask(attention, rule, layout, num_queries, cache, config)
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
            raise UnsupportedMask("transformers", _name(rule), f"layers of type {kind!r} take no mask")
        masks[kind] = mask
    return masks


def _fused_mask(
    attention: str, rule: Rules, layout: TokenLayout, num_queries: int, cache: Cache | None, config: Any
) -> BlockMask | FlashMask | SharedMask | tuple[Call, ...] | Pair:
    if isinstance(rule, tuple) and attention in OWN:
        for branch in rule:
            _refuse_partial(attention, branch, layout, num_queries, cache, config)
        return flash_mask(*(_last_rows(branch, layout, num_queries) for branch in rule))
    if isinstance(rule, tuple):
        one, other = (_fused_mask(attention, branch, layout, num_queries, cache, config) for branch in rule)
        return Pair((one, other))
    _refuse_partial(attention, rule, layout, num_queries, cache, config)
    last_rows = _last_rows(rule, layout, num_queries)
    if attention in FLASH:
        return calls(last_rows, rule.name)
    made: Callable[[CompactMask], Any] = flash_mask if attention in OWN else CompactMask.block_mask
    if isinstance(cache, PrefixCache):
        return SharedMask(*map(made, cache.split(last_rows, rule.name)))
    return made(last_rows)


def _last_rows(rule: Rule, layout: TokenLayout, num_queries: int) -> CompactMask:
    return compact(rule, layout).rows(slice(len(layout) - num_queries, len(layout)))


def _refuse_partial(
    attention: str, rule: Rule, layout: TokenLayout, num_queries: int, cache: Cache | None, config: Any
) -> None:
    """One mask of every token so far has to do for all layers."""
    types = getattr(config, "layer_types", None)
    window = None if types else getattr(config, "sliding_window", None)
    if "sliding_attention" in (types or ()) or (window is not None and len(layout) > window):
        reason = "a sliding layer needs its window on top of the rule, and all layers are given one mask"
        raise UnsupportedMask(attention, rule.name, reason, ["sdpa"])
    if cache is not None and cache.get_mask_sizes(num_queries, 0) != (len(layout), 0):
        raise UnsupportedMask(attention, rule.name, "the cache is static or sliding", ["sdpa"])


def _name(rule: Rules) -> str:
    return " + ".join(one.name for one in (rule if isinstance(rule, tuple) else (rule,)))
