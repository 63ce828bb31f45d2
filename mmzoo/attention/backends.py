"""Backends: how a rule is executed. Each says whether it can express a rule and, if not, why.

Shape legend: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmzoo.attention import varlen
from mmzoo.attention.compiler import Rules, allowed, compact
from mmzoo.errors import InputError, MissingExtra, UnsupportedMask
from mmzoo.layout import Role, TokenLayout, image, lay_out, text, video
from mmzoo.masks.rule import Rule
from mmzoo_kernels import flash
from mmzoo_kernels.masks import CompactMask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

WORKING = ("sdpa", "eager")


@dataclass(frozen=True)
class Mask:
    """A rule on two layouts, in the form that a backend asks for."""

    rule: Rule
    queries: TokenLayout
    keys: TokenLayout
    rows: slice

    def dense(self) -> Tensor:
        """bool [B, Q, K]."""
        return allowed(self.rule, self.queries, self.keys, rows=self.rows)

    def blocks(self) -> BlockMask:
        """FlexAttention's block mask."""
        return self._compact().block_mask()

    def fused(self) -> flash.FlashMask:
        """What mmzoo's own kernels are told."""
        return flash.flash_mask(self._compact())

    def calls(self) -> tuple[varlen.Call, ...]:
        """Calls of a flash kernel."""
        return varlen.calls(self._compact(), self.rule.name)

    def _compact(self) -> CompactMask:
        return compact(self.rule, self.queries, self.keys).rows(self.rows)


class Backend:
    """What runs `softmax(scale * query key^T over the open pairs) value`.

    Attributes:
        name: how users choose it.
        package: what it needs besides torch.
        extra: the extra of mmzoo that brings the package.
    """

    name: str
    package: str | None = None
    extra: str = "flash"

    def refuses(self, rule: Rule, device: torch.device, head_dim: int | None = None) -> str | None:
        """Why this backend cannot express the rule there, with heads of that size, or None."""
        return None

    def pairs(self, mask: Mask) -> Tensor:
        """bool [B, Q, K]: what is open in the form of the mask that this backend is handed."""
        return mask.dense()

    def form(self, mask: Mask) -> Any:
        """The mask as `run` takes it; made once for all layers."""
        raise NotImplementedError

    def run(self, query: Tensor, key: Tensor, value: Tensor, form: Any, scale: float, rule: str = "any") -> Tensor:
        """[B, H, Q, D] from query [B, H, Q, D], key and value [B, G, K, D]; `rule` is named in errors."""
        raise NotImplementedError

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
        """The same from a mask in any form."""
        return self.run(query, key, value, self.form(mask), scale, mask.rule.name)


class Eager(Backend):
    """Softmax written out: the slow twin that every other backend is compared with."""

    name = "eager"

    def form(self, mask: Mask) -> Tensor:
        return mask.dense()

    def run(self, query: Tensor, key: Tensor, value: Tensor, form: Tensor, scale: float, rule: str = "any") -> Tensor:
        return eager_attention(query, key, value, form, scale)[0]


class SDPA(Backend):
    """torch's `scaled_dot_product_attention` with a boolean mask."""

    name = "sdpa"

    def form(self, mask: Mask) -> Tensor:
        return mask.dense()

    def run(self, query: Tensor, key: Tensor, value: Tensor, form: Tensor, scale: float, rule: str = "any") -> Tensor:
        grouped, dense = query.shape[1] != key.shape[1], form[:, None]
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=scale, enable_gqa=grouped)
        # On a GPU some of its kernels give a query without an open key a mean of values.
        return output.masked_fill(~dense.any(-1, keepdim=True), 0)


class Flex(Backend):
    """torch's FlexAttention, compiled, on a block mask from tile bounds; a mask_mod only, no score_mod.

    Generated tokens are decoded by SDPA. A recompilation limit is an error: torch would go on unfused.
    """

    name = "flex_attention"

    def refuses(self, rule: Rule, device: torch.device, head_dim: int | None = None) -> str | None:
        if rule.function is not None:
            return "the rule is a function, and block masks are made from terms"
        if device.type == "cpu":
            return "FlexAttention has no backward on a CPU, and its compiled forward was seen to be wrong there"
        if head_dim is not None and head_dim < 16:
            return f"FlexAttention takes head dims from 16 on, not {head_dim}"
        return None

    def form(self, mask: Mask) -> BlockMask:
        return mask.blocks()

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, form: BlockMask, scale: float, rule: str = "any"
    ) -> Tensor:
        return flex(query, key, value, form, scale)

    def pairs(self, mask: Mask) -> Tensor:
        from torch.nn.attention.flex_attention import create_mask

        blocks, (b, q, k) = mask.blocks(), mask.dense().shape
        inside = create_mask(blocks.mask_mod, b, 1, q, k, device=mask.queries.data.device.type)[:, 0]
        side = blocks.BLOCK_SIZE[0]
        visited = blocks.to_dense()[:, 0].bool().repeat_interleave(side, 1).repeat_interleave(side, 2)
        return inside & visited[:, :q, :k]


