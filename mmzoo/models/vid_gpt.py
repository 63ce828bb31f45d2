"""ViD-GPT: a causal video diffusion transformer that goes on from its own frames, with keys and values kept.

Source: "ViD-GPT: Introducing GPT-style Autoregressive Generation in Video Diffusion Models", arXiv 2406.10981, and
"Ca2-VDM: Efficient Autoregressive Video Diffusion Model with Causal Generation and Cache Sharing", arXiv 2411.16375,
the same authors' code of it. A clip is made chunk by chunk. Clean frames stand before the noisy ones as a prompt, at
timestep 0, and never see them; so their keys and values are computed once, and serve every denoising step of every
later chunk that still sees them.

Unlike the authors' code, the cache keeps the true last frames for the prefix-enhanced attention where a chunk is
shorter than that, "first-frame" attention goes on writing the temporal cache, "prompt-causal" is run as it is named,
and a clip that begins anew begins with an empty cache. Under rope a frame's place is the one among those that are seen.

Shape legend: B batch, F frames of a block, S frames that it sees, N tokens a frame, C width, H heads, D head dimension,
L text tokens, R frames looked back at, X channels of the latents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import (
    PixArtAlphaTextProjection,
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_1d_sincos_pos_embed_from_grid,
)
from torch import Tensor, nn

from mmzoo import masks
from mmzoo.attention.backends import eager_attention
from mmzoo.attention.compiler import allowed
from mmzoo.errors import CheckpointError, InputError
from mmzoo.generation import Generator, Rollout, check_switches
from mmzoo.layout import Role
from mmzoo.masks.rule import always, answer, everything, frame, not_after, prompt
from mmzoo.rolling_cache import RollingKVCache, frames_layout


def prompt_causal() -> masks.Rule:
    """Clean frames (role PROMPT) see themselves and earlier frames; noisy ones see all (the authors' "partial")."""
    return masks.Rule("prompt-causal", (masks.see(prompt, everything, not_after(frame)), masks.see(answer, everything, always)))  # fmt: skip  # noqa: E501


RULES = {
    "causal-temporal": masks.causal_temporal,
    "prompt-causal": prompt_causal,
    "bidirectional": masks.bidirectional,
}
Prompt = str | tuple[Tensor, Tensor]
IDDPM = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "linear",
    "variance_type": "learned_range",
    "clip_sample": False,
    "timestep_spacing": "linspace",
}
"""The authors' chain, as diffusers has it."""


