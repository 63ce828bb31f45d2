"""LongLive: Wan, made causal over blocks of frames, with a sink, a short window, and prompts that may change.

Source: "LongLive: Real-time Interactive Long Video Generation", arXiv 2509.22622, version 1.0 of the authors' code. The
layers are diffusers' `WanTransformer3DModel`; own are the time of each frame, the rolling cache, and rotary positions
that begin anywhere. A block of frames is denoised in four steps, then passes once more, clean, and that is what later
blocks see of it. At a change of prompt the frames that are still seen pass once more under the new one (KV-recache).

Unlike the authors' code, relative positions work in batches, a sink may be larger than a block, and the frames that a
recache would throw away are not computed.

Shape legend: B batch, X channels of the latents, F frames of a pass, S frames that are seen, N tokens a frame, C width,
H heads, D head dimension, L text tokens, E their width, P prompts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchLCMScheduler, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from mmzoo import masks
from mmzoo.attention.backends import eager_attention
from mmzoo.attention.compiler import allowed
from mmzoo.errors import CheckpointError, InputError
from mmzoo.generation import Generator, Rollout, check_switches
from mmzoo.rolling_cache import RollingKVCache, frames_layout

Turn = tuple[Tensor, Tensor]
"""Cosine and sine of rotary positions, float32 [T, 1, D / 2]."""


class LongLiveCache:
    """What a block sees beside itself, in every layer: earlier frames, and the prompt.

    Keys of frames are rotated where positions are absolute, and raw where they are relative. The bytes of those of
    frames are 2 x layers x B x window x N x C x bytes of a number.

    Args:
        model: whose layers they are.
        size: height and width of the latents.
        window: frames it holds at most; those of the configuration if None.
    """

    def __init__(self, model: LongLive, size: Sequence[int], window: int | None = None):
        config = model.config
        window = config.window if window is None else window
        if window is None:
            raise InputError("A model without a window sees all frames: say how many there will be.")
        rows, columns = model.grid(*size)
        sink = config.sink if config.window else 0
        self.frames = RollingKVCache(config.num_layers, window, sink=sink, tokens_per_frame=rows * columns)
        self.drop_text()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of frames."""
        return self.frames.nbytes

    def drop_text(self) -> None:
        """Forget the prompt."""
        self.text: list[tuple[Tensor, Tensor] | None] = [None] * len(self.frames.keys)


@dataclass
class _Pass:
    """What all layers of one pass share.

    Attributes:
        times: [B, F, 6, C], what modulates each frame.
        text: [B, L, C] of the prompt; None if the cache has its keys and values.
        cache: None where frames see those of the pass alone.
        write: whether the pass writes into the cache.
        turn, seen: positions of the pass's own tokens, and of all that they see.
        relative: whether keys are turned when they are seen, rather than when they are made.
        mask: bool [F N, S N], or None where all is open.
    """

    times: Tensor
    text: Tensor | None
    cache: LongLiveCache | None
    write: bool
    turn: Turn
    seen: Turn
    relative: bool
    mask: Tensor | None
    attention: str


