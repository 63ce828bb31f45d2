"""Vision encoders from transformers, timm and open_clip behind one call.

`patch_features` gives the features [N, P, D] of pixel_values [N, 3, H, W] in raster order. Pooling heads are unused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutput

from mmzoo.encoders.qwen_vit import QwenVisionConfig, QwenVisionTransformer
from mmzoo.errors import InputError, MissingExtra


class NamedVisionConfig(PreTrainedConfig):
    """A vision encoder of timm or open_clip by its name there.

    Attributes:
        library: "timm" or "open_clip".
        name: the model's name in that library.
        options: keyword arguments of its constructor.
        image_size: side of the square it sees; filled in when the tower is built.
    """

    model_type = "mmzoo_named_vision"

    def __init__(
        self,
        library: str = "timm",
        name: str = "",
        options: dict[str, Any] | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ):
        self.library, self.name, self.options, self.image_size = library, name, options or {}, image_size
        super().__init__(**kwargs)


AutoConfig.register(NamedVisionConfig.model_type, NamedVisionConfig, exist_ok=True)


def as_vision_config(tower: PreTrainedConfig | dict[str, Any] | str | None) -> PreTrainedConfig:
    """The configuration of a tower: a config, its dict, or a name such as "timm:vit_so400m_patch14_siglip_384"."""
    if isinstance(tower, PreTrainedConfig):
        return tower
    if isinstance(tower, str):
        library, _, name = tower.partition(":")
        return NamedVisionConfig(library=library, name=name)
    tower = dict(tower or {})
    if tower.get("model_type", "siglip_vision_model") == "siglip_vision_model":
        return SiglipVisionConfig(**tower)
    return AutoConfig.for_model(**tower)


def build_vision_encoder(config: PreTrainedConfig, layer: int | None = None) -> tuple[nn.Module, int]:
    """The encoder with random weights, and the width D of its features.

    Args:
        config: of the whole tower.
        layer: build no more than this hidden state needs: see `cut_at_layer`.

    Raises:
        InputError: no such kind of tower, or a layer of one that gives its output only.
        MissingExtra: its library is not installed.
    """
    if layer is not None:
        encoder, width = build_vision_encoder(config)
        return cut_at_layer(encoder, layer), width
    if isinstance(config, SiglipVisionConfig):
        return SiglipVisionModel(config), config.hidden_size
    if isinstance(config, CLIPVisionConfig):
        return CLIPVisionModel(config), config.hidden_size
    if isinstance(config, QwenVisionConfig):
        return QwenVisionTransformer(config), config.output_dim
    if isinstance(config, NamedVisionConfig) and config.library in ("timm", "open_clip"):
        encoder = TimmEncoder(config) if config.library == "timm" else OpenClipEncoder(config)
        config.image_size = config.image_size or encoder.image_size
        return encoder, encoder.dim
    raise InputError(
        f"No vision encoder for {config.model_type!r}. Use a SigLIP, CLIP or Qwen-VL config, or a name 'timm:...' or "
        "'open_clip:...'."
    )


def cut_at_layer(encoder: nn.Module, layer: int) -> nn.Module:
    """The same tower, without what comes after hidden state `layer`, which is now its output.

    Neither the layers above nor the last norm and the pooling head are kept, and no hidden state is held for longer
    than the next layer needs it.

    Raises:
        InputError: a timm or open_clip tower, or a layer that the tower does not have.
    """
    if not isinstance(encoder, SiglipVisionModel):
        raise InputError(f"A {type(encoder).__name__} cannot be cut at a layer. Use a SigLIP tower of transformers.")
    layers = encoder.encoder.layers
    states = len(layers) + 1
    if not -states <= layer < states:
        raise InputError(f"The tower has hidden states 0 to {states - 1}, no layer {layer}.")
    del layers[layer % states :]
    encoder.post_layernorm, encoder.use_head = nn.Identity(), False
    if hasattr(encoder, "head"):
        del encoder.head
    return encoder


def patch_features(
    encoder: nn.Module, pixel_values: Tensor, layer: int | None = None, *, class_token: bool = False
) -> Tensor:
    """Features [N, P, D] of images [N, 3, H, W].

    Args:
        encoder: made by `build_vision_encoder`.
        pixel_values: normalised as the encoder wants them.
        layer: index into the hidden states, 0 being the embeddings; -2 is the output of the last layer but one. None is
            the encoder's output: after the last norm, where the library gives it so (transformers' CLIP does not).
        class_token: keep CLIP's class token, as the first patch.

    Raises:
        InputError: the tower has no such layer; those of timm and open_clip give their output only.
    """
    if layer is None:
        features = encoder(pixel_values).last_hidden_state
    elif isinstance(encoder, (SiglipVisionModel, CLIPVisionModel)):
        features = _hidden_state(encoder, pixel_values, layer)
    else:
        raise InputError(f"{type(encoder).__name__} gives its output only, no layer {layer}. Use a transformers tower.")
    return features[:, 1:] if isinstance(encoder, CLIPVisionModel) and not class_token else features


def _hidden_state(encoder: SiglipVisionModel | CLIPVisionModel, pixel_values: Tensor, layer: int) -> Tensor:
    """The layers up to the one that is asked for: transformers' `output_hidden_states` runs all, and breaks a graph."""
    layers = encoder.encoder.layers
    if not -len(layers) - 1 <= layer <= len(layers):
        raise InputError(f"A tower of {len(layers)} layers has the hidden states 0 to {len(layers)}, not {layer}.")
    hidden = encoder.embeddings(pixel_values)
    if isinstance(encoder, CLIPVisionModel):
        hidden = encoder.pre_layrnorm(hidden)
    for block in layers[: layer % (len(layers) + 1)]:
        hidden = block(hidden, None)
    return hidden


class TimmEncoder(nn.Module):
    """A timm vision transformer."""

    def __init__(self, config: NamedVisionConfig):
        super().__init__()
        try:
            import timm
        except ImportError as error:
            raise MissingExtra("timm", "timm", f"The vision tower timm:{config.name}") from error
        self.trunk = timm.create_model(config.name, pretrained=False, num_classes=0, **config.options)
        self.dim, self.image_size = self.trunk.num_features, self.trunk.patch_embed.img_size[0]

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=_patches(self.trunk, pixel_values))


class OpenClipEncoder(nn.Module):
    """The vision tower of an open_clip model: a timm trunk (SigLIP), or open_clip's own transformer."""

    def __init__(self, config: NamedVisionConfig):
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise MissingExtra("open_clip", "openclip", f"The vision tower open_clip:{config.name}") from error
        self.visual = open_clip.create_model(config.name, device=torch.get_default_device(), **config.options).visual
        size = self.visual.image_size
        self.image_size = size if isinstance(size, int) else size[0]
        trunk = getattr(self.visual, "trunk", None)
        self.dim = trunk.num_features if trunk is not None else self.visual.ln_post.normalized_shape[0]

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        if hasattr(self.visual, "trunk"):
            return BaseModelOutput(last_hidden_state=_patches(self.visual.trunk, pixel_values))
        features = self.visual.forward_intermediates(
            pixel_values, indices=1, intermediates_only=True, output_fmt="NLC", normalize_intermediates=True
        )
        return BaseModelOutput(last_hidden_state=features["image_intermediates"][-1])


def _patches(trunk: nn.Module, pixel_values: Tensor) -> Tensor:
    return trunk.forward_features(pixel_values)[:, trunk.num_prefix_tokens :]
