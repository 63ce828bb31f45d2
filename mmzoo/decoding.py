"""Decoding: transformers' `generate` under a rule, with the layout that grows beside the cache.

Shape legend: B batch, L tokens, Q new tokens, K layout fields, D hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmzoo.attention.compiler import prefill_cuts
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import TokenLayout, batch, lay_out, text

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else ("past_key_values")
)
"""What this version of transformers calls the key/value cache."""


class Decoding:
    """What a model driven by layout, rule and scheme does in `generate`: prefill under the rule, then with a cache."""

    def generate(self, input_ids: Tensor, layout: Tensor | TokenLayout | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`: prefill under the rule, then cached decoding. Returns prompt and new tokens.

        Args:
            input_ids: int64 [B, L], padded on the left.
            layout: [B, L, K]; without one, all tokens are text.
            **kwargs: media, and every option of transformers' `generate`.

        Raises:
            InputError: padding on the right, where new tokens would follow padding; or media that do not stand in the
                first chunk of a prefill by `prefill_chunk_size`.
            UnsupportedMask: `prefill_chunk_size` cuts where earlier tokens see later ones.
        """
        if layout is None:
            layout = text_layout(kwargs.get("attention_mask"), input_ids.shape[1], input_ids)
        layout = layout if isinstance(layout, TokenLayout) else TokenLayout(layout)
        if not bool(layout.valid[:, -1].all()):
            raise InputError("generate() needs padding on the left: a sample of this batch ends in padding.")
        self._check_prefill_chunks(layout, kwargs)
        kwargs["attention_mask"] = layout.attention_mask
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = self.scheme(layout)
        return super().generate(input_ids, layout=layout.data, **kwargs)

    def _check_prefill_chunks(self, layout: TokenLayout, kwargs: dict[str, Any]) -> None:
        options = kwargs.get("generation_config") or self.generation_config
        size = kwargs.get("prefill_chunk_size") or options.prefill_chunk_size
        if not size:
            return
        illegal = set(range(size, len(layout), size)) - set(prefill_cuts(self.rule, layout))
        if illegal:
            reason = f"prefill_chunk_size={size} cuts at token {min(illegal)}, where earlier tokens see later ones"
            raise UnsupportedMask("chunked prefill", self.rule_name, reason)
        media = any(kwargs.get(name) is not None for name in (*self.media_inputs, "visual_embeds"))
        if media and bool(layout.visual[:, size:].any()):
            raise InputError(f"prefill_chunk_size={size} is too small: all media have to stand in the first chunk.")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        layout: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' inputs, with the rule's mask in place of its own."""
        cache = kwargs.get(CACHE)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        num_queries = tokens.shape[1]
        past = 0 if cache is None else int(cache.get_seq_length())
        so_far = TokenLayout(layout[:, : past + num_queries])
        guessed = past + num_queries - len(so_far)  # by prompt-lookup or assisted decoding
        if guessed > 0:
            so_far = so_far.with_answer(guessed)
            inputs["position_ids"] = self._extended(kwargs["position_ids"], layout, guessed)[:, -num_queries:]
        if past == 0:  # `forward` needs the layout to place media, and makes the mask from it
            inputs["layout"] = so_far.data
        else:
            inputs["attention_mask"] = self.mask(so_far, num_queries, cache)
            media = {name: inputs.pop(name, None) for name in (*self.media_inputs, "visual_embeds")}
            if num_queries > 1 and bool(so_far[-num_queries:].visual.any()):
                inputs["inputs_embeds"] = self._embedded_later(input_ids, so_far, num_queries, media)
        return inputs

    def _embedded_later(
        self, input_ids: Tensor, layout: TokenLayout, num_queries: int, media: dict[str, Any]
    ) -> Tensor:
        """Embeddings [B, Q, D] of new tokens that hold media; `media` are those of the whole conversation."""
        if all(one is None for one in media.values()):
            return self.embed(input_ids[:, -num_queries:], layout[-num_queries:])
        if input_ids.shape[1] != len(layout):
            raise InputError(
                f"{input_ids.shape[1]} of {len(layout)} tokens were given, which does not say whose media these are. "
                "Give the whole conversation beside its cache."
            )
        return self.embed(input_ids, layout, **media)[:, -num_queries:]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = {name: value for name, value in model_kwargs.items() if name not in self.media_inputs}
        super()._validate_model_kwargs(known)

    def create_masks_for_generate(self, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """transformers' hook for static caches: the rule's mask is made in `prepare_inputs_for_generation`."""
        return attention_mask

    def _update_model_kwargs_for_generation(
        self,
        outputs: CausalLMOutputWithPast,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        position_ids = model_kwargs["position_ids"]
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        model_kwargs["position_ids"] = self._extended(position_ids, model_kwargs["layout"], num_new_tokens)
        model_kwargs["layout"] = TokenLayout(model_kwargs["layout"]).with_answer(num_new_tokens).data
        return model_kwargs

    def _extended(self, position_ids: Tensor, layout: Tensor, count: int) -> Tensor:
        """Position ids [B, L + count], whoever made the first L: each sample goes on from its largest one."""
        known, length = TokenLayout(layout), position_ids.shape[1]
        sample = (known if len(known) >= length else known.with_answer(length - len(known))).sample[:, :length]
        own = position_ids.masked_fill(sample != sample[:, -1:], -1)
        new = [own.amax(1, keepdim=True)]
        for _ in range(count):
            new.append(self.scheme.next(new[-1]))
        return torch.cat([position_ids, *new[1:]], 1)


def text_layout(attention_mask: Tensor | None, length: int, like: Tensor) -> TokenLayout:
    """The layout of text alone, [B, L, K], from a padding mask [B, L] (None: no padding)."""
    layout = batch([lay_out(text(length))] * like.shape[0]).to(like.device)
    if attention_mask is None:
        return layout
    if attention_mask.shape != layout.sample.shape:
        raise InputError(
            f"The padding mask is {tuple(attention_mask.shape)}, the tokens so far are {tuple(layout.sample.shape)}."
        )
    return layout.field("sample", torch.where(attention_mask.bool(), layout.sample, -1))
