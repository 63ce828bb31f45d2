"""LLaVA-1.5: CLIP, a two-layer projector and Vicuna, under plain causal attention.

Source: "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744. CCA-LLaVA and TC-LLaVA are this model
under other rules and schemes, in files of their own.

Shape legend: N images or frames, P patches, V visual tokens, D width of the tower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from mmzoo.encoders.vision import as_vision_config, build_vision_encoder, patch_features
from mmzoo.errors import CheckpointError, InputError
from mmzoo.hub import HUB, locate, read_tensors
from mmzoo.language import MultimodalConfig, MultimodalLM
from mmzoo.layout import Span, TokenLayout, image
from mmzoo.processing import IMAGE, MultimodalProcessor, Turn, read_tokenizer, word_tokenizer
from mmzoo.world import VOCABULARY

_SYSTEM = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
SYSTEMS = {"vicuna_v1": _SYSTEM.format("user"), "llava_v1": _SYSTEM.format("human")}
"""Training uses vicuna_v1; the authors' POPE and CHAIR scripts ask under llava_v1."""


class LlavaConfig(MultimodalConfig):
    """Configuration of LLaVA.

    Attributes:
        vision_config: the tower: a CLIP config, or what `as_vision_config` takes.
        vision_layer: which hidden state of the tower is used, as `patch_features` counts them.
        pool: side of the squares of patches that are averaged into one token; 1 keeps every patch.
    """

    model_type = "mmzoo_llava"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | str | None = None,
        vision_layer: int | None = -2,
        pool: int = 1,
        **kwargs: Any,
    ):
        self.vision_config = as_vision_config(vision_config or {"model_type": "clip_vision_model"})
        self.vision_layer, self.pool = vision_layer, pool
        super().__init__(text_config=text_config or {"model_type": "llama"}, **kwargs)


class Llava(MultimodalLM):
    """LLaVA. `processor(...)` gives what `forward` and `generate` take."""

    config: LlavaConfig
    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.vision_tower, width = build_vision_encoder(config.vision_config)
        hidden = config.text_config.hidden_size
        self.mm_projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.lang_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.lang_model

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        return patch_features(self.vision_tower, pixel_values, self.config.vision_layer)

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        return self.mm_projector(pooled(self.patch_features(pixel_values), self.config.pool))

    def patch_weights(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_features(pixel_values).shape[1]
        weights = pooled(torch.eye(patches, device=pixel_values.device)[None], self.config.pool)
        return weights.expand(len(pixel_values), -1, -1)


def pooled(features: Tensor, side: int) -> Tensor:
    """The means [N, V, D] of squares of side x side patches of a square grid [N, P, D].

    Raises:
        InputError: the grid cannot be cut into such squares.
    """
    if side == 1:
        return features
    grid = math.isqrt(features.shape[1])
    if grid * grid != features.shape[1] or grid % side:
        raise InputError(f"{features.shape[1]} patches cannot be pooled in squares of {side} x {side}.")
    squares = features.transpose(1, 2).unflatten(2, (grid, grid))
    return F.avg_pool2d(squares, side).flatten(2).transpose(1, 2)


class MmzooLlavaProcessor(MultimodalProcessor):
    """Text, images and videos for LLaVA; every frame of a video takes its place as one image.

    transformers' AutoProcessor finds a class by its name alone, and has a LlavaProcessor of its own.

    Args:
        patch_size: pixels of a patch's side.
        pool: patches of a token's side.
        image_aspect_ratio: "pad": padded to a square first, with the mean colour; "square": only what the image
            processor does.
        system: the text before the first turn; empty for none.
    """

    multi_turn = True
    before_answer = " "

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        pool: int = 1,
        image_aspect_ratio: str = "pad",
        system: str = SYSTEMS["vicuna_v1"],
        num_frames: int = 8,
        answer_marker: str = "ASSISTANT:",
        turn_marker: str = "USER:",
        chat_template: str | None = None,
    ):
        if image_aspect_ratio not in ("pad", "square"):
            raise InputError(f"image_aspect_ratio is 'pad' or 'square', not {image_aspect_ratio!r}.")
        super().__init__(image_processor, tokenizer, num_frames, answer_marker, turn_marker, chat_template)
        self.patch_size, self.pool, self.image_aspect_ratio = patch_size, pool, image_aspect_ratio
        self.system = system

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        rgb = [image.convert("RGB") for image in images]
        if self.image_aspect_ratio == "pad":
            colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
            rgb = [padded_to_square(image, colour) for image in rgb]
        return super().pixels(rgb)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image or frame [..., H, W]."""
        side = self.patch_size * self.pool
        return pixels.shape[-2] // side, pixels.shape[-1] // side

    def image_span(self, pixels: Tensor) -> Span:
        return image(*self.grid(pixels))

    def conversation(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """The text of questions with their answers, as the module's `conversation`, by this processor's markers."""
        return self._conversation(turns, self.system)

    def _conversation(self, turns: Sequence[tuple[str, str | None]], system: str) -> str:
        return conversation(turns, system, self.turn_marker, self.answer_marker, self.tokenizer.eos_token)

    def prompt(self, question: str, media: str = "", *, system: str | None = None) -> str:
        return self._conversation([(asked(question, media), None)], self.system if system is None else system)

    def dialogue(self, turns: Sequence[Turn], system: str | None = None) -> str:
        said = [(asked(turn.question, turn.media), turn.answer) for turn in turns]
        return self._conversation(said, self.system if system is None else system)

    def caption(self, text: str, media: str = IMAGE) -> str:
        return caption(text, media)

    def encode(self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """The ids of one sample's text, with one `<image>` for each span.

        What stands between images is tokenized piece by piece, as upstream does; each piece starts a word.
        """
        first, *others = text.split(IMAGE)
        ids = list(self.tokenizer(first, add_special_tokens=add_special_tokens)["input_ids"])
        for piece in others:
            ids.append(self.tokenizer.convert_tokens_to_ids(IMAGE))
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids[:max_length]

    def marker_ids(self, marker: str) -> list[int]:
        """The ids of a marker where it stands in a conversation: an answer comes after a space, a turn after none."""
        before, space = (self.tokenizer.eos_token, "") if marker == self.turn_marker else ("a", " ")
        alone, whole = super().marker_ids(before), super().marker_ids(before + space + marker)
        return whole[len(alone) :]

    def lay_out(self, tokens: Sequence[int], media: Sequence[Span]) -> tuple[list[int], TokenLayout]:
        """As the base class; media tokens get the padding's id, since the embedding has no row for `<image>`."""
        ids, layout = super().lay_out(tokens, media)
        pad = self.tokenizer.pad_token_id
        return [pad if visual else token for token, visual in zip(ids, layout.visual[0].tolist())], layout