class Attention(nn.Module):
    """Attention with one layer for query, key and value."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [..., H, D] of x [..., C]."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)


class CrossAttention(nn.Module):
    """Attention of all tokens to the text."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, attention: str) -> Tensor:
        """[B, F, N, C] of x [B, F, N, C], text [B, L, C] and bool [B, 1, 1, L]."""
        query = self.q_linear(x.flatten(1, 2)).unflatten(-1, (self.num_heads, -1))
        key, value = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return self.proj(attend(query, key, value, mask, attention).flatten(-2)).view_as(x)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: str) -> Tensor:
    """[B, Q, H, D] of query [B, Q, H, D], key and value [B, K, H, D], and a bool mask that fits [B, H, Q, K]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if attention == "eager":
        opened = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool) if mask is None else mask
        return eager_attention(query, key, value, opened.view(-1, 1, *opened.shape[-2:]))[0].transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class ViDGPTCache:
    """What later chunks see of earlier frames, in every layer. B is doubled under classifier-free guidance.

    Its bytes are 2 x layers x B x N x C x (window + chunk + R) x bytes of a number: the chunk in work has slots too.

    Attributes:
        temporal: raw keys and values of the window and the chunk, B N rows of a token a frame.
        context: those that the prefix-enhanced attention looks back at; None without it.
    """

    def __init__(self, model: ViDGPT):
        config = model.config
        self.window = config.window
        self.temporal = RollingKVCache(config.num_layers, config.window + config.chunk_frames)
        self.first = config.prefix_attention == "first-frame"
        self.look_back = 1 if self.first else config.prefix_frames
        self.context: RollingKVCache | None = None
        if config.prefix_attention is not None:
            self.context = RollingKVCache(config.num_layers, self.look_back, tokens_per_frame=model.tokens_per_frame)

    def reset(self) -> None:
        """Forget everything."""
        self.temporal.reset()
        if self.context is not None:
            self.context.reset()

    def begin(self, numbers: range, writes: bool) -> None:
        """Begin a pass over a block, which `writes` clean frames or denoises."""
        self.temporal.begin(numbers, oldest=numbers[0] - self.window)
        self.keeps = writes and self.context is not None and not (self.first and self.context.frames)
        if self.context is not None and self.keeps:
            self.context.begin(numbers[:1] if self.first else numbers[-self.look_back :])

    def look_ahead(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep of the block's keys and values [B, F, N, H, D] those that noisy frames will look back at."""
        if self.context is None or not self.keeps:
            return
        kept = slice(0, 1) if self.first else slice(-self.look_back, None)
        self.context.update(layer, key[:, kept].flatten(1, 2), value[:, kept].flatten(1, 2))

    @property
    def nbytes(self) -> int:
        return self.temporal.nbytes + (self.context.nbytes if self.context else 0)

    def looked_at(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value [B, R N, H, D] of the frames that noisy frames look back at, the latest first.

        A clip that is younger than R frames has its first frame in place of those before it.
        """
        context = self.context
        key, value = (None, None) if context is None else (context.keys[layer], context.values[layer])
        if context is None or key is None or value is None or not context.frames:
            raise InputError(
                "Nothing was written yet that noisy frames could look back at. Write the clean frames first."
            )
        numbers = looked_at(max(context.frames) + 1, self.look_back)
        slots = [context.frames.index(max(number, min(context.frames))) for number in numbers]
        parts = ((buffer.unflatten(1, (context.window, -1))[:, slots]).flatten(1, 2) for buffer in (key, value))
        return next(parts), next(parts)

    def state_dict(self) -> dict[str, Any]:
        """What `torch.load(weights_only=True)` reads."""
        state = {"temporal": self.temporal.state_dict()}
        return state | ({"context": self.context.state_dict()} if self.context else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.temporal.load_state_dict(state["temporal"])
        if self.context:
            self.context.load_state_dict(state["context"])


def looked_at(num_prompt_frames: int, count: int) -> list[int]:
    """The last `count` prompt frames, the latest first, the first one standing in for those before it."""
    return [max(num_prompt_frames - 1 - i, 0) for i in range(count)]


@dataclass
class _Pass:
    """What every layer needs to know of one pass.

    Attributes:
        modulation: [B, F, 1, 6, C] of the timesteps.
        prompt: how many frames are clean.
        mask: bool [F, S], None where a frame sees all.
        time: [F, C], added before the first temporal attention; None under rope.
        rotation: (cosine, sine) of the block's frames and of the slots, under rope.
        text: [B, L, C], and bool [B, 1, 1, L].
        writes: whether only keys and values of clean frames are wanted.
    """

    modulation: Tensor
    prompt: int
    mask: Tensor | None
    time: Tensor | None
    rotation: tuple[Any, Any] | None
    text: tuple[Tensor | None, Tensor | None]
    cache: ViDGPTCache | None
    writes: bool
    attention: str


class Block(nn.Module):
    """Spatial, prefix-enhanced, temporal and cross attention and an MLP, under one adaLN table."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, layer: int, last: bool, config: Any):
        super().__init__()
        self.layer, self.last, self.prefix_attention = layer, last, config.prefix_attention
        self.prefix_frames = config.prefix_frames
        self.norm1 = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads)
        if config.prefix_attention in ("last-frames", "first-frame"):
            self.attn_cf = Attention(width, num_heads)
        if config.mask_channel and layer == 0:
            self.attn_temp_pre_merge = nn.Linear(width + 1, width)
        self.attn_temp = Attention(width, num_heads)
        if config.caption_channels:
            self.cross_attn = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.mlp = FeedForward(width, mult=mlp_ratio, activation_fn="gelu-approximate")
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, step: _Pass) -> Tensor:
        """[B, F, N, C] of x [B, F, N, C]."""
        table = (self.scale_shift_table + step.modulation).unbind(-2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table
        joint = self.prefix_attention == "joint"
        x = x + gate * self.in_frames(self.attn, self.norm1(x) * (1 + scale) + shift, step, joint, own=True)
        if hasattr(self, "attn_cf"):
            x = x + gate * self.in_frames(self.attn_cf, x, step, True, own=False)
        if (moved := self.over_frames(x, step)) is None:
            return x
        x = x + gate * moved
        text, text_mask = step.text
        if text is not None:
            x = x + self.cross_attn(x, text, text_mask, step.attention)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)

    def in_frames(self, layer: Attention, x: Tensor, step: _Pass, looks_back: bool, own: bool) -> Tensor:
        """Attention inside each frame; where it looks back, noisy ones see clean ones too, or instead."""
        query, key, value = layer.split(x)  # [B, F, N, H, D]
        back = self.looked_at(key, value, step) if looks_back else None
        clean = x.shape[1] if back is None else 0 if self.prefix_attention == "first-frame" else step.prompt
        parts = []
        if clean:
            frames = (y[:, :clean].flatten(0, 1) for y in (query, key, value))
            parts.append(attend(*frames, None, step.attention).unflatten(0, (-1, clean)))
        if clean < x.shape[1]:
            noisy = [y[:, clean:] for y in (query, key, value)]
            parts.append(self.back(*noisy, *back, own, step.attention))  # type: ignore[misc]
        return layer.proj(torch.cat(parts, 1).flatten(-2))

    @staticmethod
    def back(query: Tensor, key: Tensor, value: Tensor, ago: Tensor, said: Tensor, own: bool, attention: str) -> Tensor:
        """[B, F, N, H, D]: attention to the tokens [B, R N, H, D] looked back at, and with `own` to the frame's."""
        if not own:
            return attend(query.flatten(1, 2), ago, said, None, attention).reshape(query.shape)
        count = query.shape[1]
        ago, said = (y[:, None].expand(-1, count, -1, -1, -1) for y in (ago, said))
        keys, values = torch.cat([key, ago], 2), torch.cat([value, said], 2)
        return attend(*(y.flatten(0, 1) for y in (query, keys, values)), None, attention).unflatten(0, (-1, count))

    def looked_at(self, key: Tensor, value: Tensor, step: _Pass) -> tuple[Tensor, Tensor] | None:
        """Key and value [B, R N, H, D] of the clean frames that noisy ones look back at; None where there are none."""
        first = self.prefix_attention == "first-frame"
        if step.cache is not None and step.cache.context is not None:
            if step.writes:
                step.cache.look_ahead(self.layer, key, value)
            return step.cache.looked_at(self.layer) if first or not step.writes else None
        frames = [0] if first else looked_at(step.prompt, self.prefix_frames)
        return (key[:, frames].flatten(1, 2), value[:, frames].flatten(1, 2)) if first or step.prompt else None

    def over_frames(self, x: Tensor, step: _Pass) -> Tensor | None:
        """Attention over the frames at each place; None if keys and values were all that was wanted."""
        batch = x.shape[0]
        x = x.transpose(1, 2).flatten(0, 1)  # [B N, F, C]
        if self.layer == 0:
            x = x if step.time is None else x + step.time
            if hasattr(self, "attn_temp_pre_merge"):
                clean = (torch.arange(x.shape[1], device=x.device) < step.prompt).to(x)
                x = self.attn_temp_pre_merge(torch.cat([x, clean[None, :, None].expand(len(x), -1, 1)], -1))
        query, key, value = self.attn_temp.split(x)
        if step.cache is not None:
            key, value = step.cache.temporal.update(self.layer, key, value)
            if step.writes and self.last:
                return None
        if step.rotation is not None:
            query, key = (
                apply_rotary_emb(y, rotation, sequence_dim=1) for y, rotation in zip((query, key), step.rotation)
            )
        moved = self.attn_temp.proj(attend(query, key, value, step.mask, step.attention).flatten(-2))
        return moved.unflatten(0, (batch, -1)).transpose(1, 2)