class Block(WanTransformerBlock):
    """diffusers' block, over frames that have a time each."""

    def __init__(self, layer: int, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer = layer

    def forward(self, x: Tensor, step: _Pass, past: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B, F, N, C] of x [B, F, N, C].

        Args:
            x: tokens.
            step: what the layers share.
            past: keys and values of earlier frames, for a pass that does not write.
        """
        parts = (self.scale_shift_table + step.times.float()).unsqueeze(3).unbind(2)
        shift, scale, gate, late_shift, late_scale, late_gate = parts
        x = _gated(x, self._over_frames(_modulated(self.norm1, x, shift, scale), step, past), gate)
        x = x + self._over_text(self.norm2(x.float()).type_as(x), step)
        return _gated(x, self.ffn(_modulated(self.norm3, x, late_shift, late_scale)), late_gate)

    def _over_frames(self, x: Tensor, step: _Pass, past: tuple[Tensor, Tensor] | None) -> Tensor:
        layer, tokens = self.attn1, x.flatten(1, 2)
        query, key, value = (
            one.unflatten(2, (layer.heads, -1))
            for one in (layer.norm_q(layer.to_q(tokens)), layer.norm_k(layer.to_k(tokens)), layer.to_v(tokens))
        )
        query = rotate(query, step.turn)
        key = key if step.relative else rotate(key, step.turn)
        if step.cache is not None and step.write:
            key, value = step.cache.frames.update(self.layer, key, value)
        elif past is not None:
            key, value = (torch.cat(pair, 1) for pair in zip(past, (key, value), strict=True))
        key = rotate(key, step.seen) if step.relative else key
        return layer.to_out[0](attend(query, key, value, step.mask, step.attention).flatten(2)).view_as(x)

    def _over_text(self, x: Tensor, step: _Pass) -> Tensor:
        layer = self.attn2
        query = layer.norm_q(layer.to_q(x.flatten(1, 2))).unflatten(2, (layer.heads, -1))
        if step.text is None:
            assert step.cache is not None
            key, value = step.cache.text[self.layer]
        else:
            key = layer.norm_k(layer.to_k(step.text)).unflatten(2, (layer.heads, -1))
            value = layer.to_v(step.text).unflatten(2, (layer.heads, -1))
            if step.cache is not None and step.write:
                step.cache.text[self.layer] = (key, value)
        return layer.to_out[0](attend(query, key, value, None, step.attention).flatten(2)).view_as(x)


def _modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def _gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    return (x.float() + change.float() * gate).type_as(x)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, attention: str) -> Tensor:
    """[B, Q, H, D] of query [B, Q, H, D], key and value [B, K, H, D], and a bool mask [Q, K], or None."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if attention == "eager":
        opened = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool) if mask is None else mask
        return eager_attention(query, key, value, opened[None])[0].transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """x [B, T, H, D] at its positions; neighbouring numbers are a pair."""
    cosine, sine = turn
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1).flatten(-2).type_as(x)