def conversation(
    turns: Sequence[tuple[str, str | None]],
    system: str = SYSTEMS["vicuna_v1"],
    user: str = "USER:",
    assistant: str = "ASSISTANT:",
    end: str = "</s>",
) -> str:
    """Questions with their answers as one text; None is the answer that the model is to give.

    The beginning-of-sequence token is the tokenizer's business.
    """
    said = [
        f"{user} {question} {assistant}" + ("" if answer is None else f" {answer}{end}") for question, answer in turns
    ]
    return " ".join(filter(None, (system, "".join(said))))


def asked(question: str, media: str) -> str:
    """A question after the places of its media, as in upstream's training."""
    return f"{media}\n{question}" if media else question


def caption(text: str, media: str = IMAGE) -> str:
    """The text of the first stage of training, upstream's template "plain": all of it is a target."""
    return f"{media}{text}\n"


def padded_to_square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer side."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def llava_image_processor(side: int) -> CLIPImageProcessorPil:
    """CLIP's: the shorter side to `side` (bicubic), its middle cut out, normalised by CLIP's mean and deviation."""
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


MODEL, PROCESSOR = Llava, MmzooLlavaProcessor
AutoConfig.register(LlavaConfig.model_type, LlavaConfig, exist_ok=True)

_VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

_TINY_TEXT = {
    **_VICUNA_7B,
    "vocab_size": len(word_tokenizer(VOCABULARY)) - 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 7,
}
_TINY_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 24,
}

FULL: dict[str, Any] = {"text_config": _VICUNA_7B, "vision_config": _CLIP_L_336}
TINY: dict[str, Any] = {"text_config": _TINY_TEXT, "vision_config": _TINY_VISION}
NANO: dict[str, Any] = {
    "text_config": {
        **_TINY_TEXT,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "initializer_range": 0.1,
    },
    "vision_config": {
        **_TINY_VISION,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 64,
    },
}
"""The three sizes of this family and of those that are LLaVA under another rule."""