class Flash(Backend):
    """A flash kernel for runs of variable length, under rules that such calls can say (`mmzoo.attention.varlen`)."""

    DTYPES = (torch.float16, torch.bfloat16)

    def __init__(self, name: str, kernel: varlen.Kernel, package: str | None = None):
        self.name, self.kernel, self.package = name, kernel, package

    def refuses(self, rule: Rule, device: torch.device, head_dim: int | None = None) -> str | None:
        if rule.function is not None:
            return "the rule is a function, and calls are made from terms"
        try:
            varlen.calls(compact(rule, _DIALOGUE), rule.name)
        except UnsupportedMask as error:
            return error.reason
        if self.package is None and importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "this version of torch has no varlen_attn"
        if device.type == "cpu":
            return "flash attention needs a GPU"
        if head_dim is not None and (head_dim % 8 or head_dim > 256):
            return f"flash attention takes head dims that are multiples of 8 up to 256, not {head_dim}"
        return None

    def form(self, mask: Mask) -> tuple[varlen.Call, ...]:
        return mask.calls()

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, form: tuple[varlen.Call, ...], scale: float, rule: str = "any"
    ) -> Tensor:
        if query.dtype not in self.DTYPES:
            reason = f"flash attention takes float16 and bfloat16, not {query.dtype}"
            raise UnsupportedMask(self.name, rule, reason, WORKING)
        return varlen.attend_by_calls(query, key, value, form, scale, self.kernel)

    def pairs(self, mask: Mask) -> Tensor:
        return varlen.opened(mask.calls(), mask.dense().shape)


class Fused(Backend):
    """mmzoo's own Triton kernels, on compact arrays and lists of tiles. Generated tokens are decoded by SDPA."""

    name, package, extra = "mmzoo_flash", "triton", "kernels"

    def refuses(self, rule: Rule, device: torch.device, head_dim: int | None = None) -> str | None:
        if rule.function is not None:
            return "the rule is a function, and compact masks are made from terms"
        if device.type == "cpu":
            return "its kernels need a GPU"
        if head_dim is not None and head_dim > flash.LARGEST_HEAD_DIM:
            return f"its kernels take head dims up to {flash.LARGEST_HEAD_DIM}, not {head_dim}"
        return None

    def form(self, mask: Mask) -> flash.FlashMask:
        return mask.fused()

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, form: flash.FlashMask, scale: float, rule: str = "any"
    ) -> Tensor:
        """As everywhere; of several branches, the sum."""
        if query.dtype not in flash.DTYPES:
            reason = f"its kernels take float16, bfloat16 and float32, not {query.dtype}"
            raise UnsupportedMask(self.name, rule, reason, WORKING)
        return flash.masked_attention(query, key, value, form, scale)[0]

    def pairs(self, mask: Mask) -> Tensor:
        return mask.fused().opened()[0]