@lru_cache(maxsize=16)
def rotary(head_dim: int, frames: tuple[int, ...], rows: int, columns: int, device: torch.device) -> Turn:
    """Positions of the tokens of frames: of the pairs of a head, the first turn by time, then by row, then by column.

    Wan's: of D / 2 pairs a third, rounded down, is for rows and as many for columns; base 10000.
    """
    side = 2 * (head_dim // 6)
    places = (torch.tensor(frames), torch.arange(rows), torch.arange(columns))
    angles = []
    for axis, (place, size) in enumerate(zip(places, (head_dim - 2 * side, side, side), strict=True)):
        speed = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        shape = [1, 1, 1, len(speed)]
        shape[axis] = len(place)
        angles.append((place[:, None] * speed).view(shape).expand(len(frames), rows, columns, -1))
    angle = torch.cat(angles, -1).flatten(0, 2)[:, None]
    return angle.cos().float().to(device), angle.sin().float().to(device)


class LongLive(Generator, WanTransformer3DModel):
    """The causal Wan. Its parameters have the names of diffusers' Wan.

    Args:
        patch_size, num_attention_heads, attention_head_dim, in_channels, out_channels, text_dim, freq_dim, ffn_dim,
        num_layers, cross_attn_norm, qk_norm, eps: as `WanTransformer3DModel` takes them.
        rope_max_seq_len: frames that absolute positions can number.
        text_length: L. Prompts are padded with zeros, which are attended to, as in training.
        window: frames that a block sees, the sink and itself included; None for all.
        sink: first frames that stay visible.
        frames_per_block: frames that are made together and see each other.
        positions: "absolute", or "relative": what is seen is numbered anew from 0, the sink first.
        denoising_steps: timesteps before the shift.
        timestep_shift: of flow matching.
        context_noise: the timestep of the clean pass.
        sample_size: height and width of the latents unless told otherwise.
        vae, text_encoder: where diffusers' Wan pipeline lies that holds them. Without `vae` the model makes pixels.

    Raises:
        InputError: sizes that do not fit together.
    """

    fps: ClassVar[float] = 16.0
    _keep_in_fp32_modules = None  # one type for all, as the authors run it, however the model came to be

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
        text_length: int = 512,
        window: int | None = 12,
        sink: int = 3,
        frames_per_block: int = 3,
        positions: Literal["absolute", "relative"] = "absolute",
        denoising_steps: tuple[int, ...] = (1000, 750, 500, 250),
        timestep_shift: float = 5.0,
        context_noise: float = 0.0,
        sample_size: tuple[int, int] = (60, 104),
        vae: str | None = None,
        text_encoder: str | None = None,
    ):
        _check_sizes(patch_size, window, sink, frames_per_block, positions)
        # Undecorated: decorated, it would put fields of its own into the configuration. The blocks are made below.
        WanTransformer3DModel.__init__.__wrapped__(
            self,
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            num_layers=0,
            eps=eps,
        )
        width = num_attention_heads * attention_head_dim
        sizes = (width, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps)
        self.blocks = nn.ModuleList([Block(layer, *sizes) for layer in range(num_layers)])
        del self.rope  # its tables would be rounded with the weights; see `rotary`
        self.rule = masks.rule("sink-window", **self.rule_options) if window else masks.block_causal(frames_per_block)
        self._parts: dict[str, Any] = {}

    @property
    def rule_options(self) -> dict[str, int]:
        """Arguments of the rule that this model's name in the registry names."""
        config = self.config
        return {"window": config.window, "sink_frames": config.sink, "frames_per_block": config.frames_per_block}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of latents. Raises InputError if patches do not cover them."""
        rows, columns = self.config.patch_size[1:]
        if height % rows or width % columns:
            raise InputError(f"Latents of {height} x {width} cannot be cut into patches of {rows} x {columns}.")
        return height // rows, width // columns

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        cache: LongLiveCache | None = None,
        first_frame: int = 0,
        write: bool = True,
        keep_sink: bool = False,
        rule: masks.Rule | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The flow, noise minus clean latents, [B, X, F, height, width].

        Args:
            hidden_states: noisy latents [B, X, F, height, width].
            timestep: of each clip [B], or of each frame [B, F]; 0 is clean, 1000 noise.
            encoder_hidden_states: prompts [B, L, E]; may be left out once the cache holds them.
            cache: what earlier passes wrote. Without one, frames see those of this pass that the rule names.
            first_frame: number of the first frame in its clip.
            write: write into the cache, without gradients. A pass with gradients reads only: let a clean one follow.
            keep_sink: leave what the sink holds as it is, and see it in place of this pass's own frames there.
            rule: who sees whom, instead of the model's own.
            return_dict: an output of diffusers, or a tuple.

        Raises:
            InputError: arguments that do not fit together.
        """
        frames, (rows, columns) = hidden_states.shape[2], self.grid(*hidden_states.shape[3:])
        if cache is not None and write and torch.is_grad_enabled() and hidden_states.device.type != "meta":
            raise InputError("A cache is written without gradients: use torch.no_grad(), or write=False.")
        x = self.patch_embedding(hidden_states).flatten(3).permute(0, 2, 3, 1)
        moments, times = self._times(timestep, len(x), frames, x.dtype)
        seen = self._seen(range(first_frame, first_frame + frames), cache, write, keep_sink, rule or self.rule)
        step = _Pass(
            times=times,
            text=self._text(encoder_hidden_states, cache if write else None),
            cache=cache,
            write=write,
            relative=self.config.positions == "relative",
            attention=self.attention,
            **self._on_tokens(*seen, rows, columns, x.device),
        )
        for layer, block in enumerate(self.blocks):
            past = cache.frames.past(layer) if cache is not None and not write else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, step, past)
            else:
                x = block(x, step, past)
        flow = self._unpatched(self._head(x, moments), rows, columns)
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)

    def _times(self, timestep: Tensor, batch: int, frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[B, F, C] and [B, F, 6, C]: the embedded time of each frame, for the head and for the blocks."""
        layers = self.condition_embedder
        timestep = timestep.view(-1, 1) if timestep.dim() < 2 else timestep
        distinct = frames if timestep.shape[1] > 1 else 1
        sines = layers.timesteps_proj(timestep.expand(batch, distinct).flatten()).view(batch, distinct, -1)
        moments = layers.time_embedder(sines.to(layers.time_embedder.linear_1.weight.dtype)).to(dtype)
        times = layers.time_proj(layers.act_fn(moments)).unflatten(-1, (6, -1))
        return moments.expand(-1, frames, -1), times.expand(-1, frames, -1, -1)

    def _text(self, prompts: Tensor | None, cache: LongLiveCache | None) -> Tensor | None:
        if cache is not None and cache.text[-1] is not None:
            return None
        if prompts is None:
            raise InputError("This pass needs prompts: no cache holds them.")
        return self.condition_embedder.text_embedder(prompts)

    def _seen(
        self, frames: range, cache: LongLiveCache | None, write: bool, keep_sink: bool, rule: masks.Rule
    ) -> tuple[list[int], list[int], Tensor | None]:
        """Positions of the frames, positions of those that they see, and bool [F, S], or None where all is open."""
        relative, own, seen = self.config.positions == "relative", list(frames), list(frames)
        if cache is None:
            if relative and self.config.window and len(frames) > self.config.window:
                raise InputError("Relative positions beyond the window depend on what is seen. Use a cache.")
            opened: Tensor | None = allowed(rule, frames_layout(frames))[0]
        else:
            cache.frames.begin(frames, keep_sink=keep_sink)
            opened = cache.frames.mask(rule)
            order = list(range(len(cache.frames.frames))) if write else cache.frames.past_first()
            of_slots, of_frames = cache.frames.ranks(opened)
            seen, own = ([of_slots[slot] for slot in order], of_frames) if relative else (seen, own)
            opened = opened if opened is None else opened[:, order]
        if not relative and max(own) >= self.config.rope_max_seq_len:
            raise InputError(
                f"Absolute positions number {self.config.rope_max_seq_len} frames of latents, and this is number "
                f'{max(own)}. Longer clips need positions="relative".'
            )
        return own, seen, None if opened is None or bool(opened.all()) else opened

    def _on_tokens(
        self, own: list[int], seen: list[int], opened: Tensor | None, rows: int, columns: int, device: torch.device
    ) -> dict[str, Any]:
        """What `_seen` says of frames, said of their tokens."""
        turns = [rotary(self.config.attention_head_dim, tuple(x), rows, columns, device) for x in (own, seen)]
        if opened is not None:
            opened = opened.to(device).repeat_interleave(rows * columns, 0).repeat_interleave(rows * columns, 1)
        return {"turn": turns[0], "seen": turns[1], "mask": opened}

    def _head(self, x: Tensor, moments: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[:, None] + moments[:, :, None].float()).chunk(2, 2)
        return self.proj_out(_modulated(self.norm_out, x, shift, scale))

    def _unpatched(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """[B, X, F, height, width] of patches [B, F, N, patch]."""
        x = x.unflatten(2, (rows, columns)).unflatten(-1, (*self.config.patch_size[1:], -1))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def build_scheduler(self) -> FlowMatchLCMScheduler:
        """diffusers' scheduler, set to the shifted steps."""
        scheduler = FlowMatchLCMScheduler(shift=self.config.timestep_shift)
        scheduler.set_timesteps(sigmas=[step / 1000 for step in self.config.denoising_steps])
        return scheduler

    def load_parts(self, **parts: Any) -> None:
        """Take parts that were loaded already: `vae`, `text_encoder`, `tokenizer`. They are no part of the weights."""
        self._parts |= parts

    def part(self, name: Literal["vae", "text_encoder", "tokenizer"]) -> Any:
        """A part, loaded now from where the configuration says if it is not there yet.

        Raises:
            InputError: the configuration names none.
            CheckpointError: it cannot be loaded.
        """
        if name not in self._parts:
            place = self.config.vae if name == "vae" else self.config.text_encoder
            if place is None:
                raise InputError(f"The configuration names no {name}. Give one with model.load_parts({name}=...).")
            self._parts[name] = _load_part(name, place, self.dtype)
        part = self._parts[name]
        return part.to(self.device) if isinstance(part, nn.Module) else part

    @torch.no_grad()
    def encode_prompts(self, prompts: str | Sequence[str] | Tensor) -> Tensor:
        """[P, L, E] of words, zeros after the last; features [P, L, E] are taken as they are.

        Raises:
            InputError: features of another width, or there is no text encoder.
        """
        if isinstance(prompts, Tensor):
            if prompts.dim() != 3 or prompts.shape[-1] != self.config.text_dim:
                raise InputError(
                    f"Features of prompts are [prompts, tokens, {self.config.text_dim}], not {tuple(prompts.shape)}."
                )
            return prompts.to(self.device, self.dtype)
        words = [prompts] if isinstance(prompts, str) else list(prompts)
        words = [" ".join(html.unescape(html.unescape(one)).split()) for one in words]
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.part("tokenizer")(words, max_length=self.config.text_length, **options).to(self.device)
        features = self.part("text_encoder")(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return (features * tokens.attention_mask[..., None]).to(self.dtype)

    @property
    def scale_factors(self) -> tuple[int, int]:
        """Frames and pixels, in each direction, that a number of the latents stands for."""
        if not self.decodes:
            return 1, 1
        vae = self.part("vae")
        return 2 ** sum(vae.config.temperal_downsample), vae.spatial_compression_ratio

    @property
    def decodes(self) -> bool:
        """Whether an autoencoder turns its latents into pixels."""
        return self.config.vae is not None or "vae" in self._parts

    def rollout(
        self,
        num_frames: int,
        *,
        seed: int = 0,
        prompt: str | Sequence[str] | Tensor = "",
        switches: Sequence[int] = (),
        height: int | None = None,
        width: int | None = None,
        recache: Literal["bidirectional", "block-causal"] = "bidirectional",
        global_sink: bool = True,
    ) -> LongLiveRollout:
        """Begin a clip. Its blocks are 3 frames of latents: 9 frames at first, then 12 each with Wan's autoencoder.

        Args:
            num_frames: frames in all.
            seed: of all noise.
            prompt: words, or features [P, L, E]; several, one for each part of the clip.
            switches: where the next prompt begins, from the next block on; one fewer than prompts.
            height: in pixels; the configuration's if None.
            width: in pixels.
            recache: see `Stream`.
            global_sink: see `Stream`.

        Raises:
            InputError: as many switches as prompts do not need, a size that patches do not cover, or no text encoder.
        """
        options = {"recache": recache, "global_sink": global_sink}
        return LongLiveRollout(self, num_frames, seed, prompt, switches, height, width, options)


def _check_sizes(
    patch_size: Sequence[int], window: int | None, sink: int, frames_per_block: int, positions: str
) -> None:
    if patch_size[0] != 1:
        raise InputError(f"A patch is within one frame: patch_size begins with 1, not {patch_size[0]}.")
    if window is not None and window % frames_per_block:
        raise InputError(f"A window of {window} frames does not hold whole blocks of {frames_per_block}.")
    if window is not None and window - sink < frames_per_block:
        raise InputError(
            f"A window of {window} frames with a sink of {sink} has no room for a block of {frames_per_block}."
        )
    if positions not in ("absolute", "relative"):
        raise InputError(f"positions is 'absolute' or 'relative', not {positions!r}.")


def _load_part(name: str, place: str, dtype: torch.dtype) -> Any:
    try:
        if name == "vae":
            return AutoencoderKLWan.from_pretrained(place, subfolder="vae", torch_dtype=dtype).eval()
        from transformers import AutoTokenizer, UMT5EncoderModel

        if name == "tokenizer":
            return AutoTokenizer.from_pretrained(place, subfolder="tokenizer")
        return UMT5EncoderModel.from_pretrained(place, subfolder="text_encoder", dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"LongLive's {name} cannot be loaded from {place}: {error}") from error


class Stream:
    """Latents of B clips, block by block; each block is what the next ones see.

    Args:
        model: the model.
        prompts: [B, L, E].
        size: height and width of the latents; the configuration's if None.
        window: frames that the cache holds, no fewer than the configuration's, which is taken if None.
        recache: who sees whom when seen frames pass again under a new prompt. "bidirectional": all see all, as in the
            authors' code and as the weights were trained; "block-causal": as in generation.
        global_sink: whether the sink keeps its keys and values, made under the old prompt, once the clip is longer than
            the window. Without it the oldest frames that are seen become the sink.
        recache_frames: how many frames pass again; as many as the window holds if None.
        authors_large_sink: what the authors' code does where the sink is larger than a block (no released one is): the
            sink's frames that are not made yet are seen as zeros, and of those made after the first block the noisiest
            pass stays, in place of the clean one.

    Attributes:
        frame: frames made so far.
        latents: the last of them that the window holds, [B, X, <= window, height, width].
    """

    def __init__(
        self,
        model: LongLive,
        prompts: Tensor,
        *,
        size: Sequence[int] | None = None,
        window: int | None = None,
        recache: Literal["bidirectional", "block-causal"] = "bidirectional",
        global_sink: bool = True,
        recache_frames: int | None = None,
        authors_large_sink: bool = False,
    ):
        if recache not in ("bidirectional", "block-causal"):
            raise InputError(f"recache is 'bidirectional' or 'block-causal', not {recache!r}.")
        self.model, self.prompts, self.size = model, prompts, tuple(size or model.config.sample_size)
        self.recache_rule = model.rule if recache == "block-causal" else masks.bidirectional()
        self.global_sink, self.authors_large_sink = global_sink, authors_large_sink
        if window is not None and window < (model.config.window or 0):
            raise InputError(f"A cache of {window} frames is smaller than the model's window of {model.config.window}.")
        self.cache = LongLiveCache(model, self.size, window)
        held = self.cache.frames.window
        self.recache_frames = held if recache_frames is None else min(recache_frames, held)
        if self.recache_frames < 1 or self.recache_frames % model.config.frames_per_block:
            raise InputError(f"{self.recache_frames} frames that pass again are no whole blocks.")
        if authors_large_sink:
            self.cache.frames.frames = list(range(self.cache.frames.sink))
        self.frame, self._begun = 0, -1
        self.latents = prompts.new_zeros(len(prompts), model.config.in_channels, 0, *self.size)

    def flow(self, x: Tensor, timestep: float | Tensor, **options: Any) -> Tensor:
        """What the model says about the frames from `frame` on, at one timestep."""
        times = torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x))
        if self.authors_large_sink:
            again, self._begun = self._begun == self.frame, self.frame
            inside = 0 < self.frame < self.cache.frames.sink
            options = {"keep_sink": again and inside, "rule": masks.bidirectional(), **options}
        options = {"first_frame": self.frame, **options}
        return self.model(x, times, self.prompts, cache=self.cache, return_dict=False, **options)[0]

    def noise(self, random: torch.Generator | None) -> Tensor:
        """What a block begins as."""
        shape = (len(self.prompts), self.model.config.in_channels, self.model.config.frames_per_block, *self.size)
        return randn_tensor(shape, random, device=self.prompts.device, dtype=self.prompts.dtype)

    @torch.no_grad()
    def denoise(self, x: Tensor, random: torch.Generator | None, num_steps: int | None = None) -> Tensor:
        """Noise [B, X, F, height, width] after the first `num_steps` steps; after all of them it is clean."""
        scheduler = self.model.build_scheduler()
        for timestep in scheduler.timesteps[:num_steps]:
            x = scheduler.step(self.flow(x, timestep), timestep, x, random, return_dict=False)[0]
        return x

    @torch.no_grad()
    def keep(self, x: Tensor) -> None:
        """Let clean frames [B, X, F, height, width] pass, be seen by what follows, and go on after them."""
        self.flow(x, self.model.config.context_noise)
        self.frame += x.shape[2]
        self.latents = torch.cat([self.latents, x], 2)[:, :, -self.cache.frames.window :]

    def block(self, random: torch.Generator | None) -> Tensor:
        """The next block, [B, X, F, height, width]."""
        x = self.denoise(self.noise(random), random)
        self.keep(x)
        return x

    @torch.no_grad()
    def switch(self, prompts: Tensor) -> None:
        """Go on under other prompts [B, L, E]: frames that are seen pass once more under them, at once."""
        self.prompts = prompts
        self.cache.drop_text()
        seen = self.latents[:, :, -self.recache_frames :]
        first = self.frame - seen.shape[2]
        if first and self.global_sink:  # the oldest give way to the sink, and nothing would be kept of them
            seen = self.latents[:, :, -min(self.recache_frames, self.cache.frames.window - self.cache.frames.sink) :]
            first = self.frame - seen.shape[2]
        else:
            self.cache.frames.reset(first)
        if seen.shape[2]:
            options = {"first_frame": first, "rule": self.recache_rule}
            self.flow(seen, self.model.config.context_noise, **options)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, as `torch.load(weights_only=True)` reads them."""
        parts = {"frame": self.frame, "latents": self.latents.clone(), "prompts": self.prompts.clone()}
        return {**parts, "cache": self.cache.frames.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as another stream of the same sizes. Raises InputError for other sizes."""
        if state["latents"].shape[3:] != self.latents.shape[3:] or state["prompts"].shape != self.prompts.shape:
            raise InputError("This state is of clips of another size or number.")
        self.frame = int(state["frame"])
        self.latents, self.prompts = (state[name].to(self.prompts) for name in ("latents", "prompts"))
        self.cache.frames.load_state_dict(state["cache"])
        self.cache.drop_text()


