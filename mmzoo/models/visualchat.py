"""DeepSpeed-VisualChat: several images over several rounds, under multi-modal causal attention (MMCA).

Source: "DeepSpeed-VisualChat: Multi-Round Multi-Image Interleave Chat via Multi-Modal Causal Attention",
arXiv 2309.14327. Parameter names are those of a model that the authors' code saved.

Shape legend: B batch, L tokens, N images, M images of the fullest sample, P patches, V visual tokens of an image, D
width of the features.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from mmzoo.attention.maps import AttentionMaps
from mmzoo.connectors.visualchat_projections import PerceiverProjection, VitProjection, baseline_projection
from mmzoo.encoders.qwen_vit import QwenVisionConfig
from mmzoo.encoders.vision import as_vision_config, build_vision_encoder, patch_features
from mmzoo.errors import CheckpointError, InputError
from mmzoo.hub import tensor_shapes
from mmzoo.language import MultimodalConfig, MultimodalLM, media_starts
from mmzoo.layout import Span, TokenLayout, image
from mmzoo.processing import IMAGE, VIDEO, MultimodalProcessor, Turn, word_tokenizer
from mmzoo.world import VOCABULARY

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
EMPTY = {"zero": "zero", "upstream": "uniform"}
"""Name of the option -> what the rule calls it."""


class VisualChatConfig(MultimodalConfig):
    """Configuration of DeepSpeed-VisualChat.

    Attributes:
        vision_config: the tower: Qwen-VL's (the paper's) or a CLIP config.
        projection: "baseline" (the paper's, and the only one with Qwen-VL's tower), "vit" or "perceiver".
        projection_options: num_queries and head_dim of the perceiver.
        own_prompt_embeddings: prompts are embedded by a table of their own, `lang_embed`, and decoded tokens by the
            language model's, as in a model that the authors' code trained; otherwise one table serves both.
        image_order: which image stands in which place: "natural", or "upstream", where the first image stands in the
            last place of its sample and so on backwards, as the authors' code trained it.
        empty_branch: what an attention branch without an open key adds: "zero", the paper's definition, or "upstream",
            a mean that reaches later images, as the authors' code ran. Kept in `rule_options`.
    """

    model_type = "mmzoo_visualchat"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        projection: str = "baseline",
        projection_options: dict[str, int] | None = None,
        own_prompt_embeddings: bool = False,
        image_order: str = "natural",
        empty_branch: str | None = None,
        rule: str = "mmca",
        rule_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if image_order not in ("natural", "upstream"):
            raise InputError(f"image_order is 'natural' or 'upstream', not {image_order!r}.")
        if empty_branch is not None:
            if empty_branch not in EMPTY or rule != "mmca" or rule_options:
                raise InputError(
                    f"empty_branch={empty_branch!r}: give 'zero' or 'upstream', for the rule 'mmca' and without "
                    "rule_options."
                )
            rule_options = {"empty": EMPTY[empty_branch]}
        self.vision_config = as_vision_config(
            {"model_type": "mmzoo_qwen_vit"} if vision_config is None else vision_config
        )
        self.projection, self.projection_options = projection, projection_options or {}
        self.own_prompt_embeddings, self.image_order = own_prompt_embeddings, image_order
        super().__init__(
            text_config=text_config or {"model_type": "llama"}, rule=rule, rule_options=rule_options, **kwargs
        )

    @property
    def num_vision_tokens(self) -> int:
        """V, tokens of one image."""
        if isinstance(self.vision_config, QwenVisionConfig):
            return self.vision_config.num_queries
        if self.projection == "perceiver":
            return self.projection_options.get("num_queries", 256)
        return 1 + (self.vision_config.image_size // self.vision_config.patch_size) ** 2


class VisualChat(MultimodalLM):
    """DeepSpeed-VisualChat. `processor.chat(...)` gives what `forward` and `generate` take."""

    config: VisualChatConfig
    config_class = VisualChatConfig

    def __init__(self, config: VisualChatConfig):
        super().__init__(config)
        self.vis_encoder, width = build_vision_encoder(config.vision_config)
        self.projection = _projection(config, width)
        self.lang_decoder = AutoModelForCausalLM.from_config(config.text_config)
        self.lang_embed = None
        if config.own_prompt_embeddings:
            self.lang_embed = copy.deepcopy(self.lang_decoder.get_input_embeddings())
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.lang_decoder

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """float [N, P, D]: Qwen-VL's tokens, or CLIP's patches after the class token."""
        return patch_features(self.vis_encoder, pixel_values, class_token=True)

    def grid_features(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.config.vision_config, QwenVisionConfig):
            return self.vis_encoder.patches(pixel_values)
        return patch_features(self.vis_encoder, pixel_values)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        return self.projection(self.patch_features(pixel_values))

    def patch_weights(self, pixel_values: Tensor) -> Tensor:
        """float [N, V, P]. CLIP's class token stands for the whole image: it takes the same from every patch."""
        if isinstance(self.config.vision_config, QwenVisionConfig):
            return self.vis_encoder.attn_pool.patch_weights(self.vis_encoder.patches(pixel_values))
        features = self.patch_features(pixel_values)
        if isinstance(self.projection, PerceiverProjection):
            return self.projection.patch_weights(features)
        count = features.shape[1] - 1
        own = torch.eye(count, device=features.device)
        return torch.cat([torch.full_like(own[:1], 1 / count), own]).expand(len(features), -1, -1)

    def word_embeddings(self, input_ids: Tensor, layout: TokenLayout | None) -> Tensor:
        if layout is None or self.lang_embed is None:
            return super().word_embeddings(input_ids, layout)
        return self.lang_embed(input_ids)

    def encode_media(self, layout: Tensor | TokenLayout, pixel_values: Tensor) -> Tensor:
        tokens = super().encode_media(layout, pixel_values)
        if self.config.image_order == "natural":
            return tokens
        layout = layout if isinstance(layout, TokenLayout) else TokenLayout(layout)
        if not torch.compiler.is_compiling() and int(layout.sample.max()) > 0:
            raise InputError("image_order='upstream' turns the images of a whole row round: do not pack samples.")
        last, most = media_starts(layout).sum(1, keepdim=True) - 1, tokens.shape[1]
        order = (last - torch.arange(most, device=tokens.device)) % most
        return tokens.gather(1, order[..., None, None].expand_as(tokens))

    def attention_maps(self, *prompt: Any, **options: Any) -> AttentionMaps:
        """`Asking.attention_maps`; the frames come in the order in which they stand in the prompt."""
        maps = super().attention_maps(*prompt, **options)
        if self.config.image_order == "natural":
            return maps
        return replace(maps, frames=maps.frames[::-1], patch_weights=maps.patch_weights.flip(0))

    def generate(self, input_ids: Tensor, layout: Tensor | TokenLayout | None = None, **kwargs: Any) -> Any:
        """`MultimodalLM.generate`.

        Raises:
            InputError: the model has two embedding tables, and prompt and decoded tokens would come in one pass, in
                which nothing tells them apart.
        """
        options = kwargs.get("generation_config") or self.generation_config
        chosen = {**{name: getattr(options, name, None) for name in _MIXING}, **kwargs}
        mixing = [name for name in _MIXING if (chosen[name] is False if name == "use_cache" else chosen[name])]
        if self.lang_embed is not None and mixing:
            raise InputError(
                f"This model embeds prompt and decoded tokens by two tables, which {mixing[0]}={chosen[mixing[0]]!r} "
                "would mix. Decode with the cache, one token at a time."
            )
        return super().generate(input_ids, layout, **kwargs)


