"""Any Hugging Face causal language model, driven by layout + rule + scheme.

The backbone stays a stock transformers model. It is handed inputs_embeds, explicit position ids and a ready mask; all
three are derived here from the TokenLayout that travels with the batch.

Shape legend: B batch, L tokens, K layout fields, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmzoo import masks, positions
from mmzoo.asking import Asking
from mmzoo.attention.backends import backend
from mmzoo.attention.compiler import looks_ahead
from mmzoo.attention.prefix import PrefixCache, SharedMask
from mmzoo.attention.transformers import (
    IMPLEMENTATIONS,
    PAIR_IMPLEMENTATIONS,
    SHARED_IMPLEMENTATIONS,
    Pair,
    backbone_mask,
    implementation,
    implementations,
    passed_on,
)
from mmzoo.decoding import CACHE, Decoding, text_layout
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import Modality, Role, TokenLayout
from mmzoo_kernels.flash import FlashMask

_BACKENDS = {name: attention for attention, name in (*IMPLEMENTATIONS.items(), *PAIR_IMPLEMENTATIONS.items())}
"""transformers' name -> mmzoo's backend name."""


class MultimodalConfig(PreTrainedConfig):
    """Configuration of a language model driven by layout + rule + scheme.

    Attributes:
        text_config: the backbone's own transformers configuration.
        rule: name of the mask in `mmzoo.masks.RULES`.
        rule_options: keyword arguments of that rule.
        scheme: name of the positions in `mmzoo.positions.SCHEMES`.
        scheme_options: keyword arguments of that scheme.
    """

    model_type = "mmzoo_language"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        rule: str = "causal",
        rule_options: dict[str, Any] | None = None,
        scheme: str = "sequential",
        scheme_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.rule, self.rule_options = rule, rule_options or {}
        self.scheme, self.scheme_options = scheme, scheme_options or {}
        super().__init__(**kwargs)


class MultimodalLM(Asking, Decoding, PreTrainedModel, GenerationMixin):
    """Base of the understanding models. A family adds its encoder and connector and overrides `embed`.

    `forward` and `generate` take the ids with every media token in place, and the batch's layout [B, L, K].
    """

    config: MultimodalConfig
    config_class = MultimodalConfig
    main_input_name = "input_ids"
    media_inputs: tuple[str, ...] = ("pixel_values",)
    """What of a batch holds its media: the arguments of `encode_media` after the layout."""
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MultimodalConfig):
        super().__init__(config)
        self.rule = masks.rule(config.rule, **config.rule_options)
        self.scheme = positions.scheme(config.scheme, **config.scheme_options)

    @classmethod
    def build(cls, fields: dict[str, Any], dtype: torch.dtype) -> MultimodalLM:
        """A model with random weights from the fields of its configuration."""
        return cls._from_config(cls.config_class(**fields), dtype=dtype)

    def post_init(self) -> None:
        """transformers' last step of construction; here the backbone gets attention that runs the rule."""
        super().post_init()
        self.set_attn_implementation(self.language_model.config._attn_implementation)

    @property
    def rule_name(self) -> str:
        """The rule's name in the literature, or the names of a pair."""
        return " + ".join(rule.name for rule in (self.rule if isinstance(self.rule, tuple) else (self.rule,)))

    @property
    def decodes_causally(self) -> bool:
        """Whether decoding may use the ordinary padding mask: generated text sees its whole past in one softmax."""
        return isinstance(self.rule, masks.Rule) and self.rule.decodes_causally

    @property
    def language_model(self) -> PreTrainedModel:
        """The backbone: a transformers causal language model."""
        raise NotImplementedError

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """float [N, P, D] of N images or frames: what the family's connector is given."""
        raise NotImplementedError

    def grid_features(self, pixel_values: Tensor) -> Tensor:
        """float [N, P, D] of the patches alone, in raster order, before anything pools them."""
        return self.patch_features(pixel_values)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """Tokens [N, V, D] of N images or frames [N, ...]: the family's encoder and connector."""
        raise NotImplementedError

    def clip_tokens(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [N, M, V, D] of N clips [N, F, C, H, W], as `place` takes them; each frame is a medium."""
        return self.visual_tokens(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])

    def patch_weights(self, pixel_values: Tensor) -> Tensor:
        """float [N, V, P]: how much each visual token takes from each patch. Here: one token a patch."""
        count, tokens = self.visual_tokens(pixel_values).shape[:2]
        return torch.eye(tokens, device=pixel_values.device).expand(count, -1, -1)

    def word_embeddings(self, input_ids: Tensor, layout: TokenLayout | None) -> Tensor:
        """Embeddings [B, Q, D] of ids alone; `layout` is None while decoding."""
        return self.get_input_embeddings()(input_ids)

    def embed(
        self,
        input_ids: Tensor,
        layout: TokenLayout | None,
        pixel_values: Tensor | None = None,
        visual_embeds: Tensor | None = None,
        **media: Tensor | None,
    ) -> Tensor:
        """Embeddings [B, Q, D] of the tokens, media in their places.

        Args:
            input_ids: int64 [B, Q].
            layout: of these tokens; None while decoding text.
            pixel_values: [B, M, ...]: the images or frames of each row in order, then padding.
            visual_embeds: [B, M, V, D] that `encode_media` gave, in place of the media.
            **media: what else the family's `encode_media` takes.

        Raises:
            InputError: media and visual tokens do not agree.
        """
        embeddings = self.word_embeddings(input_ids, layout)
        if pixel_values is None and visual_embeds is None:
            if layout is not None and not torch.compiler.is_compiling() and bool(layout.visual.any()):
                raise InputError("The layout has visual tokens, but no pixel_values were given.")
            return embeddings
        if layout is None:
            raise InputError("Media need the batch's layout. The model's processor gives both.")
        if visual_embeds is None:
            visual_embeds = self.encode_media(layout, pixel_values, **media)
        elif pixel_values is not None or any(one is not None for one in media.values()):
            raise InputError(f"visual_embeds stand in place of {' and '.join(self.media_inputs)}: leave these out.")
        return self.place(embeddings, layout, visual_embeds)

    def encode_media(self, layout: Tensor | TokenLayout, pixel_values: Tensor) -> Tensor:
        """Visual tokens [B, M, V, D] of a batch's media; give them as `visual_embeds` to ask again about the same.

        Args:
            layout: [B, L, K] of the batch.
            pixel_values: [B, M, ...]: the images or frames of each row in order, then padding.

        Raises:
            InputError: the layout has more media than there are pixels.
        """
        layout = layout if isinstance(layout, TokenLayout) else TokenLayout(layout)
        most, count = pixel_values.shape[1], media_starts(layout).sum(1)
        if not torch.compiler.is_compiling() and int(count.max()) > most:
            raise InputError(
                f"A sample has {int(count.max())} images or frames in its layout, pixel_values has {most}."
            )
        real = torch.arange(most, device=count.device) < count[:, None]
        return encode_real(self.visual_tokens, self.as_input(pixel_values), real)

    def as_input(self, pixel_values: Tensor) -> Tensor:
        """Pixels in the model's precision."""
        return pixel_values.to(self.get_input_embeddings().weight.dtype)

    def place(self, embeddings: Tensor, layout: TokenLayout, tokens: Tensor) -> Tensor:
        """Embeddings [B, Q, D] with each row's visual tokens [B, M, V, D] in the layout's visual places, in order.

        Raises:
            InputError: there are more or fewer tokens than places.
        """
        starts, visual = media_starts(layout), layout.visual
        per_medium = tokens.shape[2]
        if not torch.compiler.is_compiling() and int(starts.sum(1).max()) > tokens.shape[1]:
            most = int(starts.sum(1).max())
            raise InputError(f"A sample has {most} media in its layout, but tokens of {tokens.shape[1]} were given.")
        if not torch.compiler.is_compiling() and int(visual.sum()) != int(starts.sum()) * per_medium:
            raise InputError(
                f"The connector gives {per_medium} tokens an image or frame, but the layout has "
                f"{int(visual.sum())} places for {int(starts.sum())} of them."
            )
        number = (visual.cumsum(1) - 1).clamp(min=0, max=tokens.shape[1] * per_medium - 1)
        gathered = tokens.flatten(1, 2).gather(1, number[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.where(visual[..., None], gathered.to(embeddings.dtype), embeddings)

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **options: Any) -> None:
        """As `mmzoo.hub.save`: with the processor, with digests, and each file whole or not at all."""
        from mmzoo import hub

        if is_main_process:
            hub.save(self, save_directory, **options)

    def write_files(self, folder: str | Path, **options: Any) -> None:
        """transformers' own `save_pretrained`: configuration and weights alone."""
        super().save_pretrained(folder, **options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        max_shard_size: int | str = "5GB",
        **options: Any,
    ) -> str:
        """transformers' name for `mmzoo.push`, which takes the other options; processor and card go with the model."""
        from mmzoo import hub

        return hub.push(
            self,
            repo_id,
            message=commit_message,
            private=private,
            token=token,
            revision=revision,
            max_shard_size=max_shard_size,
            **options,
        )

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model.get_decoder()

    @property
    def masked_connector(self) -> Any:
        """The connector that attends under a `rule` of its own, on the backend `attention`; None where none does."""
        return None

    @property
    def connector_rule(self) -> masks.Rule | None:
        """The mask inside the connector, where it has one."""
        return None if self.masked_connector is None else self.masked_connector.rule

    def set_attention(self, attention: str) -> None:
        """Choose the backend by its name in `mmzoo.attention.BACKENDS`, for a connector with a mask, too.

        Raises:
            UnsupportedMask: the backend cannot express this model's rule, or has no kernel for its heads.
            MissingExtra: its package is not installed.
        """
        text = self.language_model.config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if self.masked_connector is not None:  # refused before anything is changed
            backend(attention, self.masked_connector.rule, device=self.device)
        self.language_model.set_attn_implementation(implementation(attention, self.rule, self.device, head_dim))
        if self.masked_connector is not None:
            self.masked_connector.attention = attention

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **kwargs: Any) -> None:
        """transformers' name for `set_attention`; a backend that would drop the mask is refused."""
        if not isinstance(attn_implementation, str):
            raise InputError("Give one attention backend by name; a multimodal rule covers the whole language model.")
        self.set_attention(_BACKENDS.get(attn_implementation, attn_implementation))

    def mask(self, layout: TokenLayout, num_queries: int, cache: Cache | None = None) -> Any:
        """The mask of the last `num_queries` tokens of the layout, in the form that the backbone takes.

        One token of a rule under which generated text sees all its past takes the ordinary padding mask.
        """
        config = self.language_model.config
        chosen = config._attn_implementation
        if chosen not in implementations(self.rule).values():
            implementation(_BACKENDS.get(chosen, chosen), self.rule)
            raise UnsupportedMask(chosen, self.rule_name, "it does not run this kind of rule; call set_attention")
        if num_queries == 1 and len(layout) > 1 and self.decodes_causally:
            return layout.attention_mask
        return backbone_mask(self.rule, layout, num_queries, cache, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        layout: Tensor | TokenLayout | None = None,
        pixel_values: Tensor | None = None,
        visual_embeds: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass.

        Args:
            input_ids: int64 [B, Q], media tokens in place.
            layout: [B, L, K] of every token so far; the last Q are `input_ids`. Without one, all tokens are text.
            pixel_values: [B, M, ...]: the images or frames of each row.
            visual_embeds: [B, M, V, D] that `encode_media` gave, in place of the media.
            attention_mask: without a layout, the padding mask [B, L]; or a mask made by `mask`.
            position_ids: [B, Q]; the scheme's if None.
            inputs_embeds: [B, Q, D] instead of what `embed` gives.
            labels: int64 [B, Q], -100 where there is no loss; the next-token shift happens here.
            cache: keys and values of the first L - Q tokens (transformers before 5.24: past_key_values).
            logits_to_keep: only the logits of the last tokens; 0 is all.
            **kwargs: the rest of `media_inputs`, and what the backbone takes.

        Returns:
            loss (with labels) and logits [B, Q, V].

        Raises:
            InputError: a mask in another format than `mask` gives, or positions that mean packing, without a layout.
            UnsupportedMask: tokens in the cache would have seen some of these, which came too late.
        """
        cache = past_key_values if cache is None else cache
        media = {name: kwargs.pop(name, None) for name in self.media_inputs if name != "pixel_values"}
        num_queries = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if layout is None and not self._is_ready(attention_mask, position_ids, num_queries, cache):
            past = 0 if cache is None else int(cache.get_seq_length())
            _refuse_packing(position_ids, attention_mask)
            layout = text_layout(
                attention_mask, past + num_queries, input_ids if inputs_embeds is None else inputs_embeds
            )
        if layout is not None:
            layout = layout if isinstance(layout, TokenLayout) else TokenLayout(layout)
            self._check_cut(layout, num_queries)
            attention_mask = self.mask(layout, num_queries, cache)
            position_ids = self.scheme(layout)[:, -num_queries:] if position_ids is None else position_ids
        if inputs_embeds is None:
            given = None if layout is None else layout[-num_queries:]
            inputs_embeds = self.embed(input_ids, given, pixel_values, visual_embeds, **media)
        with self._attending_to(cache) as shared:
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                position_ids=position_ids,
                use_cache=bool(use_cache) or cache is not None,
                logits_to_keep=logits_to_keep,
                **passed_on(attention_mask),
                **shared,
                **{CACHE: cache},
                **kwargs,
            )
        outputs.loss = None if labels is None else next_token_loss(outputs.logits, labels)
        return outputs

    @contextmanager
    def _attending_to(self, cache: Cache | None) -> Iterator[dict[str, PrefixCache]]:
        """Attention over a cache, with what tells it of a prefix that exists once for the whole batch."""
        if not isinstance(cache, PrefixCache):
            yield {}
            return
        config = self.language_model.config
        chosen = config._attn_implementation
        config._attn_implementation = self._apart(_BACKENDS.get(chosen, chosen))
        try:
            yield {"shared_prefix": cache}
        finally:
            config._attn_implementation = chosen

    def _apart(self, attention: str) -> str:
        """transformers' name of a backend that attends to a shared prefix apart."""
        others: Iterable[str] = SHARED_IMPLEMENTATIONS
        if isinstance(self.rule, tuple):
            reason, others = "keys that exist once are attended to apart, which is done for single rules only", ()
        elif attention not in SHARED_IMPLEMENTATIONS:
            reason = "keys that exist once are attended to apart and merged, and it gives no log-sum-exp here"
        elif attention != "eager" and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            reason, others = "it has no gradient there without torch.no_grad()", ("eager",)
        elif attention != "eager" and self.device.type not in ("cpu", "cuda"):
            reason, others = f"it gives no log-sum-exp on {self.device}", ("eager",)
        else:
            return SHARED_IMPLEMENTATIONS[attention]
        raise UnsupportedMask(f"{attention} with a shared prefix", self.rule_name, reason, others)

    def _check_cut(self, layout: TokenLayout, num_queries: int) -> None:
        """Whether the cache may end where these tokens begin; an answer's next token always may come alone."""
        cut, last = len(layout) - num_queries, layout[-1:]
        if cut == 0 or torch.compiler.is_compiling():
            return
        answers = (last.role == int(Role.ANSWER)) & (last.modality == int(Modality.TEXT))
        if num_queries == 1 and self.decodes_causally and bool(answers.all()):
            return
        if looks_ahead(self.rule, layout, cut):
            reason = f"it ends at token {cut}, where earlier tokens see later ones"
            raise UnsupportedMask("a cache", self.rule_name, reason)

    def _is_ready(
        self, attention_mask: Any, position_ids: Tensor | None, num_queries: int, cache: Cache | None
    ) -> bool:
        """Whether the backbone may take mask and positions as they are."""
        if isinstance(attention_mask, (dict, tuple, Pair, FlashMask, SharedMask)) or (
            attention_mask is not None and len(attention_mask.shape) == 4
        ):
            _check_finished(attention_mask, position_ids)
            return True
        decoding = num_queries == 1 and cache is not None and self.decodes_causally
        return decoding and position_ids is not None


class LanguageModel(MultimodalLM):
    """A Hugging Face causal language model alone, under a rule and a scheme."""

    media_inputs = ()

    def __init__(self, config: MultimodalConfig):
        super().__init__(config)
        self.model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model

    def embed(self, input_ids: Tensor, layout: TokenLayout | None, *media: Tensor | None) -> Tensor:
        """Embeddings [B, Q, D] of ids alone: whatever the layout calls them, visual tokens are ids of the table too."""
        return self.get_input_embeddings()(input_ids)


def encode_real(encode: Callable[[Tensor], Tensor], media: Tensor, real: Tensor) -> Tensor:
    """`encode` of media [B, M, ...], as [B, M, ...]. What only pads a batch gives 0 and is not encoded.

    A compiled graph has no data-dependent shapes, and encodes all.
    """
    if torch.compiler.is_compiling() or bool(real.all()):
        return encode(media.flatten(0, 1)).unflatten(0, real.shape)
    encoded = encode(media[real])
    return encoded.new_zeros(*real.shape, *encoded.shape[1:]).index_put((real,), encoded)


def media_starts(layout: TokenLayout) -> Tensor:
    """bool [B, L]: the first token of every image and frame."""
    run = layout.runs("sample", "segment", "frame")
    starts = layout.visual.clone()
    starts[:, 1:] &= run[:, 1:] != run[:, :-1]
    return starts


def _check_finished(mask: Any, position_ids: Tensor | None) -> None:
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise InputError(
            f"A mask of {mask.dtype} means another thing on every backend. Give a layout, or the mask that "
            "model.mask(layout, num_queries) makes."
        )
    if position_ids is None:
        raise InputError("A finished mask needs position_ids beside it: model.scheme(layout).")


def _refuse_packing(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Positions that do not go on by 1 are several packed samples to transformers, and would be one sample here."""
    if position_ids is None or attention_mask is not None or torch.compiler.is_compiling():
        return
    if bool((position_ids.diff(dim=-1) != 1).any()):
        raise InputError(
            "position_ids do not go on by 1, which transformers takes for packed samples. Say by a layout "
            "(mmzoo.layout.pack) which samples there are, or give an attention_mask if it is one."
        )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, L, V] at each place against the label [B, L] of the next; -100 is left out."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
