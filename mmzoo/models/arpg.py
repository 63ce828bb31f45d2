"""ARPG: images whose codes are predicted in a random order, several at a time.

Source: "Autoregressive Image Generation with Randomized Parallel Decoding", arXiv 2503.10568. The first half of the
layers reads the content, [class, codes in the order of prediction], and leaves one key and one value a token, which all
layers of the second half share. There a target starts as the embedding of the mask token, the same for all: what is to
be predicted is told by the rotation of its query, which is that of the target's place. The class token has no place:
its rotation is zero, and with it its key.

One rule serves both halves, training and inference, where a segment of the layout is a step of decoding: a token sees
what was read in its own step and before. In training every step is one token, so the rule is causal; at inference the
tokens of one step see each other, which the model was not trained for. This is the authors' way.

Shape legend: B batch, L codes of an image, T content tokens, P targets, S tokens read so far, C width, H heads, D head
dimension, V codes in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from mmzoo import masks
from mmzoo.attention import allowed
from mmzoo.attention.backends import eager_attention
from mmzoo.errors import CheckpointError, InputError
from mmzoo.generation import Generator, Rollout
from mmzoo.layout import FIELDS, Modality, TokenLayout, image, lay_out, text
from mmzoo.rolling_cache import RollingKVCache

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine [B, T, 1, D/2]."""


def layouts(orders: Tensor, side: int, num_predicted: Sequence[int] | None = None) -> tuple[TokenLayout, TokenLayout]:
    """Layouts [B, L, K] of the content, [class, all codes but the last], and of the targets.

    Args:
        orders: [B, L], the place in raster order of each code, in the order of prediction.
        side: of the image, in codes.
        num_predicted: codes of each step; 1 each if None. A segment is a step: that in which a target is predicted, and
            that in which a content token is read, one later.
    """
    counts = torch.tensor([1] * orders.shape[1] if num_predicted is None else list(num_predicted))
    step = torch.repeat_interleave(torch.arange(len(counts)), counts).to(orders.device)
    picture = lay_out(text(1), image(side, side)).data.to(orders.device).expand(len(orders), -1, -1)
    places = F.pad(orders + 1, (1, 0))[..., None].expand(-1, -1, len(FIELDS))
    data = picture.gather(1, places)
    index = torch.arange(orders.shape[1], device=orders.device)
    content = TokenLayout(data[:, :-1]).field("index", index).field("segment", F.pad(step[:-1] + 1, (1, 0)))
    targets = TokenLayout(data[:, 1:]).field("index", index).field("segment", step)
    return content, targets.field("modality", torch.full_like(index, int(Modality.QUERY)))


def decoded_per_step(num_codes: int, steps: int, schedule: Literal["arccos", "cosine"] = "arccos") -> list[int]:
    """How many codes each step predicts: few at first, many in the end.

    Raises:
        InputError: more steps than codes, or another schedule.
    """
    schedules = {"arccos": lambda t: 2 / math.pi * math.acos(t), "cosine": lambda t: math.cos(math.pi / 2 * t)}
    if schedule not in schedules:
        raise InputError(f"The schedules are {', '.join(schedules)}, not {schedule!r}.")
    if not 1 <= steps <= num_codes:
        raise InputError(f"{num_codes} codes are predicted in 1 to {num_codes} steps, not in {steps}.")
    left = [num_codes]
    for step in range(1, steps):
        left.append(max(1, min(left[-1] - 1, int(num_codes * schedules[schedule](step / steps)))))
    return [before - after for before, after in zip(left, [*left[1:], 0], strict=True)]


