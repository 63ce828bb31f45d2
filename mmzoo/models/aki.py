"""AKI: SigLIP, a Perceiver resampler and Phi-3.5 under modality-mutual attention.

Source: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
arXiv 2503.02597. Parameter names are those of the released checkpoint.

Shape legend: N images or frames, F frames of one medium, P patches, V visual tokens, D width of the language model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
)

from mmzoo.connectors.perceiver import PerceiverResampler
from mmzoo.encoders.vision import as_vision_config, build_vision_encoder, patch_features
from mmzoo.errors import CheckpointError, InputError
from mmzoo.language import MultimodalConfig, MultimodalLM
from mmzoo.layout import Span, image
from mmzoo.processing import IMAGE, MultimodalProcessor, Turn, word_tokenizer
from mmzoo.world import VOCABULARY

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class AKIConfig(MultimodalConfig):
    """Configuration of AKI.

    Attributes:
        vision_config: the tower: a SigLIP config, or a name such as "timm:vit_so400m_patch14_siglip_384".
        connector: "perceiver", or "linear": one token a patch, without compression.
        num_vision_tokens: V, tokens of one image or frame.
        resampler: depth, dim_head, heads and ff_mult of the Perceiver resampler.
        initial_tokenizer_len: rows of the stock embedding that are used; ids from here on are added tokens.
        num_added_tokens: `<image>` and `<|endofchunk|>`.
    """

    model_type = "mmzoo_aki"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | str | None = None,
        connector: str = "perceiver",
        num_vision_tokens: int = 144,
        resampler: dict[str, int] | None = None,
        initial_tokenizer_len: int = 32012,
        num_added_tokens: int = 2,
        rule: str = "modality-mutual",
        **kwargs: Any,
    ):
        self.vision_config = as_vision_config(vision_config)
        self.connector = connector
        self.num_vision_tokens = num_vision_tokens
        self.resampler = resampler or {}
        self.initial_tokenizer_len, self.num_added_tokens = initial_tokenizer_len, num_added_tokens
        super().__init__(text_config=text_config or {"model_type": "phi3"}, rule=rule, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The language model's configuration with the number of logits it gives here, which beam search asks for."""
        config = copy.copy(super().get_text_config(*args, **kwargs))
        config.vocab_size = self.initial_tokenizer_len + self.num_added_tokens
        return config


class DecoupledEmbedding(nn.Embedding):
    """The stock table, and a small one for the added tokens."""

    def __init__(self, num_embeddings: int, dim: int, first_added: int, num_added: int):
        super().__init__(num_embeddings, dim)
        self.first_added = first_added
        self.additional_embedding = nn.Embedding(num_added, dim)

    def forward(self, input_ids: Tensor) -> Tensor:
        added = input_ids >= self.first_added
        stock = F.embedding(input_ids.masked_fill(added, 0), self.weight)
        extra = self.additional_embedding((input_ids - self.first_added).clamp(min=0))
        return torch.where(added[..., None], extra, stock)


class DecoupledLinear(nn.Linear):
    """The stock head cut at the tokenizer's length, followed by the added tokens' columns; both have a bias."""

    def __init__(self, dim: int, num_embeddings: int, first_added: int, num_added: int):
        super().__init__(dim, num_embeddings, bias=True)
        self.first_added = first_added
        self.additional_fc = nn.Linear(dim, num_added, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        used = slice(self.first_added)
        return torch.cat([F.linear(hidden, self.weight[used], self.bias[used]), self.additional_fc(hidden)], -1)


class AKI(MultimodalLM):
    """AKI. `processor(...)` gives what `forward` and `generate` take."""

    config: AKIConfig
    config_class = AKIConfig

    def __init__(self, config: AKIConfig):
        super().__init__(config)
        text = config.text_config
        self.vision_encoder, width = build_vision_encoder(config.vision_config)
        self.vision_tokenizer = _connector(config, width)
        self.lang_model = AutoModelForCausalLM.from_config(text)
        split = (config.initial_tokenizer_len, config.num_added_tokens)
        self.lang_model.set_input_embeddings(DecoupledEmbedding(text.vocab_size, text.hidden_size, *split))
        self.lang_model.set_output_embeddings(DecoupledLinear(text.hidden_size, text.vocab_size, *split))
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.lang_model

    def _init_weights(self, module: nn.Module) -> None:
        """The tables as the language model's own; the connector keeps torch's initialisation."""
        if isinstance(module, (nn.Embedding, DecoupledLinear)) or module is self.lang_model.lm_head.additional_fc:
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        return patch_features(self.vision_encoder, pixel_values)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """[N, V, D] of images [N, C, H, W], or of media of F frames [N, F, C, H, W] whose patches are joined."""
        patches = self.patch_features(pixel_values.flatten(0, -4))
        return self.vision_tokenizer(patches.unflatten(0, (len(pixel_values), -1)).flatten(1, 2))

    def patch_weights(self, pixel_values: Tensor) -> Tensor:
        if self.config.connector != "perceiver":
            return super().patch_weights(pixel_values)
        return self.vision_tokenizer.patch_weights(self.patch_features(pixel_values))


def _connector(config: AKIConfig, width: int) -> nn.Module:
    if config.connector == "perceiver":
        return PerceiverResampler(width, config.text_config.hidden_size, config.num_vision_tokens, **config.resampler)
    if config.connector == "linear":
        return nn.Linear(width, config.text_config.hidden_size)
    raise InputError(f"AKI's connector is 'perceiver' or 'linear', not {config.connector!r}.")


class AKIProcessor(MultimodalProcessor):
    """Text, images and videos for AKI; every frame of a video takes its place as one image.

    Args:
        num_vision_tokens: tokens of one image or frame.
        system: the system message; empty for none.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_vision_tokens: int = 144,
        system: str = SYSTEM,
        num_frames: int = 8,
        answer_marker: str = "<|assistant|>",
        turn_marker: str = "<|user|>",
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, num_frames, answer_marker, turn_marker, chat_template)
        self.num_vision_tokens, self.system = num_vision_tokens, system

    def image_span(self, pixels: Tensor) -> Span:
        return image(self.num_vision_tokens, grid=False)

    def prompt(self, question: str, media: str = "", *, system: str | None = None) -> str:
        """The prompt of AKI's demo; the beginning-of-sequence token is the tokenizer's business."""
        return sft_prompt(question, media, self.system if system is None else system)

    def dialogue(self, turns: Sequence[Turn], system: str | None = None) -> str:
        (turn,) = self._single(turns)
        return self.prompt(turn.question, turn.media, system=system) + turn.answer + self.tokenizer.eos_token

    def caption(self, text: str, media: str = IMAGE) -> str:
        """The text of pre-training."""
        return f"{media}{text.strip()}<|endofchunk|>{self.tokenizer.eos_token}"

    def vlmevalkit_prompt(self, text: str, media: str = "<image>") -> str:
        """The prompt of VLMEvalKit's wrapper, in which nothing stands between the image and the text."""
        return sft_prompt(f"{media}{text}", "", self.system)


def aki_image_processor(side: int = 384, mean: float = 0.5, std: float = 0.5) -> SiglipImageProcessorPil:
    """Squash to side x side (bicubic, antialiased), then (x / 255 - mean) / std."""
    return SiglipImageProcessorPil(size={"height": side, "width": side}, image_mean=[mean] * 3, image_std=[std] * 3)


def sft_prompt(question: str, media: str = "<image>", system: str = SYSTEM) -> str:
    """The text before the answer, as in AKI's supervised fine-tuning and demo."""
    opening = f"<|system|>\n{system}<|end|>\n" if system else ""
    places = f"{media}\n" if media else ""
    return f"{opening}<|user|>\n{places}{question}<|end|>\n<|assistant|>\n"


MODEL, PROCESSOR = AKI, AKIProcessor
AutoConfig.register(AKIConfig.model_type, AKIConfig, exist_ok=True)

_PHI_3_5_MINI = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "tie_word_embeddings": False,
    "sliding_window": 262144,
}
"""Without the factors of its long rotary embedding, which come with released weights from the base model's config."""