class Refusing(Backend):
    """A backend of transformers that would drop the mask."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason

    def refuses(self, rule: Rule, device: torch.device, head_dim: int | None = None) -> str | None:
        return self.reason

    def form(self, mask: Mask) -> Any:
        raise UnsupportedMask(self.name, mask.rule.name, self.reason, WORKING)


_DIALOGUE = lay_out(
    text(2), video(2, 2, 2), text(2), image(2, 2), text(2, Role.ANSWER), text(1, turn=1), text(1, Role.ANSWER, 1)
)
"""What a rule is tried on before it is promised that flash calls can say it."""

_ALL: list[Backend] = [
    Eager(),
    SDPA(),
    Flex(),
    Flash("varlen", varlen.torch_varlen),
    Flash("flash_attention_2", varlen.flash_attn_2, "flash_attn"),
    Flash("flash_attention_3", varlen.flash_attn_3, "flash_attn_interface"),
    Fused(),
    Refusing("flash_attention_4", "transformers drops every mask but padding there, and mmzoo does not drive it"),
]
BACKENDS = {backend.name: backend for backend in _ALL}


def missing_package(name: str) -> str | None:
    """The package that a backend needs and that is not installed. Nothing is imported."""
    package = BACKENDS[name].package
    return package if package is not None and importlib.util.find_spec(package) is None else None


def backend(name: str, *rules: Rule, device: torch.device | str = "cpu", head_dim: int | None = None) -> Backend:
    """A backend by name that can express all the given rules on that device, with heads of that size.

    Raises:
        InputError: no such backend.
        UnsupportedMask: it cannot express one of the rules.
        MissingExtra: its package is not installed.
    """
    if name not in BACKENDS:
        raise InputError(f"Unknown attention backend {name!r}. Known: {', '.join(BACKENDS)}.")
    for rule in rules:
        reason = BACKENDS[name].refuses(rule, torch.device(device), head_dim)
        if reason is not None:
            raise UnsupportedMask(name, rule.name, reason, WORKING)
    package = missing_package(name)
    if rules and package is not None:
        raise MissingExtra(package, BACKENDS[name].extra, f"The attention backend {name!r}")
    return BACKENDS[name]


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None = None, **more: Any) -> Any:
    """[B, H, Q, D] by compiled FlexAttention under a block mask; a query without an open key gives 0.

    `more` goes to torch's function: `return_aux` adds what it asks for.
    """
    options: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1], **more}
    if torch.compiler.is_compiling():  # a part of the caller's graph
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, **options)
    # Each number of terms, dtype and gradient mode is a graph of its own; past the limit torch would go on unfused.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        return _compiled_flex()(query, key, value, **options)


def flex_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and log-sum-exps [B, H, Q]."""
    from torch.nn.attention.flex_attention import AuxRequest

    out, told = flex(query, key, value, mask, scale, return_aux=AuxRequest(lse=True))
    return out, told.lse


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rules,
    queries: TokenLayout,
    keys: TokenLayout | None = None,
    *,
    rows: slice = slice(None),
    attention: str = "sdpa",
    scale: float | None = None,
) -> Tensor:
    """Attention under a rule: [B, H, Q, D].

    A query without an open key gives 0, or the mean over the fallback's keys where the rule says so. A pair of rules
    is two-softmax attention: the outputs are added.

    Args:
        query: [B, H, Q, D].
        key, value: [B, G, K, D]; H is a multiple of G, and nothing is repeated beforehand.
        rule: one rule, or the pair of a two-softmax attention.
        queries: layout of the queries.
        keys: layout of the keys; None is self-attention.
        rows: which queries of the layout `query` holds; a decoding step holds the last one.
        attention: name of the backend.
        scale: D ** -0.5 if None.
    """
    lengths = (query.shape[0], query.shape[2], key.shape[2])
    described = ((keys or queries).shape[0], len(queries[rows]), len(keys or queries))
    if lengths != described:
        raise InputError(f"Batch, queries and keys are {lengths} in the tensors and {described} in the layouts.")
    rules = rule if isinstance(rule, tuple) else (rule,)
    run = backend(attention, *rules, device=query.device, head_dim=query.shape[-1])
    keys = queries if keys is None else keys
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for one in rules:
        mask = Mask(one, queries, keys, rows)
        output = run(query, key, value, mask, scale)
        if one.fallback is not None:
            mean = _mean_over(allowed(one.fallback, queries, keys, rows=rows), value, query.shape[1])
            output = torch.where(mask.dense().any(-1)[:, None, :, None], output, mean)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]


def _mean_over(mask: Tensor, value: Tensor, heads: int) -> Tensor:
    weights = mask.to(value.dtype)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return (weights[:, None] @ value).repeat_interleave(heads // value.shape[1], 1)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and weights [B, H, Q, K]; a query without an open key has weights 0.

    The softmax runs in float32, in float64 for float64 inputs.
    """
    mask = mask if mask.dim() == 4 else mask[:, None]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    precision = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.transpose(-1, -2) * scale).to(precision)
    weights = scores.masked_fill(~mask, torch.finfo(precision).min).softmax(-1)
    weights = F.dropout(weights.masked_fill(~mask, 0).to(query.dtype), dropout)
    return weights @ value, weights