class ViDGPT(Generator):
    """The denoiser of ViD-GPT (an STDiT whose temporal attention is causal), and its rollout.

    Args:
        sample_size: height and width of what it denoises: latents, or pixels where there is no `vae`.
        in_channels: X.
        patch_size: side of a token.
        hidden_size: C.
        num_layers: blocks.
        num_attention_heads: H.
        mlp_ratio: width of the MLPs over C.
        learn_sigma: whether it says a variance beside the mean, and so 2 X channels.
        caption_channels: width of the text features; 0 for a model without text.
        caption_length: text tokens.
        space_scale, time_scale: what places and times are divided by before their sines.
        mask_channel: whether the first temporal attention is told which frames are clean.
        temporal_positions: "cyclic" (frame number modulo `max_frames`), "absolute" or "rope" (by the place among the
            frames that are seen).
        max_frames: of the table of temporal positions.
        prefix_attention: how noisy frames see clean ones in space: None; "last-frames" by a second layer that sees the
            last of them alone (the authors' code); "joint" in the spatial attention, beside their own tokens (the
            paper); "first-frame" by a second layer for all frames.
        prefix_frames: R, of "last-frames" and "joint".
        rule: of the temporal attention: "causal-temporal", "prompt-causal" or "bidirectional".
        window: clean frames that a chunk sees.
        chunk_frames: frames that are denoised together.
        prefix_perturb: timestep of the noise that is put on clean frames before they are written.
        progressive_noise: a: each frame's noise is a / sqrt(1 + a^2) times the one before it, and fresh noise.
        scheduler: class and configuration of a scheduler of diffusers.
        num_steps: denoising steps.
        vae, vae_scale: where the autoencoder is, and what its latents are multiplied by; None for pixels.
        text_encoder: where T5 is.

    Raises:
        InputError: fields that do not fit together.
    """

    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, int] = (32, 32),
        in_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        caption_channels: int = 0,
        caption_length: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
        mask_channel: bool = True,
        temporal_positions: Literal["cyclic", "absolute", "rope"] = "cyclic",
        max_frames: int = 33,
        prefix_attention: Literal["last-frames", "joint", "first-frame"] | None = "last-frames",
        prefix_frames: int = 3,
        rule: str = "causal-temporal",
        window: int = 25,
        chunk_frames: int = 8,
        prefix_perturb: int = 0,
        progressive_noise: float | None = None,
        scheduler: dict[str, Any] | None = None,
        num_steps: int = 100,
        vae: str | None = None,
        vae_scale: float = 0.18215,
        text_encoder: str | None = None,
    ):
        super().__init__()
        _check_fields(self.config)
        self.rule = RULES[rule]()
        self.tokens_per_frame = (sample_size[0] // patch_size) * (sample_size[1] // patch_size)
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, hidden_size)
        self.time_modulation = nn.Linear(hidden_size, 6 * hidden_size)
        if caption_channels:
            self.caption_projection = PixArtAlphaTextProjection(caption_channels, hidden_size)
            self.register_buffer("null_caption", torch.randn(caption_length, caption_channels) / caption_channels**0.5)
        self.register_buffer("begin_of_video", torch.zeros(in_channels, *sample_size))
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_attention_heads, mlp_ratio, i, i == num_layers - 1, self.config)
            for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, 1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels * (1 + learn_sigma))
        self._parts: dict[str, Any] = {}
        self._initialise()

    def _initialise(self) -> None:
        """Every attention but the spatial one begins at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        silent: list[nn.Linear] = []
        for block in self.blocks:
            silent += [
                getattr(block, name).proj for name in ("attn_temp", "attn_cf", "cross_attn") if hasattr(block, name)
            ]
            if hasattr(block, "attn_temp_pre_merge"):
                nn.init.eye_(block.attn_temp_pre_merge.weight)
        for layer in silent:
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        num_prompt_frames: int = 0,
        first_frame: int = 0,
        cache: ViDGPTCache | None = None,
    ) -> Tensor:
        """What the chain's prediction type says of every frame [B, X or 2 X, F, h, w]; the second X is the variance.

        Args:
            sample: [B, X, F, h, w], the clean frames first.
            timestep: [B] of the noisy frames, or [B, F].
            encoder_hidden_states: text features [B, L, E]; the null caption if None.
            encoder_attention_mask: [B, L], 1 for a token.
            num_prompt_frames: how many frames are clean.
            first_frame: number of the block's first frame in the clip.
            cache: of the clean frames before; then all frames of the block are noisy.

        Raises:
            InputError: clean frames beside a cache, more frames than there are positions, or text for a model without.
        """
        if cache is not None and num_prompt_frames:
            raise InputError("Beside a cache all frames of a block are noisy; `write` takes the clean ones.")
        given = (encoder_hidden_states, encoder_attention_mask)
        hidden, times = self._run(sample, timestep, given, num_prompt_frames, first_frame, cache, writes=False)
        shift, scale = (self.scale_shift_table + times[:, :, None, None]).unbind(-2)
        out = self.proj_out(self.norm_out(hidden) * (1 + scale) + shift)
        size, (height, width) = self.config.patch_size, sample.shape[-2:]
        out = out.view(*out.shape[:2], height // size, width // size, size, size, -1)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(out), -1, sample.shape[2], height, width)

    def write(
        self,
        sample: Tensor,
        cache: ViDGPTCache,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        first_frame: int,
    ) -> None:
        """One more pass over clean frames [B, X, F, h, w], which leaves their keys and values in the cache."""
        given = (encoder_hidden_states, encoder_attention_mask)
        timestep = sample.new_zeros(len(sample))
        self._run(sample, timestep, given, sample.shape[2], first_frame, cache, writes=True)

    def _run(
        self,
        sample: Tensor,
        timestep: Tensor,
        given: tuple[Tensor | None, Tensor | None],
        prompt_frames: int,
        first: int,
        cache: ViDGPTCache | None,
        writes: bool,
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, F, N, C] after the last block, and the timesteps' features [B, F, C]."""
        batch, _, count = sample.shape[:3]
        tokens = self.patch_embed(sample.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = tokens.unflatten(0, (batch, count)) + self._places(sample.shape[-2:]).to(tokens)
        times = self._times(timestep.to(sample.device), batch, count, prompt_frames).to(tokens.dtype)
        mask, rotation = self._seen(first, count, prompt_frames, cache, writes)
        step = _Pass(
            modulation=self.time_modulation(F.silu(times)).unflatten(-1, (1, 6, -1)),
            prompt=prompt_frames,
            mask=None if mask is None else mask.to(tokens.device),
            time=None if rotation else self._when(first, count).to(tokens),
            rotation=rotation,
            text=self._text(batch, *given),
            cache=cache,
            writes=writes,
            attention=self.attention,
        )
        for block in self.blocks:
            tokens = block(tokens, step)
        return tokens, times

    def _times(self, timestep: Tensor, batch: int, count: int, prompt_frames: int) -> Tensor:
        """Features [B, F, C]; clean frames have timestep 0."""
        if timestep.dim() < 2:
            timestep = timestep.reshape(-1, 1).expand(batch, count).clone()
            timestep[:, :prompt_frames] = 0
        sines = self.time_proj(timestep.flatten()).to(self.time_modulation.weight.dtype)
        return self.time_embed(sines).unflatten(0, (batch, count))

    def _places(self, size: Sequence[int]) -> Tensor:
        """[N, C]: sines of the column in the first half of the channels, of the row in the second."""
        patch = self.config.patch_size
        return _grid_sines(self.config.hidden_size, size[0] // patch, size[1] // patch, self.config.space_scale)

    def _when(self, first: int, count: int) -> Tensor:
        """[F, C]: sines of the frames' numbers."""
        last, numbers = self.config.max_frames, torch.arange(first, first + count, device="cpu")
        if self.config.temporal_positions == "cyclic":
            numbers %= last
        elif first + count > last:
            raise InputError(f"Absolute positions end at {last} frames, and this block ends at {first + count}.")
        return get_1d_sincos_pos_embed_from_grid(self.config.hidden_size, numbers.double() / self.config.time_scale)

    def _seen(
        self, first: int, count: int, prompt_frames: int, cache: ViDGPTCache | None, writes: bool
    ) -> tuple[Tensor | None, tuple[Any, Any] | None]:
        """Which frames each frame sees, bool [F, S] or None for all; under rope the turns of both."""
        numbers = range(first, first + count)
        layout = frames_layout(numbers, Role.ANSWER)
        role = layout.role.masked_fill(torch.arange(count, device="cpu") < prompt_frames, int(Role.PROMPT))
        layout, keys = layout.field("role", role), None
        here, there = list(range(count)), list(range(count))
        if cache is not None:
            if count > cache.temporal.window:
                raise InputError(f"{count} frames at once are more than the {cache.temporal.window} of the cache.")
            cache.begin(numbers, writes)
            keys = cache.temporal.layout
        opened = allowed(self.rule, layout, keys)[0]
        if cache is not None:
            there, here = cache.temporal.ranks(opened)
        rotation = (self._turn(here), self._turn(there)) if self.config.temporal_positions == "rope" else None
        return None if bool(opened.all()) else opened, rotation

    def _turn(self, places: list[int]) -> Any:
        size = self.config.hidden_size // self.config.num_attention_heads
        return get_1d_rotary_pos_embed(size, np.array(places), use_real=True)

    def _text(self, batch: int, features: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if not self.config.caption_channels:
            if features is not None:
                raise InputError("This model has no text: caption_channels is 0.")
            return None, None
        if features is None:
            features = self.null_caption.expand(batch, -1, -1)
        dtype = self.time_modulation.weight.dtype
        return self.caption_projection(features.to(dtype)), None if mask is None else mask.bool()[:, None, None]

    def build_scheduler(self, num_steps: int | None = None) -> Any:
        """The scheduler of diffusers, set to `num_steps`, with its products of alphas in float64.

        Raises:
            InputError: as many steps as its chain has not, or so few that they would begin at its clean end.
        """
        fields = self.config.scheduler or IDDPM
        scheduler = getattr(diffusers, fields["_class_name"]).from_config(dict(fields))
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
        steps, most = self.config.num_steps if num_steps is None else num_steps, scheduler.config.num_train_timesteps
        if not 1 <= steps <= most:
            raise InputError(f"Between 1 and {most} denoising steps, not {steps}.")
        scheduler.set_timesteps(steps)
        if not int(scheduler.timesteps[0]):
            raise InputError(f"With {steps} step(s) spaced so, noise would be taken for clean frames: take more.")
        return scheduler

    def load_parts(self, **parts: Any) -> None:
        """Load what the configuration names and is not there yet: the autoencoder, the text encoder and its tokenizer.

        Args:
            **parts: `vae`, `text_encoder` and `tokenizer` that were loaded already.

        Raises:
            CheckpointError: one cannot be loaded.
        """
        self._parts |= parts
        config, dtype = self.config, self.dtype
        try:
            if config.vae and "vae" not in self._parts:
                vae = diffusers.AutoencoderKL.from_pretrained(config.vae, torch_dtype=dtype)
                self._parts["vae"] = vae.to(self.device).eval()
            if config.text_encoder and "text_encoder" not in self._parts:
                from transformers import AutoTokenizer, T5EncoderModel

                encoder = T5EncoderModel.from_pretrained(config.text_encoder, dtype=dtype)
                self._parts["text_encoder"] = encoder.to(self.device).eval()
                self._parts["tokenizer"] = AutoTokenizer.from_pretrained(config.text_encoder)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"A part of ViD-GPT cannot be loaded: {error}") from error

    def encode_prompt(self, words: str) -> tuple[Tensor, Tensor]:
        """Text features [1, L, E] and their mask int64 [1, L]. Raises InputError without text or its encoder."""
        if not self.config.caption_channels:
            raise InputError("This model takes no prompt: it has no text. Give frames to go on from.")
        tokens = self._part("tokenizer")(
            words, padding="max_length", truncation=True, max_length=self.config.caption_length, return_tensors="pt"
        ).to(self.device)
        return self._part("text_encoder")(tokens.input_ids, tokens.attention_mask)[0], tokens.attention_mask

    def _part(self, name: str) -> Any:
        if name not in self._parts:
            raise InputError(f"The {name} is not loaded. Call model.load_parts() first.")
        return self._parts[name]

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[1, X, F, h, w] of frames uint8 [F, H, W, 3] of any size: scaled to cover the model's, the middle cut out."""
        scale = 8 if self.config.vae else 1
        pixels = _covering(frames, [side * scale for side in self.config.sample_size]).to(self.device, self.dtype)
        if not self.config.vae:
            return pixels.transpose(0, 1)[None]
        latents = self._part("vae").encode(pixels).latent_dist.sample(generator) * self.config.vae_scale
        return latents.transpose(0, 1)[None]

    def decode_frames(self, sample: Tensor) -> Tensor:
        """Frames uint8 [F, H, W, 3] on the CPU of [1, X, F, h, w]."""
        pixels = sample[0].transpose(0, 1)
        if self.config.vae:
            pixels = self._part("vae").decode(pixels / self.config.vae_scale).sample
        elif self.config.in_channels != 3:
            raise InputError(f"{self.config.in_channels} channels are no pixels, and the configuration names no vae.")
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).cpu()

    def rollout(
        self,
        num_frames: int,
        *,
        seed: int = 0,
        given: Any = None,
        prompt: Prompt | Sequence[Prompt] | None = None,
        switches: Sequence[int] = (),
        steps: int | None = None,
        guidance: float = 1.0,
        perturb: int | None = None,
        cached: bool | None = None,
    ) -> ViDGPTRollout:
        """Begin a clip.

        Args:
            num_frames: frames in all, given ones included.
            seed: of all noise.
            given: frames uint8 [G, H, W, 3] to go on from. Without them the clip begins after the "begin of video"
                frame, which is not given out.
            prompt: words, or text features [1, L, E] with their mask [1, L]; or several, for `switches`. Without it the
                null caption is taken.
            switches: frames from which on each prompt after the first counts, ascending; a chunk has the prompt that it
                begins with.
            steps: denoising steps; the configuration's if None.
            guidance: scale of classifier-free guidance.
            perturb: timestep of the noise on clean frames; the configuration's if None.
            cached: whether keys and values are kept. False computes the frames in the window again in every step, as a
                bidirectional model has to.

        Raises:
            InputError: a prompt without text, guidance without a prompt, prompts that are not one more than switches,
                given frames that are no frames or leave nothing to make, a timestep or number of steps that the chain
                has not, or a cache under a rule that allows none.
        """
        prompts = [prompt] if isinstance(prompt, (str, tuple)) else list(prompt or [])
        check_switches(switches, len(prompts), num_frames)
        given = None if given is None else _given(given, num_frames)
        if perturb is not None and not 0 <= perturb < self.build_scheduler().config.num_train_timesteps:
            raise InputError(f"perturb is a timestep of the chain, not {perturb}.")
        if guidance != 1.0 and not prompts:
            raise InputError("Guidance is away from the null caption and towards a prompt: give one.")
        shared = self.config.rule != "bidirectional"
        if cached and not shared:
            raise InputError("Under a bidirectional rule clean frames see noisy ones: their keys cannot be kept.")
        return ViDGPTRollout(
            Denoising(self, self.build_scheduler(steps), guidance=guidance),
            num_frames,
            seed,
            given=given,
            prompts=list(zip((0, *switches), prompts)),
            perturb=self.config.prefix_perturb if perturb is None else perturb,
            cached=shared if cached is None else cached,
        )


def _given(frames: Any, num_frames: int) -> Tensor:
    found = torch.from_numpy(np.array(frames))
    if found.dtype != torch.uint8 or found.dim() != 4 or found.shape[-1] != 3 or not len(found):
        raise InputError(f"Given frames are uint8 [G, H, W, 3], not {found.dtype} {list(found.shape)}.")
    if len(found) >= num_frames:
        raise InputError(f"{len(found)} frames are given and the clip has {num_frames} in all: nothing would be made.")
    return found


def _check_fields(config: Any) -> None:
    height, width = config.sample_size
    if config.rule not in RULES:
        raise InputError(f"ViD-GPT runs under {', '.join(RULES)}, not {config.rule!r}.")
    if height % config.patch_size or width % config.patch_size:
        raise InputError(f"Patches of {config.patch_size} do not fill {height} x {width}.")
    if config.temporal_positions == "cyclic" and config.window + config.chunk_frames > config.max_frames:
        raise InputError(
            f"A window of {config.window} and a chunk of {config.chunk_frames} frames need as many positions, and "
            f"max_frames is {config.max_frames}: two frames that are seen together would have the same one."
        )


@lru_cache(maxsize=8)
def _grid_sines(width: int, rows: int, columns: int, scale: float) -> Tensor:
    row, column = torch.meshgrid(
        torch.arange(rows, device="cpu").double(), torch.arange(columns, device="cpu").double(), indexing="ij"
    )
    halves = (get_1d_sincos_pos_embed_from_grid(width // 2, axis.flatten() / scale) for axis in (column, row))
    return torch.cat(list(halves), 1).float()


_SMOOTH: dict[str, Any] = {"mode": "bilinear", "antialias": True}


def _covering(frames: Tensor, size: Sequence[int]) -> Tensor:
    """float32 [F, 3, h, w] in -1..1 of uint8 [F, H, W, 3]."""
    pixels = torch.as_tensor(frames).movedim(-1, 1).float() / 127.5 - 1
    (height, width), (rows, columns) = size, pixels.shape[-2:]
    factor = max(height / rows, width / columns)
    if factor != 1:
        scaled = [max(height, round(rows * factor)), max(width, round(columns * factor))]
        smaller = rows % scaled[0] == 0 and columns % scaled[1] == 0  # pixels that were written large come back whole
        pixels = F.interpolate(pixels, scaled, **({"mode": "area"} if smaller else _SMOOTH))
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def progressive(noise: Tensor, alpha: float | None, before: Tensor | None = None) -> Tensor:
    """Noise [B, X, F, h, w] of which each frame goes on from the one before it; as it is if alpha is None."""
    if alpha is None:
        return noise
    kept, fresh = alpha / (1 + alpha**2) ** 0.5, 1 / (1 + alpha**2) ** 0.5
    frames, last = [], before
    for new in noise.unbind(2):
        last = new if last is None else kept * last + fresh * new
        frames.append(last)
    return torch.stack(frames, 2)


@dataclass
class Denoising:
    """What the denoising of chunks needs beside noise.

    Attributes:
        scheduler: set to its steps.
        text: features [B, L, E] and mask [B, L], or None.
        guidance: scale of classifier-free guidance; 1 is none.
    """

    model: ViDGPT
    scheduler: Any
    text: tuple[Tensor | None, Tensor | None] = (None, None)
    guidance: float = 1.0

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0

    def _texts(self) -> tuple[Tensor | None, Tensor | None]:
        """Under guidance the null caption comes first, cut as the prompt is."""
        features, mask = self.text
        if not self.guided or features is None:
            return features, mask
        null = self.model.null_caption.to(features).expand_as(features)
        return torch.cat([null, features]), None if mask is None else torch.cat([mask, mask])

    def _doubled(self, x: Tensor) -> Tensor:
        return torch.cat([x, x]) if self.guided else x

    def chunk(
        self,
        noise: Tensor,
        first_frame: int,
        cache: ViDGPTCache | None = None,
        seen: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Clean frames [B, X, F, h, w] of noise [B, X, F, h, w]. The chain runs in float32 at least.

        Args:
            noise: of the chunk.
            first_frame: its number in the clip.
            cache: of the frames before it; or else
            seen: those frames themselves, [B, X, P, h, w], which are computed again in every step.
            generator: of the noise of each step.
        """
        sample, features = noise.to(torch.promote_types(noise.dtype, torch.float32)), self._texts()
        past = 0 if seen is None else seen.shape[2]
        for t in self.scheduler.timesteps:
            block = sample.to(noise.dtype) if seen is None else torch.cat([seen, sample.to(noise.dtype)], 2)
            said = self.model(
                self._doubled(block),
                t.expand(len(block) * (1 + self.guided)),
                *features,
                num_prompt_frames=past,
                first_frame=first_frame - past,
                cache=cache,
            )[:, :, past:].to(sample.dtype)
            sample = self.scheduler.step(self._guide(said), t, sample, generator=generator).prev_sample
        return sample.to(noise.dtype)

    def _guide(self, said: Tensor) -> Tensor:
        """The guided mean, with the variance of the prompt's half; without it where the chain does not learn it."""
        mean, variance = said[:, : self.model.config.in_channels], said[:, self.model.config.in_channels :]
        if self.guided:
            (null, mean), variance = mean.chunk(2), variance.chunk(2)[1]
            mean = null + self.guidance * (mean - null)
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return torch.cat([mean, variance], 1) if learned else mean

    def write(self, sample: Tensor, first_frame: int, cache: ViDGPTCache) -> None:
        """Leave clean frames in the cache."""
        self.model.write(self._doubled(sample), cache, *self._texts(), first_frame=first_frame)


class ViDGPTRollout(Rollout):
    """A clip chunk by chunk: given frames first, as they are after encoding, then what the model makes of noise.

    `ViDGPT.rollout` says what its options mean.

    Attributes:
        planned: (frame, text) of the prompts that are still to come.
        written: frames that later chunks may see, the "begin of video" frame included.
    """

    model: ViDGPT

    def __init__(
        self,
        denoising: Denoising,
        num_frames: int,
        seed: int,
        *,
        given: Tensor | None,
        prompts: Sequence[tuple[int, Prompt]],
        perturb: int,
        cached: bool,
    ):
        super().__init__(denoising.model, num_frames, seed)
        model, config = denoising.model, denoising.model.config
        self.denoising, self.given, self.perturb = denoising, given, perturb
        self.planned = [(frame, self._encoded(words)) for frame, words in prompts]
        self.cache = ViDGPTCache(model) if cached else None
        self.seen: Tensor | None = None
        self.written = 0
        whole = -(-num_frames // config.chunk_frames) * config.chunk_frames
        noise = torch.randn((1, config.in_channels, whole, *config.sample_size), generator=self.random)
        self.noise = progressive(noise, config.progressive_noise).to(model.device, model.dtype)

    def _encoded(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.model.encode_prompt(prompt) if isinstance(prompt, str) else prompt

    def switch(self, prompt: str) -> None:
        """Go on under another prompt. Frames that were written keep what they took from the old one."""
        self.planned = [(frame, text) for frame, text in self.planned if frame > self.done]
        self.denoising.text = self._encoded(prompt)

    @torch.no_grad()
    def next_latents(self) -> Tensor:
        """The next frames [1, X, F, h, w]: the given ones or one chunk."""
        while self.planned and self.planned[0][0] <= self.done:
            self.denoising.text = self.planned.pop(0)[1]
        if self.written == 0:
            begin = self.model.begin_of_video[None, :, None]
            first = begin if self.given is None else self.model.encode_frames(self.given, self.random)
            for part in first.split(self.model.config.chunk_frames, 2):
                self._keep(part)
            if self.given is not None:
                return first
        start = self.written - (self.given is None) - (0 if self.given is None else len(self.given))
        noise = self.noise[:, :, start : start + self.model.config.chunk_frames]
        sample = self.denoising.chunk(noise, self.written, self.cache, self._window(), self.random)
        self._keep(sample)
        return sample

    def _window(self) -> Tensor | None:
        return None if self.cache is not None or self.seen is None else self.seen[:, :, -self.model.config.window :]

    def _keep(self, sample: Tensor) -> None:
        """Write clean frames, under noise of the timestep `perturb`, which the model takes for none."""
        if self.perturb:
            noise = torch.randn(sample.shape, generator=self.random).to(sample)
            steps = torch.tensor([self.perturb], device=sample.device)
            sample = self.denoising.scheduler.add_noise(sample, noise, steps)
        if self.cache is not None:
            self.denoising.write(sample, self.written, self.cache)
        else:
            self.seen = sample if self.seen is None else torch.cat([self._window(), sample], 2)  # type: ignore[list-item]
        self.written += sample.shape[2]

    def _block(self) -> Tensor:
        return self.model.decode_frames(self.next_latents())

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"written": self.written, "seen": self.seen}
        state |= {"text": list(self.denoising.text), "planned": len(self.planned)}
        return state | ({} if self.cache is None else {"cache": self.cache.state_dict()})

    def _load(self, state: dict[str, Any]) -> None:
        if ("cache" in state) != (self.cache is not None):
            raise InputError("This state is of a rollout with keys kept where this one has none, or the reverse.")
        self.written, self.seen = int(state["written"]), state["seen"]
        self.denoising.text = tuple(state["text"])
        self.planned = self.planned[len(self.planned) - int(state["planned"]) :]
        if self.cache is not None:
            self.cache.load_state_dict(state["cache"])


_NAMES = (
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.mlp\.0\.", "time_embed.linear_1."),
    (r"t_embedder\.mlp\.2\.", "time_embed.linear_2."),
    (r"t_block\.1\.", "time_modulation."),
    (r"y_embedder\.y_proj\.fc([12])\.", r"caption_projection.linear_\1."),
    (r"y_embedder\.y_embedding$", "null_caption"),
    (r"bov_token$", "begin_of_video"),
    (r"(blocks\.\d+\.mlp)\.fc1\.", r"\1.net.0.proj."),
    (r"(blocks\.\d+\.mlp)\.fc2\.", r"\1.net.2."),
    (r"final_layer\.linear\.", "proj_out."),
    (r"final_layer\.scale_shift_table$", "scale_shift_table"),
)
_TABLES = ("pos_embed", "pos_embed_temporal")


def from_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' state dict under this module's names. Their tables of sines are computed here, and left out."""
    found = {}
    for name, tensor in tensors.items():
        if name in _TABLES:
            continue
        for pattern, ours in _NAMES:
            name, changed = re.subn("^" + pattern, ours, name)
            if changed:
                break
        found[name] = tensor.squeeze(2) if name == "patch_embed.weight" else tensor
    return found


def example_inputs(model: ViDGPT, batch_size: int) -> dict[str, Any]:
    """What `forward` takes: clean and noisy frames, and text where there is any."""
    config = model.config
    count, width, length = config.prefix_frames + config.chunk_frames, config.caption_channels, config.caption_length
    text = {"encoder_hidden_states": torch.randn(batch_size, length, width)} if width else {}
    return {
        "sample": torch.randn(batch_size, config.in_channels, count, *config.sample_size),
        "timestep": torch.linspace(100, 900, batch_size),
        "num_prompt_frames": config.prefix_frames,
        **text,
    }


def example_options(model: ViDGPT) -> dict[str, Any]:
    """A rollout that needs no download."""
    return {"steps": 2}


MODEL = ViDGPT
_NANO = {
    "sample_size": (16, 16),
    "in_channels": 3,
    "patch_size": 4,
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 4,
    "learn_sigma": False,
    "window": 5,
    "chunk_frames": 4,
    "max_frames": 9,
    "scheduler": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "fixed_small",
        "clip_sample": False,
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    },
    "num_steps": 16,
    "prefix_perturb": 50,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "vid-gpt-xl": {
        "caption_channels": 4096,
        "prefix_perturb": 50,
        "vae": "stabilityai/sd-vae-ft-ema",
        "text_encoder": "DeepFloyd/t5-v1_1-xxl",
    },
    "vid-gpt-tiny": {
        "sample_size": (8, 8),
        "in_channels": 3,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "caption_channels": 16,
        "caption_length": 6,
        "window": 6,
        "chunk_frames": 3,
        "max_frames": 9,
        "num_steps": 3,
    },
    "vid-gpt-nano": _NANO,
}