_MIXING = ("use_cache", "prefill_chunk_size", "prompt_lookup_num_tokens", "assistant_model")
"""Options of `generate` under which one pass holds more than the prompt or one decoded token; `use_cache` if false."""


def _projection(config: VisualChatConfig, width: int) -> nn.Module:
    tower, size = config.vision_config, config.text_config.hidden_size
    if not isinstance(tower, (QwenVisionConfig, CLIPVisionConfig)):
        raise InputError(f"DeepSpeed-VisualChat's tower is Qwen-VL's or CLIP, not {tower.model_type!r}.")
    if config.projection == "baseline":
        return baseline_projection(width, size)
    if config.projection == "vit" and isinstance(tower, CLIPVisionConfig):
        return VitProjection(tower, size)
    if config.projection == "perceiver" and isinstance(tower, CLIPVisionConfig):
        return PerceiverProjection(width, size, **config.projection_options)
    raise InputError(
        f"The projection is 'baseline', or with a CLIP tower also 'vit' or 'perceiver'; not {config.projection!r} with "
        f"{tower.model_type!r}."
    )


@dataclass(frozen=True)
class Round:
    """One round of a conversation.

    Attributes:
        question: plain text.
        images: those that arrive with it: anything `read_image` takes.
        answer: what was said; None where the model is to answer, which is in the last round only.
    """

    question: str
    images: Sequence[Any] = ()
    answer: str | None = None


