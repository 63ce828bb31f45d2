"""The one place that plugs rules into models of diffusers: an attention processor that holds a rule.

    clip = clip_layout(model, num_frames=9, height=60, width=104)
    attend_by(model, masks.causal_temporal(), clip, "mmzoo_flash")

diffusers' own list of backends is a closed enumeration, and hands over masks as tensors [B, 1, Q, K] or none at all, as
the blocks of Wan do for attention among frames. A processor is what diffusers lets users replace.

Shape legend: B batch, N tokens of a clip, C width, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor

from mmzoo.attention.backends import Backend, Mask, backend
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import TokenLayout, lay_out, video
from mmzoo.masks.rule import Rule


def clip_layout(model: WanTransformer3DModel, num_frames: int, height: int, width: int) -> TokenLayout:
    """The layout [1, N, K] of latents of that many frames, rows and columns, as the model cuts them into tokens."""
    sizes, patch = (num_frames, height, width), model.config.patch_size
    if any(size % side for size, side in zip(sizes, patch, strict=True)):
        raise InputError(f"Latents of {sizes} (frames, height, width) cannot be cut into patches of {tuple(patch)}.")
    frames, rows, columns = (size // side for size, side in zip(sizes, patch, strict=True))
    return lay_out(video(frames, rows, columns))


def attend_by(model: WanTransformer3DModel, rule: Rule | None, layout: TokenLayout, attention: str = "sdpa") -> None:
    """Run the model's attention among a clip's tokens under a rule; attention to the prompt stays as it is.

    Args:
        model: diffusers' Wan.
        rule: who may look at whom; None is diffusers' own processor again.
        layout: [1, N, K] of the clips that will be given, see `clip_layout`.
        attention: name of the backend.

    Raises:
        UnsupportedMask: another model, a rule with a fallback, or the backend cannot express the rule.
        InputError: no such backend, or a layout of several samples.
        MissingExtra: the backend's package is not installed.
    """
    name = "any" if rule is None else rule.name
    blocks = list(getattr(model, "blocks", ()))
    if not isinstance(model, WanTransformer3DModel) or any(type(one) is not WanTransformerBlock for one in blocks):
        reason = f"a rule is plugged into the blocks of diffusers' WanTransformer3DModel, not of {type(model).__name__}"
        raise UnsupportedMask("diffusers", name, reason)
    if layout.shape[0] != 1:
        raise InputError(f"One clip is laid out for all of a batch, got a layout of {layout.shape[0]} samples.")
    if rule is None:
        processor = WanAttnProcessor()
    elif rule.fallback is not None:
        raise UnsupportedMask("diffusers", name, "its uniform fallback is not carried there")
    else:
        found = backend(attention, rule, device=model.device, head_dim=model.config.attention_head_dim)
        processor = RuleProcessor(rule, layout, found)
    for one in blocks:
        one.attn1.set_processor(processor)


class RuleProcessor:
    """Wan's attention among tokens under a rule. One for all layers: they share its mask."""

    def __init__(self, rule: Rule, layout: TokenLayout, attention: Backend):
        self.rule, self.layout, self.attention = rule, layout, attention
        self._forms: dict[tuple[int, torch.device], Any] = {}

    def _form(self, batch: int, device: torch.device) -> Any:
        """The mask as the backend takes it."""
        if (batch, device) not in self._forms:
            layout = TokenLayout(self.layout.data.to(device).expand(batch, -1, -1))
            self._forms = {(batch, device): self.attention.form(Mask(self.rule, layout, layout, slice(None)))}
        return self._forms[batch, device]

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, N, C] of hidden_states [B, N, C]."""
        if encoder_hidden_states is not None or attention_mask is not None:
            raise InputError("This processor is for attention among a clip's tokens, under the mask of its rule alone.")
        batch, tokens, _ = hidden_states.shape
        if tokens != len(self.layout):
            laid_out = len(self.layout)
            raise InputError(f"The clip has {tokens} tokens and the layout {laid_out}: call attend_by with its layout.")
        query, key, value = (_heads(x, attn.heads) for x in _projected(attn, hidden_states))
        if rotary_emb is not None:
            query, key = (_rotated(x, *rotary_emb) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        form, scale = self._form(batch, query.device), query.shape[-1] ** -0.5
        output = self.attention.run(query, key, value, form, scale, self.rule.name)
        output = output.transpose(1, 2).flatten(2).type_as(query)
        for layer in attn.to_out:
            output = layer(output)
        return output


def _projected(attn: WanAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [B, N, C]."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(x).chunk(3, -1)
    else:
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    return attn.norm_q(query), attn.norm_k(key), value


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1))


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, N, H, D] turned by angles [1, N, 1, D] that stand twice each; neighbouring numbers are a pair."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[..., ::2], sine[..., ::2]
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2).type_as(x)