_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

_TINY_TOKENS = len(word_tokenizer(VOCABULARY)) - 2

CONFIGS: dict[str, dict[str, Any]] = {
    "aki-4b": {"text_config": _PHI_3_5_MINI, "vision_config": _SIGLIP_SO400M},
    "aki-tiny": {
        "text_config": {
            "model_type": "phi3",
            "vocab_size": _TINY_TOKENS + 4,
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
        },
        "vision_config": {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 30,
            "patch_size": 7,
        },
        "num_vision_tokens": 5,
        "resampler": {"depth": 2, "dim_head": 8, "heads": 2},
        "initial_tokenizer_len": _TINY_TOKENS,
    },
}


_TINY = CONFIGS["aki-tiny"]
CONFIGS["aki-nano"] = {
    **_TINY,
    "text_config": {
        **_TINY["text_config"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "initializer_range": 0.1,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
    },
    "num_vision_tokens": 6,
    "resampler": {"depth": 1, "dim_head": 16, "heads": 4},
}


def processor(name: str, config: AKIConfig) -> AKIProcessor | None:
    """The processor of a model with random weights; None where its tokenizer would have to be downloaded."""
    if name == "aki-4b":
        return None
    side, frames = config.vision_config.image_size, 4 if name == "aki-tiny" else 8
    return AKIProcessor(
        aki_image_processor(side), word_tokenizer(VOCABULARY), config.num_vision_tokens, system="", num_frames=frames
    )


def is_release(described: dict[str, Any]) -> bool:
    """Whether a config.json is that of the authors' release, which names no model_type."""
    return {"lang_model_path", "vision_encoder_path", "initial_tokenizer_len"} <= described.keys()


def read_release(folder: Path, described: dict[str, Any]) -> tuple[AKIConfig, AKIProcessor]:
    """Configuration and processor of the authors' release.

    The base models' configurations (a few kB each) come from the ids or folders that config.json names; their weights
    are never downloaded. Parameter names are ours already.

    Raises:
        CheckpointError: the tokenizer does not give the added tokens the ids that the release was trained with.
    """
    text_config = AutoConfig.from_pretrained(described["lang_model_path"])
    vision = AutoConfig.from_pretrained(described["vision_encoder_path"])
    config = AKIConfig(
        text_config=text_config,
        vision_config=getattr(vision, "vision_config", vision),
        num_vision_tokens=described["num_vision_tokens"],
        initial_tokenizer_len=described["initial_tokenizer_len"],
    )
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else described["lang_model_path"])
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<image>", "<|endofchunk|>"], special_tokens=True)
    first = tokenizer.convert_tokens_to_ids("<image>")
    if first != config.initial_tokenizer_len:
        raise CheckpointError(
            f"The tokenizer gives <image> the id {first}; trained was {config.initial_tokenizer_len}."
        )
    side, mean, std = (
        described.get(key, value) for key, value in {"n_px": 384, "norm_mean": 0.5, "norm_std": 0.5}.items()
    )
    return config, AKIProcessor(aki_image_processor(side, mean, std), tokenizer, config.num_vision_tokens)