def moments(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of Wan's latents, each [1, X, 1, 1, 1]; those that the model makes have 0 and 1."""
    config = vae.config
    mean, deviation = (like.new_tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    return mean, deviation


class StreamingDecoder:
    """Wan's autoencoder, frame after frame: what blocks give, side by side, is what `decode` gives at once.

    diffusers' `decode` forgets at its end what its causal convolutions saw. Here that is kept.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae
        vae.clear_cache()
        self.seen: list[Tensor | str | None] = [None] * vae._conv_num

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, frames, height, width] in [-1, 1] of the next latents [B, X, F, height / 8, width / 8]."""
        config, (mean, scale) = self.vae.config, moments(self.vae, latents)
        x = self.vae.post_quant_conv((latents * scale + mean).to(self.vae.dtype))
        parts = [x] if self.seen[0] is not None else [x[:, :, :1], x[:, :, 1:]]
        pixels = [self._decode(part) for part in parts if part.shape[2]]
        whole = torch.cat(pixels, 2)
        if config.patch_size is not None:
            whole = unpatchify(whole, patch_size=config.patch_size)
        return whole.clamp(-1, 1)

    def _decode(self, x: Tensor) -> Tensor:
        return self.vae.decoder(x, feat_cache=self.seen, feat_idx=[0], first_chunk=self.seen[0] is None)


class LongLiveRollout(Rollout):
    """A clip of LongLive in the making; see `LongLive.rollout`."""

    model: LongLive

    def __init__(
        self,
        model: LongLive,
        num_frames: int,
        seed: int,
        prompt: str | Sequence[str] | Tensor,
        switches: Sequence[int],
        height: int | None,
        width: int | None,
        options: dict[str, Any],
    ):
        super().__init__(model, num_frames, seed)
        self.prompts, self.switches, self.part = model.encode_prompts(prompt), list(switches), 0
        check_switches(self.switches, len(self.prompts), num_frames)
        ratio, scale = model.scale_factors
        given = zip((height, width), model.config.sample_size, strict=True)
        size = [side if pixels is None else pixels / scale for pixels, side in given]
        if any(side != int(side) for side in size):
            raise InputError(f"Height and width are multiples of {scale} pixels, not {height} and {width}.")
        block, latents = model.config.frames_per_block, 1 + math.ceil((num_frames - 1) / ratio)
        whole = math.ceil(latents / block) * block
        if model.config.positions == "absolute" and whole > model.config.rope_max_seq_len:
            raise InputError(
                f"A clip of {num_frames} frames is {whole} frames of latents, and absolute positions number "
                f'{model.config.rope_max_seq_len}. Longer clips need positions="relative".'
            )
        window = None if model.config.window else whole
        self.stream = Stream(model, self.prompts[:1], size=[int(side) for side in size], window=window, **options)
        self.decoder = StreamingDecoder(model.part("vae")) if model.decodes else None
        if self.decoder is None and model.config.out_channels != 3:
            raise InputError(f"{model.config.out_channels} channels are no pixels, and the model has no vae.")

    def switch(self, prompt: str | Tensor) -> None:
        """Go on under another prompt, words or features [1, L, E], from the next block on."""
        self.stream.switch(self.model.encode_prompts(prompt))

    def _block(self) -> Tensor:
        before = self.part
        while self.part < len(self.switches) and self.switches[self.part] <= self.done:
            self.part += 1
        if self.part != before:
            self.stream.switch(self.prompts[self.part, None])
        latents = self.stream.block(self.random)
        pixels = latents if self.decoder is None else self.decoder(latents)
        return ((pixels[0].float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu()

    def _state(self) -> dict[str, Any]:
        seen = [] if self.decoder is None else list(self.decoder.seen)
        return {"part": self.part, "stream": self.stream.state_dict(), "decoder": seen}

    def _load(self, state: dict[str, Any]) -> None:
        self.part = int(state["part"])
        self.stream.load_state_dict(state["stream"])
        if self.decoder is not None:
            device = self.stream.prompts.device
            self.decoder.seen = [x.to(device) if isinstance(x, Tensor) else x for x in state["decoder"]]


def from_authors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the authors' code, or of their LoRA, under the names of diffusers' Wan."""
    plain = {}
    for name, tensor in tensors.items():
        name = name.replace("_fsdp_wrapped_module.", "").removeprefix("base_model.model.").removeprefix("model.")
        plain[name] = tensor
    return convert_wan_transformer_to_diffusers(plain)


def merge_lora(
    state: Mapping[str, Tensor], lora: Mapping[str, Tensor], *, alpha: float | None = None
) -> dict[str, Tensor]:
    """A state dict with LoRA added to its weights: W + alpha / rank x B A.

    Args:
        state: of the model, under diffusers' names.
        lora: pairs `<module>.lora_A.weight` and `<module>.lora_B.weight`, under diffusers' names.
        alpha: the released one's is its rank, which None stands for.

    Raises:
        CheckpointError: halves without the other, or modules that the model lacks or has in another shape.
    """
    merged, low, high = dict(state), ".lora_A.weight", ".lora_B.weight"
    modules = {name.removesuffix(end) for name in lora for end in (low, high) if name.endswith(end)}
    wanted = {f"{module}{end}" for module in modules for end in (low, high)}
    missing = wanted - lora.keys()
    unexpected = (lora.keys() - wanted) | {module for module in modules if f"{module}.weight" not in state}
    if missing or unexpected:
        raise CheckpointError("The LoRA does not fit the model.", missing=missing, unexpected=unexpected)
    for module in modules:
        down, up, weight = lora[module + low], lora[module + high], state[f"{module}.weight"]
        if (up.shape[0], down.shape[1]) != tuple(weight.shape) or down.shape[0] != up.shape[1]:
            shape = (up.shape[0], down.shape[1])
            raise CheckpointError("The LoRA does not fit.", misshapen=[(module, shape, tuple(weight.shape))])
        scale = 1.0 if alpha is None else alpha / len(down)
        merged[f"{module}.weight"] = (weight.float() + scale * up.float() @ down.float()).to(weight.dtype)
    return merged


BASE, LORA = Path("models/longlive_base.pt"), Path("models/lora.pt")
_KEYS = ("generator", "generator_ema", "model")
"""Under what the authors' files hold the weights; the first that is there counts."""


def read_authors_file(path: Path, keys: Sequence[str] = _KEYS) -> dict[str, Tensor]:
    """The weights in one of the authors' files, under diffusers' names. Code in it is refused, never run.

    Raises:
        CheckpointError: it is damaged, holds code, or none of the keys.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises classes of its own, of pickle and of the standard library
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged, or holds more than tensors: {said}") from error
    key = next((key for key in keys if isinstance(held, dict) and key in held), None)
    if key is None:
        raise CheckpointError(f"{path} holds none of {', '.join(keys)}.")
    return from_authors(held[key])


def is_in_parts(folder: Path) -> bool:
    """Whether a folder is the authors' release: a base model, and a LoRA of it."""
    return (folder / BASE).is_file()


def read_parts(folder: Path, name: str | None = None, *, dtype: torch.dtype | None = None, **loading: Any) -> LongLive:
    """The model of the authors' release; where `models/lora.pt` is, it is merged.

    Args:
        folder: holds `models/longlive_base.pt`.
        name: of which registered model its sizes are; longlive-1.3b if None.
        dtype: the file's own if None.

    Raises:
        CheckpointError: a file is damaged, or does not fit; each parameter that does not is listed.
        InputError: loading options, which a release that is read in memory does not take.
    """
    if loading:
        raise InputError(f"A release of LongLive takes no {', '.join(loading)}. Save the model, and load that.")
    state = read_authors_file(folder / BASE)
    if (folder / LORA).is_file():
        state = merge_lora(state, read_authors_file(folder / LORA, ("generator_lora",)))
    with torch.device("meta"):
        model = LongLive(**CONFIGS[name or "longlive-1.3b"])
    wanted = model.state_dict()
    misshapen = [
        (one, tuple(state[one].shape), tuple(wanted[one].shape))
        for one in state.keys() & wanted.keys()
        if state[one].shape != wanted[one].shape
    ]
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or unexpected or misshapen:
        raise CheckpointError(
            f"{folder / BASE} does not fit.", missing=missing, unexpected=unexpected, misshapen=misshapen
        )
    model.load_state_dict(state, assign=True)
    return model.to(dtype or next(iter(state.values())).dtype)


_WAN = (
    "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim", "freq_dim",
    "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "rope_max_seq_len",
)  # fmt: skip


def is_release(described: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of diffusers' Wan, text to video."""
    return described.get("_class_name") == "WanTransformer3DModel" and not described.get("image_dim")


def read_release(folder: Path, described: Mapping[str, Any]) -> tuple[dict[str, Any], None]:
    """Fields of the configuration of a Wan in diffusers' layout, under LongLive's window; and no processor."""
    return {name: described[name] for name in _WAN if name in described}, None


def example_inputs(model: LongLive, batch_size: int = 1) -> dict[str, Tensor]:
    """Random arguments of `forward`: two blocks, each frame at a time of its own."""
    config = model.config
    frames = 2 * config.frames_per_block
    return {
        "hidden_states": torch.randn(batch_size, config.in_channels, frames, *config.sample_size),
        "timestep": torch.rand(batch_size, frames) * 1000,
        "encoder_hidden_states": torch.randn(batch_size, config.text_length, config.text_dim),
    }


def example_options(model: LongLive) -> dict[str, Any]:
    """Options of `rollout` that need no text encoder: features of two prompts, the second from frame 5 on."""
    features = torch.randn(
        2, model.config.text_length, model.config.text_dim, generator=torch.Generator().manual_seed(0)
    )
    return {"prompt": features, "switches": [5]}


MODEL = LongLive
_PIPELINE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
CONFIGS: dict[str, dict[str, Any]] = {
    "longlive-1.3b": {"vae": _PIPELINE, "text_encoder": _PIPELINE},
    "longlive-tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 20,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 2,
        "text_length": 8,
        "window": 6,
        "sink": 2,
        "frames_per_block": 2,
        "sample_size": (16, 16),
    },
}