CONFIGS: dict[str, dict[str, Any]] = {"llava-1.5-7b": FULL, "llava-tiny": TINY}


def processor(name: str, config: LlavaConfig) -> MmzooLlavaProcessor | None:
    """The processor of a model with random weights; None where its tokenizer would have to be downloaded."""
    return None if name == "llava-1.5-7b" else word_processor(MmzooLlavaProcessor, config, num_frames=4)


def word_processor(kind: type[MmzooLlavaProcessor], config: LlavaConfig, num_frames: int) -> MmzooLlavaProcessor:
    """The processor of tiny and nano models: whole words, with Phi-3's markers and no system text."""
    return kind(
        llava_image_processor(config.vision_config.image_size),
        word_tokenizer(VOCABULARY),
        config.vision_config.patch_size,
        config.pool,
        system="",
        num_frames=num_frames,
        answer_marker="<|assistant|>",
        turn_marker="<|user|>",
    )


def is_release(described: dict[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint written by LLaVA's code."""
    return {"mm_vision_tower", "mm_vision_select_layer", "hidden_size"} <= described.keys()


def read_release(folder: Path, described: dict[str, Any]) -> tuple[LlavaConfig, MmzooLlavaProcessor]:
    """Configuration and processor of a checkpoint written by LLaVA's code.

    The tower's configuration and image processor come from the id or folder that config.json names.

    Raises:
        CheckpointError: config.json asks for what is not built here, or the tower is not there.
        MissingExtra: the tokenizer is a sentencepiece file, and sentencepiece is not installed.
    """
    return read_as(LlavaConfig, MmzooLlavaProcessor, folder, described)


_EXPECTED: dict[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": (None, "patch"),
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
    "image_aspect_ratio": ("pad", "square", None),
}


def read_as(
    config_class: type[LlavaConfig],
    processor_class: type[MmzooLlavaProcessor],
    folder: Path,
    described: dict[str, Any],
    **options: Any,
) -> tuple[LlavaConfig, MmzooLlavaProcessor]:
    """`read_release` for a family of the same checkpoints; options go to its processor."""
    for key, known in _EXPECTED.items():
        if described.get(key) not in known:
            raise CheckpointError(f"{folder}: {key} is {described.get(key)!r}; what is built here is {known}.")
    text = {key: described[key] for key in described.keys() & LlamaConfig().to_dict().keys() - {"model_type"}}
    tower = _tower(described)
    vision = AutoConfig.from_pretrained(tower)
    config = config_class(
        text_config=LlamaConfig(**text, rope_theta=described.get("rope_theta", 10000.0)),
        vision_config=getattr(vision, "vision_config", vision),
        vision_layer=described["mm_vision_select_layer"],
        dtype=described.get("torch_dtype"),
    )
    tokenizer = read_tokenizer(folder)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    try:
        pictures = AutoImageProcessor.from_pretrained(tower, backend="pil")
    except OSError as error:
        raise CheckpointError(f"The tower {tower} does not say how pictures are prepared: {error}") from error
    aspect_ratio = described.get("image_aspect_ratio") or "square"
    sizes = (config.vision_config.patch_size, config.pool)
    return config, processor_class(pictures, tokenizer, *sizes, image_aspect_ratio=aspect_ratio, **options)


def read_weights(folder: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of the release and of the tower that it names, under the names they have here."""
    tower = _tower(described)
    tensors = read_tensors(tower)
    if AutoConfig.from_pretrained(tower).model_type == "clip":  # with its text half
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("vision_model.")}
    return renamed(read_tensors(folder), tensors)


def renamed(language: dict[str, Tensor], tower: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of LLaVA (language model and projector) and of CLIP's tower under the names they have here.

    Left out are buffers that earlier versions of transformers wrote and later ones compute.
    """
    tensors = {}
    for name, tensor in language.items():
        projector = name.removeprefix("model.mm_projector.")
        if not name.endswith(".rotary_emb.inv_freq"):
            tensors[f"lang_model.{name}" if projector == name else f"mm_projector.{projector}"] = tensor
    for name, tensor in tower.items():
        inner = name.removeprefix("vision_model.")
        if inner != "embeddings.position_ids":
            tensors[f"vision_tower.{inner}"] = tensor
    return tensors


def _tower(described: dict[str, Any]) -> Path:
    name = described["mm_vision_tower"]
    return locate(name if Path(name).is_dir() else HUB + name)