def round_prompt(question: str, media: Sequence[str] = (), *, seen: int = 0, system: str = "") -> str:
    """The text of one round before its answer, as in training and in the authors' chat.

    Args:
        question: plain text; places of media and line breaks are taken out.
        media: `<image>`, or `<video>` for frames that are numbered when they are read, for each that arrives.
        seen: images of earlier rounds: they are numbered over the whole conversation.
        system: the sentence with which the first round opens.
    """
    lines = [place if place == VIDEO else f"### Image {seen + i}:\n{place}" for i, place in enumerate(media, 1)]
    plain = " ".join(filter(None, re.split(rf"\s*(?:{IMAGE}|{VIDEO}|\n)\s*", question)))
    opening, places = f"{system}\n\n" if system else "", "\n".join(lines) + "\n\n" if lines else ""
    return f"{opening}{places}### Question:\n{plain}\n\n### Answer:\n"


class VisualChatProcessor(MultimodalProcessor):
    """Conversations about images for DeepSpeed-VisualChat; every frame of a video takes its place as one image.

    A text holds rounds, each ended by the end-of-sequence token. Every round is encoded by itself, hence begins with
    the beginning-of-sequence token, and is cut by itself.

    Args:
        num_vision_tokens: tokens of one image.
        system: the sentence with which a conversation opens; empty for none.
        max_images: of one sample, frames included.
        turn_marker: the beginning-of-sequence token.
    """

    multi_turn = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_vision_tokens: int = 256,
        system: str = SYSTEM,
        max_images: int = 8,
        num_frames: int = 8,
        answer_marker: str = "\n\n### Answer:\n",
        turn_marker: str = "<s>",
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, num_frames, answer_marker, turn_marker, chat_template)
        self.num_vision_tokens, self.system, self.max_images = num_vision_tokens, system, max_images

    def image_span(self, pixels: Tensor) -> Span:
        return image(self.num_vision_tokens, grid=False)

    def frame_places(self, count: int, before: int) -> str:
        return "\n".join(f"### Image {before + i}:\n{IMAGE}" for i in range(1, count + 1))

    def prompt(self, question: str, media: str = "", *, system: str | None = None) -> str:
        """The first round of a conversation."""
        places = re.findall(f"{IMAGE}|{VIDEO}", media)
        return round_prompt(self._within_round(question), places, system=self.system if system is None else system)

    def conversation(self, rounds: Sequence[Round]) -> str:
        """The text of a conversation, ready for an answer if the last round has none.

        Raises:
            InputError: there is no round, or one before the last has no answer.
        """
        unanswered = [i for i, one in enumerate(rounds, 1) if one.answer is None]
        if not rounds or unanswered not in ([], [len(rounds)]):
            raise InputError(f"Of {len(rounds)} rounds, {unanswered} have no answer; only the last may have none.")
        said, seen = "", 0
        for i, one in enumerate(rounds):
            system = "" if i else self.system
            said += round_prompt(self._within_round(one.question), [IMAGE] * len(one.images), seen=seen, system=system)
            said += "" if one.answer is None else self._within_round(one.answer) + self.tokenizer.eos_token
            seen += len(one.images)
        return said

    def dialogue(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """As every family's; images are numbered over the whole dialogue.

        Raises:
            InputError: an image comes after a video, whose number of frames a text does not know.
        """
        said, seen = "", 0
        for i, turn in enumerate(turns):
            media = re.findall(f"{IMAGE}|{VIDEO}", turn.media)
            if IMAGE in re.sub(f"^(?:{IMAGE})*", "", "".join(one.media for one in turns[: i + 1])):
                raise InputError("An image after a video cannot be numbered. Put images before videos.")
            opening = "" if i else self.system if system is None else system
            said += round_prompt(self._within_round(turn.question), media, seen=seen, system=opening)
            said += self._within_round(turn.answer) + self.tokenizer.eos_token
            seen += len(media)
        return said

    def chat(self, rounds: Sequence[Round], **options: Any) -> BatchFeature:
        """The inputs of one conversation; options as `__call__`'s."""
        images = [picture for one in rounds for picture in one.images]
        return self(self.conversation(rounds), images=images, **options)

    def _within_round(self, text: str) -> str:
        return text.replace(self.tokenizer.eos_token, "")

    def encode(self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """The ids of one sample's rounds; each is cut at max_length by itself, before its end-of-sequence token.

        Raises:
            InputError: a round's answer marker is not among its ids, so that prompt and answer cannot be told apart.
        """
        rounds, ids, marker = text.split(self.tokenizer.eos_token), [], self.marker_ids(self.answer_marker)
        for i, one in enumerate(rounds):
            if one or i < len(rounds) - 1:
                kept = super().encode(one, add_special_tokens=add_special_tokens, max_length=max_length)
                if self.answer_marker in one and not _holds(kept, marker):
                    raise InputError(
                        f"The marker {self.answer_marker!r} of round {i + 1} is not among the {len(kept)} ids: it was "
                        f"cut off (max_length={max_length}), or the tokenizer joins it with what stands before."
                    )
                ids += kept
            if i < len(rounds) - 1:
                ids.append(self.tokenizer.eos_token_id)
        return ids

    def marker_ids(self, marker: str) -> list[int]:
        """The ids of a marker inside a text; at its beginning, tokenizers such as LLaMA's would add a space."""
        before, whole = super().marker_ids("a"), super().marker_ids(f"a{marker}")
        return whole[len(before) :]

    def lay_out(self, tokens: Sequence[int], media: Sequence[Span]) -> tuple[list[int], TokenLayout]:
        if len(media) > self.max_images:
            raise InputError(
                f"A sample has {len(media)} images or frames; the model was made for at most {self.max_images}. "
                "Give fewer, or raise processor.max_images."
            )
        return super().lay_out(tokens, media)


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(ids[i : i + len(part)]) == list(part) for i in range(len(ids) - len(part) + 1))


def clip_image_processor(side: int) -> CLIPImageProcessorPil:
    """Shortest edge to `side` (bicubic), centre crop, CLIP's mean and standard deviation."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


MODEL, PROCESSOR = VisualChat, VisualChatProcessor
AutoConfig.register(VisualChatConfig.model_type, VisualChatConfig, exist_ok=True)

_LLAMA_2 = {
    "model_type": "llama",
    "vocab_size": 32003,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
"""With the three tokens that are added to LLaMA-2's 32000."""

_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}