def rotation(layout: TokenLayout, head_dim: int, theta: float) -> Rotation:
    """Of rows in the first half of the pairs, of columns in the second; zero for a token without a place."""
    frequencies = theta ** (-torch.arange(0, head_dim // 2, 2, device=layout.data.device).float() / (head_dim // 2))
    angles = torch.cat([layout.row[..., None] * frequencies, layout.column[..., None] * frequencies], -1)[:, :, None]
    placed = (layout.row >= 0)[..., None, None]
    return angles.cos() * placed, angles.sin() * placed


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """[B, T, H, D] with neighbours turned as pairs."""
    (cosine, sine), (one, other) = by, x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([one * cosine - other * sine, one * sine + other * cosine], -1).flatten(-2).to(x.dtype)


def keys_values(layer: Any, x: Tensor, num_heads: int, turned: Rotation) -> tuple[Tensor, Tensor]:
    """Rotated key and value [B, T, H, D] of x [B, T, C] by a layer's `to_k` and `to_v`."""
    key, value = (project(x).unflatten(-1, (num_heads, -1)) for project in (layer.to_k, layer.to_v))
    return rotate(key, turned), value


class Attention(nn.Module):
    """Attention to keys and values from elsewhere, or, with `own_keys`, to those that it makes itself."""

    def __init__(self, width: int, num_heads: int, dropout: float, own_keys: bool):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.to_q = nn.Linear(width, width, bias=False)
        if own_keys:
            self.to_k = nn.Linear(width, width, bias=False)
            self.to_v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, turned: Rotation, key: Tensor, value: Tensor, mask: Tensor | None, attention: str
    ) -> Tensor:
        """[B, Q, C] of x [B, Q, C], key and value [B, S, H, D] and bool [1 or B, Q, S]."""
        query = rotate(self.to_q(x).unflatten(-1, (self.num_heads, -1)), turned)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        if attention == "eager":
            opened = x.new_ones(1, query.shape[2], key.shape[2], dtype=torch.bool) if mask is None else mask
            seen = eager_attention(query, key, value, opened, dropout=dropout)[0]
        else:
            seen = F.scaled_dot_product_attention(
                query, key, value, None if mask is None else mask[:, None], dropout_p=dropout
            )
        return self.proj(seen.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, multiple_of: int):
        super().__init__()
        hidden = multiple_of * math.ceil(int(8 * width / 3) / multiple_of)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Layer(nn.Module):
    """Attention and an MLP."""

    def __init__(self, config: Any, own_keys: bool):
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.attn = Attention(width, config.num_attention_heads, config.dropout, own_keys)
        self.attn_norm = nn.RMSNorm(width, config.norm_eps)
        self.ffn = SwiGLU(width, config.multiple_of)
        self.ffn_norm = nn.RMSNorm(width, config.norm_eps)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """[B, Q, C] of x and what its attention gave."""
        x = x + F.dropout(seen, self.dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """The two passes."""

    def __init__(self, config: Any):
        super().__init__()
        half, width = config.num_layers // 2, config.hidden_size
        self.num_heads = config.num_attention_heads
        self.self_dec = nn.ModuleList(Layer(config, own_keys=True) for _ in range(half))
        self.norm = nn.RMSNorm(width, config.norm_eps)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.cross_dec = nn.ModuleList(Layer(config, own_keys=False) for _ in range(half))

    def read(
        self, x: Tensor, turned: Rotation, mask: Tensor | None, attention: str, cache: RollingKVCache | None
    ) -> tuple[Tensor, Tensor]:
        """The shared key and value [B, S, H, D] of content x [B, T, C] and of what the cache holds."""

        def seen(number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return (key, value) if cache is None else cache.update(number, key, value)

        for number, layer in enumerate(self.self_dec):
            normed = layer.attn_norm(x)
            key, value = seen(number, *keys_values(layer.attn, normed, self.num_heads, turned))
            x = layer(x, layer.attn(normed, turned, key, value, mask, attention))
        return seen(len(self.self_dec), *keys_values(self, self.norm(x), self.num_heads, turned))

    def predict(
        self, x: Tensor, turned: Rotation, key: Tensor, value: Tensor, mask: Tensor | None, attention: str
    ) -> Tensor:
        """[B, P, C] of targets x [B, P, C]."""
        for layer in self.cross_dec:
            x = layer(x, layer.attn(layer.attn_norm(x), turned, key, value, mask, attention))
        return x


class Step(NamedTuple):
    """One step of decoding. Rows are the batch's, under guidance followed by as many without a class.

    Attributes:
        input_ids: [rows, T], what was read.
        logits: [rows, P, V], before guidance.
        places: [P], where in raster order the codes belong.
        codes: [B, P], what was drawn.
    """

    input_ids: Tensor
    logits: Tensor
    places: Tensor
    codes: Tensor


class ARPG(Generator):
    """ARPG.

    Args:
        vocab_size: V. After the codes the embedding has the mask, the classes, no class, and a spare row.
        num_classes: their number, which is also the label of no class.
        side: of an image, in codes.
        hidden_size: C.
        num_layers: of both passes, half of them each.
        num_attention_heads: H.
        multiple_of: what the width of the MLP, 8/3 C, is rounded up to.
        norm_eps: of all norms.
        rope_theta: base of the frequencies.
        dropout: of embeddings, attention and the outputs of layers.
        class_dropout: how often training leaves out the class.
        tokenizer: what made the codes; a name to read, nothing is loaded by it.

    Raises:
        InputError: sizes that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        num_classes: int = 1000,
        side: int = 16,
        hidden_size: int = 1024,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        multiple_of: int = 256,
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        dropout: float = 0.1,
        class_dropout: float = 0.1,
        tokenizer: str | None = None,
    ):
        super().__init__()
        if num_layers % 2 or hidden_size % (4 * num_attention_heads):
            raise InputError(
                f"ARPG needs an even number of layers, not {num_layers}, and a width that {num_attention_heads} heads "
                f"with rows and columns of pairs divide, not {hidden_size}."
            )
        self.rule = masks.scale_causal()
        self.embeddings = nn.Embedding(vocab_size + num_classes + 3, hidden_size)
        self.layers = Decoder(self.config)
        self.norm = nn.RMSNorm(hidden_size, norm_eps)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def num_codes(self) -> int:
        """L."""
        return self.config.side**2

    def class_tokens(self, class_labels: Tensor) -> Tensor:
        """Their token ids. Raises InputError for a label that is neither a class nor `num_classes`, no class."""
        wrong = (class_labels < 0) | (class_labels > self.config.num_classes)
        if not torch.compiler.is_compiling() and bool(wrong.any()):
            raise InputError(f"A class is 0 to {self.config.num_classes - 1}, not {class_labels[wrong][0].item()}.")
        return class_labels + self.config.vocab_size + 1

    def forward(
        self, codes: Tensor, class_labels: Tensor, orders: Tensor, num_predicted: Sequence[int] | None = None
    ) -> Tensor:
        """Logits [B, L, V] of all codes at once, in the order of prediction.

        Args:
            codes: int64 [B, L], in raster order.
            class_labels: int64 [B]; in training some are taken for none.
            orders: int64 [B, L], the place of each code, in the order of prediction.
            num_predicted: codes of each step; 1 each, as in training, if None.

        Raises:
            InputError: another number of codes, or a label that is no class.
        """
        if codes.shape != orders.shape or codes.shape[1] != self.num_codes:
            shapes = f"{tuple(codes.shape)} and orders {tuple(orders.shape)}"
            raise InputError(f"An image has {self.num_codes} codes, each with its place; got codes {shapes}.")
        if self.training and self.config.class_dropout:
            left_out = torch.rand(class_labels.shape, device=class_labels.device) < self.config.class_dropout
            class_labels = class_labels.masked_fill(left_out, self.config.num_classes)
        content, targets = layouts(orders, self.config.side, num_predicted)
        ids = torch.cat([self.class_tokens(class_labels)[:, None], codes.gather(1, orders)[:, :-1]], 1)
        return self.predict(targets, content, *self.read(ids, content, content))

    def loss(self, codes: Tensor, class_labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """Mean cross entropy; the orders are drawn, one a sample, if None."""
        orders = torch.rand(codes.shape, device=codes.device).argsort(1) if orders is None else orders
        return F.cross_entropy(self(codes, class_labels, orders).flatten(0, 1), codes.gather(1, orders).flatten())

    def read(
        self, ids: Tensor, layout: TokenLayout, seen: TokenLayout, cache: RollingKVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first pass: the shared key and value [B, S, H, D].

        Args:
            ids: content tokens [B, T].
            layout: theirs.
            seen: of all tokens read so far, these included.
            cache: of those before.
        """
        if cache is not None:
            cache.begin(range(len(seen) - len(layout), len(seen)))
        x = F.dropout(self.embeddings(ids), self.config.dropout, self.training)
        return self.layers.read(x, self._rotation(layout), self._mask(layout, seen), self.attention, cache)

    def predict(self, targets: TokenLayout, seen: TokenLayout, key: Tensor, value: Tensor) -> Tensor:
        """The second pass: logits [B, P, V] of the targets, from the shared key and value of the tokens seen."""
        x = self.embeddings.weight[self.config.vocab_size].expand(len(key), len(targets), -1)
        mask = self._mask(targets, seen)
        return self.head(self.norm(self.layers.predict(x, self._rotation(targets), key, value, mask, self.attention)))

    def _rotation(self, layout: TokenLayout) -> Rotation:
        config = self.config
        return rotation(layout, config.hidden_size // config.num_attention_heads, config.rope_theta)

    def _mask(self, queries: TokenLayout, keys: TokenLayout) -> Tensor | None:
        """Bool [1, Q, S]; None where all is seen. The rule reads segments alone, the same in every row."""
        opened = allowed(self.rule, TokenLayout(queries.data[:1]), TokenLayout(keys.data[:1]))
        return None if bool(opened.all()) else opened

    @torch.no_grad()
    def decode(
        self,
        class_labels: Tensor,
        *,
        steps: int | None = None,
        guidance_scale: float = 4.0,
        guidance: Literal["constant", "linear"] = "constant",
        schedule: Literal["arccos", "cosine"] = "arccos",
        temperature: float = 1.0,
        top_k: int | None = None,
        order: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Step]:
        """Predict the codes of images step by step, in one order for all.

        Args:
            class_labels: int64 [B].
            steps: how many; 64, or as many as there are codes if that is less, if None.
            guidance_scale: of classifier-free guidance; 1 is none, and then half the work.
            guidance: "linear": the scale grows from 1 with the part of the codes that is predicted.
            schedule: how many codes each step predicts.
            temperature: of drawing.
            top_k: draw among so many likeliest codes; 1 draws nothing by chance.
            order: int64 [L], the place of each code, in the order of prediction; drawn if None.
            generator: the source of chance, on any device; torch's own on the CPU if None.

        Raises:
            InputError: a label that is no class, more steps than codes, or an option out of its range.
        """
        if guidance not in ("constant", "linear"):
            raise InputError(f"Guidance is 'constant' or 'linear', not {guidance!r}.")
        if temperature <= 0 or not (top_k is None or 1 <= top_k <= self.config.vocab_size):
            raise InputError(
                f"temperature is above 0, and top_k 1 to {self.config.vocab_size}; got {temperature} and {top_k}."
            )
        counts = decoded_per_step(self.num_codes, min(64, self.num_codes) if steps is None else steps, schedule)
        generator = generator or torch.default_generator
        if order is None:
            order = torch.rand(self.num_codes, generator=generator, device=generator.device).argsort()
        order, labels = order.to(self.device), class_labels.to(self.device)
        if guidance_scale != 1:
            labels = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        content, targets = layouts(order[None], self.config.side, counts)
        cache = RollingKVCache(len(self.layers.self_dec) + 1, self.num_codes)
        ids, read, done = self.class_tokens(labels)[:, None], 0, 0
        for count in counts:
            seen = content[: done + 1]
            kept = self.read(ids, content[read : done + 1], seen, cache)
            logits = self.predict(targets[done : done + count], seen, *kept)
            places, read, done = order[done : done + count], done + 1, done + count
            scale = guidance_scale if guidance == "constant" else 1 + (guidance_scale - 1) * done / self.num_codes
            codes = _drawn(_guided(logits.float(), scale, len(class_labels)) / temperature, top_k, generator)
            yield Step(ids, logits, places, codes)
            ids = codes.repeat(len(labels) // len(codes), 1)

    def generate(self, class_labels: Tensor, **options: Any) -> Tensor:
        """Codes int64 [B, L] in raster order of images of classes [B]; options as `decode` takes them."""
        codes = torch.empty(len(class_labels), self.num_codes, dtype=torch.long, device=self.device)
        for step in self.decode(class_labels, **options):
            codes[:, step.places] = step.codes
        return codes

    def check_tokenizer(self, tokenizer: VQModel | None) -> VQModel:
        """The tokenizer itself. Raises InputError if there is none, or one with another number of codes."""
        if tokenizer is None:
            raise InputError(
                f"ARPG makes codes of {self.config.tokenizer or 'a tokenizer that its configuration does not name'}, "
                "which is not loaded here. Give a diffusers VQModel with its weights as tokenizer=, or take the codes: "
                "model.generate(class_labels)."
            )
        if tokenizer.config.num_vq_embeddings != self.config.vocab_size:
            found = tokenizer.config.num_vq_embeddings
            raise InputError(f"This tokenizer has {found} codes, but those of the model are {self.config.vocab_size}.")
        return tokenizer

    @torch.no_grad()
    def images(self, codes: Tensor, tokenizer: VQModel | None) -> Tensor:
        """Images uint8 [B, height, width, 3] on the CPU of codes [B, L] in raster order.

        Args:
            codes: what `generate` gives.
            tokenizer: the decoder of these codes, in diffusers' form.

        Raises:
            InputError: there is no tokenizer, or it has another number of codes.
        """
        side, tokenizer = self.config.side, self.check_tokenizer(tokenizer)
        shape = (len(codes), side, side, tokenizer.quantize.vq_embed_dim)
        latents = tokenizer.quantize.get_codebook_entry(codes.to(tokenizer.device).flatten(), shape)
        hidden = tokenizer.post_quant_conv(latents)
        pixels = tokenizer.decoder(hidden, latents if tokenizer.config.norm_type == "spatial" else None)
        return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1).cpu()

    def rollout(
        self,
        num_frames: int,
        *,
        seed: int = 0,
        prompt: int | str | None = None,
        tokenizer: VQModel | None = None,
        steps: int | None = None,
        guidance_scale: float = 4.0,
        guidance: Literal["constant", "linear"] = "constant",
        schedule: Literal["arccos", "cosine"] = "arccos",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> ARPGRollout:
        """Begin a series of images of a class.

        Args:
            num_frames: how many.
            seed: of orders and codes.
            prompt: the class, as a number.
            tokenizer: the decoder of the codes.
            steps: these and the others as `decode` takes them.
            guidance_scale: see there.
            guidance: see there.
            schedule: see there.
            temperature: see there.
            top_k: see there.

        Raises:
            InputError: no class, or no tokenizer that fits.
        """
        options = {
            "steps": steps,
            "guidance_scale": guidance_scale,
            "guidance": guidance,
            "schedule": schedule,
            "temperature": temperature,
            "top_k": top_k,
        }
        return ARPGRollout(self, num_frames, seed, prompt, tokenizer, options)


def _guided(logits: Tensor, scale: float, size: int) -> Tensor:
    """[B, P, V] of [B, P, V], or of [2 B, P, V], of which the second half is without a class."""
    if len(logits) == size:
        return logits
    given, none = logits.split(size)
    return none + scale * (given - none)


def _drawn(logits: Tensor, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Codes [B, P] of logits [B, P, V]."""
    if top_k == 1:
        return logits.argmax(-1)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
    odds = logits.softmax(-1).flatten(0, 1).to(generator.device)
    return torch.multinomial(odds, 1, generator=generator).view(logits.shape[:2]).to(logits.device)


class ARPGRollout(Rollout):
    """Images of a class, one a block; a switch of the prompt goes on with another class."""

    def __init__(
        self,
        model: ARPG,
        num_frames: int,
        seed: int,
        prompt: int | str | None,
        tokenizer: VQModel | None,
        options: dict[str, Any],
    ):
        super().__init__(model, num_frames, seed)
        self.tokenizer, self.options = model.check_tokenizer(tokenizer), options
        self.switch(prompt)

    def switch(self, prompt: int | str | None) -> None:
        """Go on with images of another class. Raises InputError if it is none."""
        if not str(prompt).isdecimal() or int(prompt) >= self.model.config.num_classes:
            last = self.model.config.num_classes - 1
            raise InputError(f"ARPG's prompt is the number of a class, 0 to {last}, not {prompt!r}.")
        self.label = int(prompt)

    def _block(self) -> Tensor:
        codes = self.model.generate(torch.tensor([self.label]), generator=self.random, **self.options)
        return self.model.images(codes, self.tokenizer)

    def _state(self) -> dict[str, Any]:
        return {"label": self.label}

    def _load(self, state: dict[str, Any]) -> None:
        self.label = int(state["label"])


def read_checkpoint(path: str | Path, name: str, *, dtype: torch.dtype | None = None) -> ARPG:
    """The model of a file of the authors, such as arpg_300m.pt. Only tensors are read; their names are this module's.

    Args:
        path: the file.
        name: which model it is, such as "arpg-300m".
        dtype: the file's own if None.

    Raises:
        CheckpointError: the file is damaged, holds code, or its parameters do not fit; each that does not is listed.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises classes of its own, of pickle and of the standard library
        raise CheckpointError(f"Cannot read {path} as tensors alone: {error}") from error
    places = (held, *held.values()) if isinstance(held, Mapping) else ()
    tensors = next((one for one in places if isinstance(one, Mapping) and "embeddings.weight" in one), None)
    if tensors is None:
        raise CheckpointError(f"{path} holds no parameters of ARPG: there is no embeddings.weight in it.")
    with torch.device("meta"):
        model = ARPG(**CONFIGS[name])
    wanted = model.state_dict()
    misshapen = [
        (key, tuple(tensors[key].shape), tuple(wanted[key].shape))
        for key in tensors.keys() & wanted.keys()
        if tensors[key].shape != wanted[key].shape
    ]
    if misshapen or tensors.keys() != wanted.keys():
        missing, unexpected = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
        raise CheckpointError(
            f"{path} does not fit {name}.", missing=missing, unexpected=unexpected, misshapen=misshapen
        )
    model.load_state_dict(tensors, assign=True)
    return (model if dtype is None else model.to(dtype)).eval()


def is_in_parts(folder: Path) -> bool:
    """Whether a folder holds files of the authors."""
    return any(folder.glob("arpg_*.pt"))


def read_parts(folder: Path, name: str | None = None, *, dtype: torch.dtype | None = None, **loading: Any) -> ARPG:
    """The model of the authors' file for it in a folder, such as arpg_300m.pt for arpg-300m.

    Args:
        folder: holds one or more files of theirs.
        name: which model to read; arpg-300m if None.
        dtype: the file's own if None.

    Raises:
        CheckpointError: as `read_checkpoint` does.
        InputError: loading options, which a file that is read in memory does not take.
    """
    if loading:
        raise InputError(f"A release of ARPG takes no {', '.join(loading)}. Save the model, and load that.")
    name = name or "arpg-300m"
    return read_checkpoint(folder / f"{name.replace('-', '_')}.pt", name, dtype=dtype)


MODEL = ARPG
_RELEASED = {"tokenizer": "LlamaGen's VQ-16 for classes (vq_ds16_c2i.pt)"}
CONFIGS: dict[str, dict[str, Any]] = {
    "arpg-300m": {**_RELEASED, "hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16},
    "arpg-700m": {**_RELEASED, "hidden_size": 1280, "num_layers": 36, "num_attention_heads": 20},
    "arpg-1b": {**_RELEASED, "hidden_size": 1536, "num_layers": 48, "num_attention_heads": 24},
    "arpg-tiny": {
        "vocab_size": 32,
        "num_classes": 5,
        "side": 4,
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 2,
        "multiple_of": 16,
    },
}


def example_inputs(model: ARPG, batch_size: int) -> dict[str, Any]:
    """What `forward` takes."""
    shape = (batch_size, model.num_codes)
    return {
        "codes": torch.randint(model.config.vocab_size, shape),
        "class_labels": torch.randint(model.config.num_classes, shape[:1]),
        "orders": torch.rand(shape).argsort(1),
    }


def example_options(model: ARPG) -> dict[str, Any]:
    """Options of a `rollout`, with a tokenizer of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = VQModel(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            num_vq_embeddings=model.config.vocab_size,
            norm_num_groups=4,
        )
        nn.init.normal_(tokenizer.quantize.embedding.weight)
    return {"prompt": 1, "steps": 4, "tokenizer": tokenizer.eval()}
