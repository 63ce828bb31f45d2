"""Video-CCAM: SigLIP, a projector under a causal cross-attention mask, and a causal language model.

Source: "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and Long
Videos", arXiv 2408.14023. Everything but the projector follows the authors' code (v1.0); their projector is not public,
and `mmzoo.connectors.ccam` is this project's definition of it.

Shape legend: B rows, M items (images or clips) of a row, F frames, P patches of a frame, C width of the patches,
V visual tokens of an item, D width of the language model, L tokens, K layout fields.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmzoo import hub
from mmzoo.connectors.ccam import CCAMProjector
from mmzoo.encoders.vision import as_vision_config, build_vision_encoder, cut_at_layer, patch_features
from mmzoo.errors import CheckpointError, InputError, MissingExtra
from mmzoo.language import MultimodalConfig, MultimodalLM, encode_real, media_starts
from mmzoo.layout import Modality, Span, TokenLayout, image, video
from mmzoo.processing import IMAGE, MultimodalProcessor, Turn, word_tokenizer
from mmzoo.world import VOCABULARY


class VideoCCAMConfig(MultimodalConfig):
    """Configuration of Video-CCAM.

    Attributes:
        vision_config: the whole SigLIP tower.
        vision_feature_layer: the hidden state that the projector reads; what comes after it is not built.
        vision_chunk_size: frames that are encoded at a time; 0 is all at once.
        projector: options of `CCAMProjector`; its widths are those of the tower and the language model.
    """

    model_type = "mmzoo_video_ccam"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_feature_layer: int = -2,
        vision_chunk_size: int = 0,
        projector: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vision_config = as_vision_config(vision_config)
        self.vision_feature_layer, self.vision_chunk_size = vision_feature_layer, vision_chunk_size
        self.projector = projector or {}
        super().__init__(text_config=text_config or {"model_type": "phi3"}, **kwargs)


class VideoCCAM(MultimodalLM):
    """Video-CCAM. `processor(...)` gives what `forward` and `generate` take.

    A batch holds pixel_values [B, F, 3, H, W], the frames of a row's items one after another, and num_frames int64
    [B, M], how many each item has. An image is an item of one frame.
    """

    config: VideoCCAMConfig
    config_class = VideoCCAMConfig
    media_inputs = ("pixel_values", "num_frames")

    def __init__(self, config: VideoCCAMConfig):
        super().__init__(config)
        self.vision_encoder, width = build_vision_encoder(config.vision_config, config.vision_feature_layer)
        self.projector = CCAMProjector(width, config.text_config.hidden_size, **config.projector)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The projector keeps its own initialisation."""

    @property
    def language_model(self) -> PreTrainedModel:
        return self.llm

    @property
    def masked_connector(self) -> nn.Module:
        return self.projector

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """[N, P, C] of frames [N, 3, H, W], `vision_chunk_size` of them at a time."""
        chunks = pixel_values.split(self.config.vision_chunk_size or len(pixel_values) or 1)
        return torch.cat([patch_features(self.vision_encoder, chunk) for chunk in chunks])

    def visual_tokens(self, pixel_values: Tensor, num_frames: Tensor | None = None) -> Tensor:
        """[N, V, D] of images [N, 3, H, W], or of clips [N, F, 3, H, W] of int64 [N] frames; all F if None."""
        clips = pixel_values[:, None] if pixel_values.dim() == 4 else pixel_values
        if num_frames is None:
            num_frames = torch.full((len(clips),), clips.shape[1], device=clips.device)
        return self._projected(clips, num_frames[:, None])[:, 0]

    def encode_media(
        self, layout: Tensor | TokenLayout, pixel_values: Tensor, num_frames: Tensor | None = None
    ) -> Tensor:
        """Visual tokens [B, M, V, D] of a batch's items; give them as `visual_embeds` to ask again about the same.

        Args:
            layout: [B, L, K] of the batch.
            pixel_values: [B, F, 3, H, W]: the frames of a row's items one after another, then padding.
            num_frames: int64 [B, M]: frames of each item, then 0.

        Raises:
            InputError: layout, frames and num_frames do not agree.
        """
        if num_frames is None:
            raise InputError("pixel_values need num_frames [B, M], the frames of each item. The processor gives both.")
        if not torch.compiler.is_compiling():
            _check_items(layout if isinstance(layout, TokenLayout) else TokenLayout(layout), pixel_values, num_frames)
        return self._projected(self.as_input(pixel_values), num_frames)

    def _features(self, pixel_values: Tensor, num_frames: Tensor) -> Tensor:
        """[B, F, P, C] of the frames [B, F, 3, H, W] of rows; padding gives 0."""
        place = torch.arange(pixel_values.shape[1], device=num_frames.device)
        return encode_real(self.patch_features, pixel_values, place < num_frames.sum(1, keepdim=True))

    def _projected(self, pixel_values: Tensor, num_frames: Tensor) -> Tensor:
        return self.projector(self._features(pixel_values, num_frames), num_frames)

    def clip_tokens(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens [N, 1, V, D] of N clips [N, F, 3, H, W]: a clip is one medium."""
        return self.visual_tokens(pixel_values)[:, None]

    def patch_weights(self, pixel_values: Tensor, num_frames: Tensor) -> Tensor:
        """float [M, V, F * P]: how much each token of a row's items takes from each patch of the row's frames."""
        features = self._features(pixel_values[None], num_frames[None])
        return self.projector.patch_weights(features, num_frames[None])[0]


def _check_items(layout: TokenLayout, pixel_values: Tensor, num_frames: Tensor) -> None:
    rows, frames = pixel_values.shape[:2]
    if num_frames.dim() != 2 or len(num_frames) != rows or bool((num_frames < 0).any()):
        raise InputError(f"num_frames holds counts [{rows}, M] of {rows} rows, got {tuple(num_frames.shape)}.")
    most = int(num_frames.sum(1).max()) if num_frames.numel() else 0
    if most > frames:
        raise InputError(f"num_frames counts {most} frames in a row, pixel_values has {frames}.")
    items, places = (num_frames > 0).sum(1), media_starts(layout).sum(1)
    if not torch.equal(items, places):
        raise InputError(f"The rows have {items.tolist()} items in num_frames, but {places.tolist()} in the layout.")
    if bool((num_frames[:, 1:] > 0).logical_and(num_frames[:, :-1] == 0).any()):
        raise InputError("num_frames has an item of 0 frames before another one. Padding comes last.")


@dataclass(frozen=True)
class Chat:
    """How a base model writes a conversation.

    Attributes:
        opening: before the first turn.
        turn: a question `{}`, up to where the answer begins.
        end: after an answer.
        answer_marker, turn_marker: the texts that say who speaks.
        stop: tokens that end an answer.
    """

    turn: str
    end: str
    answer_marker: str
    turn_marker: str
    stop: tuple[str, ...]
    opening: str = ""


_CHATML = {
    "turn": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "end": "<|im_end|>\n",
    "answer_marker": "<|im_start|>assistant",
    "turn_marker": "<|im_start|>user",
}
_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

CHATS = {
    "phi3": Chat(
        turn="<|user|>\n{}<|end|>\n<|assistant|>\n",
        end="<|end|>\n",
        answer_marker="<|assistant|>",
        turn_marker="<|user|>",
        stop=("<|end|>", "<|endoftext|>"),
    ),
    "chatml": Chat(**_CHATML, stop=("<|im_end|>",)),
    "qwen2.5": Chat(
        **_CHATML,
        stop=("<|im_end|>", "<|endoftext|>"),
        opening=f"<|im_start|>system\n{_QWEN_SYSTEM}<|im_end|>\n",
    ),
}
CHAT_OF = {"phi3": "phi3", "llama": "chatml", "qwen2": "qwen2.5"}
"""model_type of the language model -> the chat of the one that Video-CCAM was trained on (llama is Yi-1.5)."""


class VideoCCAMProcessor(MultimodalProcessor):
    """Text, images and videos for Video-CCAM: an image or a whole clip takes `num_query` tokens.

    Args:
        num_query: V.
        chat: a name in `CHATS`.
        num_frames: the most frames taken from a clip: 16 in the authors' training, 32 in their demo, 96 in long-video
            benchmarks. A shorter clip gives all it has.
    """

    sampling = "ccam_uniform"
    multi_turn = True

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_query: int = 1024,
        chat: str = "phi3",
        num_frames: int = 32,
        chat_template: str | None = None,
    ):
        if chat not in CHATS:
            raise InputError(f"Unknown chat {chat!r}. Known: {', '.join(CHATS)}.")
        markers = CHATS[chat].answer_marker, CHATS[chat].turn_marker
        super().__init__(image_processor, tokenizer, num_frames, *markers, chat_template)
        self.num_query, self.chat = num_query, chat

    def to_dict(self) -> dict[str, Any]:
        """What is saved; the markers follow from the chat."""
        saved = super().to_dict()
        return {name: value for name, value in saved.items() if name not in ("answer_marker", "turn_marker")}

    @property
    def stop_ids(self) -> list[int]:
        """Ids of the tokens that end an answer. Raises InputError if the tokenizer lacks one."""
        known, stop = self.tokenizer.get_vocab(), CHATS[self.chat].stop
        if not known.keys() >= set(stop):
            raise InputError(f"The tokenizer lacks {' or '.join(stop)}, which end an answer of the chat {self.chat!r}.")
        return [known[token] for token in stop]

    def spans(self, pixels: Tensor, modality: Modality) -> list[Span]:
        """One span, whatever the number of frames."""
        is_video = modality == Modality.VIDEO
        return [video(1, self.num_query, grid=False) if is_video else image(self.num_query, grid=False)]

    def prompt(self, question: str, media: str = "", *, system: str | None = None) -> str:
        """The text that puts a question; places of media that it does not hold yet come before it."""
        self._refuse(system)
        return self.conversation([], question, media)

    def conversation(self, turns: Sequence[tuple[str, str]], question: str, media: str = "") -> str:
        """The text of earlier turns (question, answer), and of the question now.

        Args:
            turns: from the first on; `<image>` and `<video>` may stand in any question.
            question: the open one.
            media: places of media; they come before the first question if they do not stand in it already.
        """
        chat = CHATS[self.chat]
        questions = [*(asked for asked, _ in turns), question]
        if media and media not in questions[0]:
            questions[0] = f"{media}\n{questions[0]}"
        answers = [*(answer + chat.end for _, answer in turns), ""]
        said = (chat.turn.replace("{}", asked) + answer for asked, answer in zip(questions, answers, strict=True))
        return chat.opening + "".join(said)

    def dialogue(self, turns: Sequence[Turn], system: str | None = None) -> str:
        self._refuse(system)
        questions = [f"{turn.media}\n{turn.question}" if turn.media else turn.question for turn in turns]
        earlier = list(zip(questions, [turn.answer for turn in turns], strict=True))[:-1]
        return self.conversation(earlier, questions[-1]) + turns[-1].answer + CHATS[self.chat].end

    def _refuse(self, system: str | None) -> None:
        if system is not None:
            raise InputError("Video-CCAM was trained without system texts of the data's own, and has no place for one.")

    def encode(self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """The ids of a text. What stands between media is encoded on its own, as the authors do."""
        place = self.tokenizer.convert_tokens_to_ids(IMAGE)
        ids: list[int] = []
        for i, piece in enumerate(text.split(IMAGE)):
            ids += [place] if i else []
            ids += self.tokenizer(piece, add_special_tokens=add_special_tokens and not i)["input_ids"]
        return ids[:max_length]

    def lay_out(self, tokens: Sequence[int], media: Sequence[Span]) -> tuple[list[int], TokenLayout]:
        """Ids with media in place, as padding: the id of `<image>` need not be in the embedding table."""
        ids, layout = super().lay_out(tokens, media)
        visual = layout.visual[0].tolist()
        return [self.tokenizer.pad_token_id if seen else i for i, seen in zip(ids, visual, strict=True)], layout

    def collate(
        self,
        ids: Sequence[Sequence[int]],
        layouts: Sequence[TokenLayout],
        pixels: Sequence[Sequence[Tensor]],
        **options: Any,
    ) -> BatchFeature:
        """As every family's, with num_frames int64 [B, M] beside pixel_values [B, F, 3, H, W]."""
        data = super().collate(ids, layouts, pixels, **options)
        if "pixel_values" in data:
            counts = [torch.tensor([len(item) for item in row], dtype=torch.long) for row in pixels]
            data["num_frames"] = nn.utils.rnn.pad_sequence(counts, batch_first=True)
        if "labels" in data:
            data["labels"] = _up_to_stop(data["labels"], self.stop_ids)
        return data


def _up_to_stop(labels: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Labels [B, L] without the line break that some chats put after the token that ends an answer."""
    after = torch.isin(labels, torch.tensor(stop_ids)).roll(1, 1)
    after[:, 0] = False
    return labels.masked_fill(after, -100)


def siglip_image_processor(side: int = 384) -> SiglipImageProcessorPil:
    """Squash to side x side (bicubic), then (x / 255 - 0.5) / 0.5."""
    return SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


MODEL, PROCESSOR = VideoCCAM, VideoCCAMProcessor
AutoConfig.register(VideoCCAMConfig.model_type, VideoCCAMConfig, exist_ok=True)

_SIGLIP = "hf-hub:google/siglip-so400m-patch14-384"
_PHI_3_MINI = "hf-hub:microsoft/Phi-3-mini-4k-instruct"
_YI, _PHI_3_MEDIUM = "hf-hub:01-ai/Yi-1.5-9B-Chat", "hf-hub:microsoft/Phi-3-medium-4k-instruct"
BASES = {
    "video-ccam-4b": f"{_PHI_3_MINI}@ff07dc01615f8113924aed013115ab2abd32115b",
    "video-ccam-9b": _YI,
    "video-ccam-14b": _PHI_3_MEDIUM,
    "video-ccam-4b-v1.1": _PHI_3_MINI,
    "video-ccam-9b-v1.1": _YI,
    "video-ccam-14b-v1.1": _PHI_3_MEDIUM,
}
"""The base language model of each release in parts; 4B was trained on that old revision."""


def _phi3(window: int, **sizes: Any) -> dict[str, Any]:
    return {
        "model_type": "phi3",
        "vocab_size": 32064,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": [32007, 32000],
        "pad_token_id": 32000,
        "tie_word_embeddings": False,
        "original_max_position_embeddings": 4096,
        "sliding_window": window,
        **sizes,
    }


_MINI = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32}
_MEDIUM = {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40}
_TEXT = {
    "phi-3-mini": _phi3(2047, **_MINI, num_key_value_heads=32, max_position_embeddings=4096),
    "phi-3-medium": _phi3(2047, **_MEDIUM, num_key_value_heads=10, max_position_embeddings=4096),
    # Without the factors of its long rotary embedding, which come with released weights.
    "phi-3.5-mini": _phi3(262144, **_MINI, num_key_value_heads=32, max_position_embeddings=131072),
    "yi-1.5-9b": {
        "model_type": "llama",
        "vocab_size": 64000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 151643,
        "eos_token_id": [151645, 151643],
        "pad_token_id": 151643,
        "tie_word_embeddings": False,
    },
}

_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

_TINY_TEXT = {
    "model_type": "phi3",
    "vocab_size": len(word_tokenizer(VOCABULARY)),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": [5, 2],
    "pad_token_id": 7,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    **{
        name: {"text_config": _TEXT[text], "vision_config": _SIGLIP_SO400M}
        for name, text in {
            "video-ccam-4b": "phi-3-mini",
            "video-ccam-9b": "yi-1.5-9b",
            "video-ccam-14b": "phi-3-medium",
            "video-ccam-4b-v1.1": "phi-3-mini",
            "video-ccam-9b-v1.1": "yi-1.5-9b",
            "video-ccam-14b-v1.1": "phi-3-medium",
            "video-ccam-4b-v1.2": "phi-3.5-mini",
            "video-ccam-7b-v1.2": "qwen2.5-7b",
        }.items()
    },
    "video-ccam-tiny": {
        "text_config": _TINY_TEXT,
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 30,
            "patch_size": 7,
        },
        "projector": {
            "num_query": 12,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 4,
            "num_key_value_heads": 2,
        },
    },
    "video-ccam-nano": {
        "text_config": {
            **_TINY_TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "initializer_range": 0.1,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        "projector": {"num_query": 48, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4},
    },
}


def processor(name: str, config: VideoCCAMConfig) -> VideoCCAMProcessor | None:
    """The processor of a model with random weights; None where its tokenizer would have to be downloaded."""
    if config.text_config.vocab_size != _TINY_TEXT["vocab_size"]:
        return None
    frames = 4 if name == "video-ccam-tiny" else 8
    image_processor = siglip_image_processor(config.vision_config.image_size)
    num_query = config.projector["num_query"]
    return VideoCCAMProcessor(image_processor, word_tokenizer(VOCABULARY), num_query, num_frames=frames)


def is_release(described: dict[str, Any]) -> bool:
    """Whether a config.json is that of a merged release (v1.2)."""
    return "projector_config" in described


def read_release(folder: Path, described: dict[str, Any]) -> tuple[VideoCCAMConfig, VideoCCAMProcessor]:
    """Configuration and processor of a merged release (v1.2).

    Of its config.json only `projector_config` is known. The language model's and the tower's configurations are known
    by what they describe, whatever their names. Parameter names are not published: those that do not fit are listed
    when the weights are loaded.

    Raises:
        CheckpointError: config.json does not describe all three parts, or a projector of another kind.
    """
    parts = {name: part for name, part in described.items() if isinstance(part, dict) and "model_type" in part}
    vision = [part for part in parts.values() if part["model_type"] in ("siglip_vision_model", "siglip")]
    text = [part for part in parts.values() if part["model_type"] in CHAT_OF]
    if len(vision) != 1 or len(text) != 1:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {len(text)} language models and {len(vision)} SigLIP towers in its "
            f"entries {', '.join(described)}; one of each is needed."
        )
    tower = AutoConfig.for_model(**vision[0])
    config = VideoCCAMConfig(
        text_config=AutoConfig.for_model(**text[0]),
        vision_config=getattr(tower, "vision_config", tower),
        projector=_projector_options(described["projector_config"]),
    )
    return config, released_processor(AutoTokenizer.from_pretrained(folder), config)


_PROJECTOR_OPTIONS = (
    "num_query", "hidden_size", "intermediate_size", "num_heads", "num_key_value_heads", "attention_bias", "mlp_bias",
    "layer_norm_eps",
)  # fmt: skip


def _projector_options(described: dict[str, Any]) -> dict[str, Any]:
    """Our options from a released projector's configuration, of which dropout and the widths around it are no part."""
    if described.get("hidden_act", "swiglu") != "swiglu":
        raise CheckpointError(f"The projector's hidden_act is {described['hidden_act']!r}; only 'swiglu' is known.")
    return {name: described[name] for name in _PROJECTOR_OPTIONS if name in described}


def released_processor(tokenizer: Any, config: VideoCCAMConfig) -> VideoCCAMProcessor:
    """The processor, and the ids that end an answer written into the configuration."""
    kind = config.text_config.model_type
    if kind not in CHAT_OF:
        raise CheckpointError(f"No chat is known for a {kind!r} language model; known are {', '.join(CHAT_OF)}.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    num_query = config.projector.get("num_query", 1024)
    image_processor = siglip_image_processor(config.vision_config.image_size)
    made = VideoCCAMProcessor(image_processor, tokenizer, num_query, CHAT_OF[kind])
    config.text_config.eos_token_id = made.stop_ids
    config.text_config.pad_token_id = tokenizer.pad_token_id
    return made


def is_in_parts(folder: Path) -> bool:
    """Whether a folder is a release as adapters and a projector (v1.0), without the base models."""
    return (folder / "llm_adapter" / "adapter_config.json").is_file()


def read_parts(folder: Path, name: str | None = None, *, dtype: torch.dtype | None = None, **loading: Any) -> VideoCCAM:
    """The model of a release in parts: base models, LoRA adapters merged into them, and the projector.

    The base models are those that the adapters name, if these are folders, else those of the registered `name`, else
    the Hub's of the name in the adapter.

    Raises:
        CheckpointError: a part is missing, or its parameters do not fit; each that does not is listed.
        InputError: loading options: the parts are merged in memory. Save the model, and load that with options.
        MissingExtra: peft is not installed.
    """
    if loading:
        raise InputError(
            f"A release in parts is merged in memory and takes no {', '.join(loading)}. Save the model with "
            "mmzoo.hub.save, and load that."
        )
    described = hub.read_config(folder / "projector")
    text, vision = folder / "llm_adapter", folder / "visual_encoder_adapter"
    text_base, vision_base = _base(text, BASES.get(name or "")), _base(vision, _SIGLIP)
    config = VideoCCAMConfig(
        text_config=AutoConfig.from_pretrained(text_base),
        vision_config=SiglipVisionConfig.from_pretrained(vision_base),
        projector=_projector_options(described),
    )
    made = released_processor(AutoTokenizer.from_pretrained(text_base), config)
    with torch.device("meta"):
        model = VideoCCAM(config)
    _load_projector(model.projector, folder / "projector")
    tower = _merged(SiglipVisionModel.from_pretrained(vision_base, dtype=dtype or "auto"), vision)
    model.vision_encoder = cut_at_layer(tower, config.vision_feature_layer)
    model.llm = _merged(AutoModelForCausalLM.from_pretrained(text_base, dtype=dtype or "auto"), text)
    model.processor = made
    return model.to(dtype or model.llm.dtype)


def _base(adapter: Path, known: str | None) -> Path:
    """The folder of the model that an adapter belongs to."""
    try:
        named = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {adapter / 'adapter_config.json'}: {error}.") from error
    if named and Path(named).is_dir():
        return Path(named)
    if not (known or named):
        raise CheckpointError(f"{adapter / 'adapter_config.json'} does not name its base model.")
    return hub.locate(known or f"{hub.HUB}{named}")


def _weights(folder: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of the first of these files that is there."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds none of {', '.join(names)}.")
    return hub.read_file(path)


def _check_names(what: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    misshapen = [
        (name, tuple(state[name].shape), tuple(wanted[name].shape))
        for name in state.keys() & wanted.keys()
        if state[name].shape != wanted[name].shape
    ]
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected or misshapen:
        raise CheckpointError(what, missing=missing, unexpected=unexpected, misshapen=misshapen)


def _load_projector(projector: CCAMProjector, folder: Path) -> None:
    state = _weights(folder, "model.safetensors", "pytorch_model.bin")
    what = (
        f"The projector {folder} does not fit CCAMProjector. The authors' names and layout are not published; these "
        "could not be placed."
    )
    _check_names(what, state, projector.state_dict())
    projector.load_state_dict(state, assign=True)


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with its LoRA adapter merged into it."""
    try:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        raise MissingExtra("peft", "train", f"The adapter {adapter}") from error
    state = _weights(adapter, "adapter_model.safetensors", "adapter_model.bin")
    # transformers 5 dropped this prefix from the names of a SigLIP tower.
    state = {name.replace("base_model.model.vision_model.", "base_model.model."): x for name, x in state.items()}
    adapted = get_peft_model(model, LoraConfig.from_pretrained(adapter))
    _check_names(
        f"The adapter {adapter} does not fit {type(model).__name__}.", state, get_peft_model_state_dict(adapted)
    )
    set_peft_model_state_dict(adapted, state)
    return adapted.merge_and_unload()