_TINY_WORDS = (*VOCABULARY, "###", "Image", *(f"{i}:" for i in range(1, 9)), "Question:", "Answer:")

_TINY_TEXT = {
    "model_type": "llama",
    "vocab_size": len(word_tokenizer(_TINY_WORDS)),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 7,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "visualchat-7b": {
        "text_config": {
            **_LLAMA_2,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    },
    "visualchat-13b": {
        "text_config": {
            **_LLAMA_2,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    },
    "visualchat-tiny": {
        "text_config": _TINY_TEXT,
        "vision_config": {
            "model_type": "mmzoo_qwen_vit",
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "position_side": 2,
            "output_dim": 32,
            "num_queries": 4,
            "pool_head_dim": 16,
        },
    },
    "visualchat-nano": {
        "text_config": {
            **_TINY_TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "initializer_range": 0.1,
        },
        "vision_config": {
            "model_type": "mmzoo_qwen_vit",
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "position_side": 4,
            "output_dim": 64,
            "num_queries": 4,
            "pool_head_dim": 16,
        },
    },
}

NUM_FRAMES = {"visualchat-tiny": 4, "visualchat-nano": 8}


def processor(name: str, config: VisualChatConfig) -> VisualChatProcessor | None:
    """The processor of a model with random weights; None where its tokenizer would have to be downloaded."""
    if name not in NUM_FRAMES:
        return None
    pixels, tokenizer = clip_image_processor(config.vision_config.image_size), word_tokenizer(_TINY_WORDS)
    return VisualChatProcessor(pixels, tokenizer, config.num_vision_tokens, system="", num_frames=NUM_FRAMES[name])


def is_release(described: dict[str, Any]) -> bool:
    """Whether a config.json is that of a model the authors' code saved: a LLaMA configuration with their switch."""
    return "enable_mmca_attention" in described


def read_release(folder: Path, described: dict[str, Any]) -> tuple[VisualChatConfig, VisualChatProcessor]:
    """Configuration and processor of a model that the authors' code saved.

    Such a folder holds the language model's config.json, the weights, and the tokenizer. The tower is known by its
    parameters and has the sizes that the authors used, unless config.json names others under "vision_config".

    Raises:
        CheckpointError: the tokenizer is missing or has more tokens than the tables, or the projection is unknown.
    """
    shapes = tensor_shapes(folder)
    with_qwen, with_mmca = "vis_encoder.conv1.weight" in shapes, described["enable_mmca_attention"]
    text = {name: value for name, value in described.items() if name not in _NOT_READ}
    rows = shapes.get("lang_decoder.model.embed_tokens.weight", (described.get("vocab_size"),))[0]
    config = VisualChatConfig(
        text_config={**text, "model_type": "llama", "vocab_size": rows},
        vision_config=described.get("vision_config", {"model_type": "mmzoo_qwen_vit"} if with_qwen else _CLIP_L),
        projection=_projection_in(shapes),
        own_prompt_embeddings="lang_embed.weight" in shapes,
        image_order="upstream",
        **({"empty_branch": "upstream"} if with_mmca else {"rule": "causal"}),
    )
    pixels, tokenizer = clip_image_processor(config.vision_config.image_size), _read_tokenizer(folder, rows)
    return config, VisualChatProcessor(pixels, tokenizer, config.num_vision_tokens)


_NOT_READ = ("enable_mmca_attention", "vision_config", "architectures", "rope_theta", "rope_scaling", "rope_parameters")
"""The authors' LLaMA rotates with the base 10000 whatever its configuration says, which is the default."""


def _projection_in(shapes: dict[str, tuple[int, ...]]) -> str:
    marks = {
        "baseline": "projection.0.weight",
        "vit": "projection.projection.0.weight",
        "perceiver": "projection.query",
    }
    names = [name for name, mark in marks.items() if mark in shapes]
    if not names:
        raise CheckpointError("The checkpoint holds no projection of DeepSpeed-VisualChat.", missing=marks.values())
    return names[-1]


def _read_tokenizer(folder: Path, rows: int) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} holds no tokenizer. Put the files of LLaMA-2's tokenizer beside config.json.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["### Image:", IMAGE], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_tokens(["<PAD>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > rows:
        raise CheckpointError(f"The tokenizer has {len(tokenizer)} tokens, the checkpoint's tables {rows} rows.")
    return tokenizer
