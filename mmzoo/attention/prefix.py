"""A beginning that many questions share: its keys and values exist once, whatever the batch.

    prefix = PrefixCache(cache)          # of one pass over the beginning alone, a batch of one
    model.generate(ids, layout, past_key_values=prefix.fresh())

The questions' padding stands after the beginning, see `batch_after`. Under a rule whose beginning
sees later tokens, such as `modality_mutual`, the model refuses any such cache.

Shape legend: B batch, H query heads, G key/value heads, Q queries, P prefix tokens, U later tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import TokenLayout, batch
from mmzoo_kernels.masks import CompactMask
from mmzoo_kernels.relay import Attention, relay_attention


class _PrefixLayer(DynamicLayer):
    """Keys and values of later tokens [B, G, U, D], beside the prefix's [1, G, P, D]. Lengths count both."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.prefix = (keys, values)

    def get_seq_length(self, *args: Any) -> int:
        return self.prefix[0].shape[2] + super().get_seq_length()


class PrefixCache(Cache):
    """transformers' cache over a shared prefix.

    Args:
        cache: what one pass over the beginning left, a batch of one.

    Raises:
        InputError: the cache is of several samples, or holds other layers than plain ones.
    """

    def __init__(self, cache: DynamicCache | PrefixCache):
        layers = []
        for layer in cache.layers:
            if isinstance(layer, _PrefixLayer):
                layers.append(_PrefixLayer(*layer.prefix))
            elif type(layer) is not DynamicLayer or layer.keys is None or layer.keys.shape[0] != 1:
                raise InputError("A shared prefix is a DynamicCache without sliding layers, of a batch of one sample.")
            else:
                layers.append(_PrefixLayer(layer.keys, layer.values))
        super().__init__(layers=layers)

    def fresh(self) -> PrefixCache:
        """The same prefix, and nothing after it: for the next batch of questions."""
        return PrefixCache(self)

    @property
    def length(self) -> int:
        """P."""
        return self.layers[0].prefix[0].shape[2]

    def split(self, mask: CompactMask, rule: str) -> tuple[CompactMask, CompactMask]:
        """Masks over the prefix, of one sample of all B Q queries, and over the later tokens, of a mask [B, Q, P + U].

        Raises:
            UnsupportedMask: the prefix's tokens mean other things to one question than to another.
        """
        prefix = mask.columns(slice(self.length))
        if bool((prefix.value != prefix.value[:1]).any() | (prefix.key_sample != prefix.key_sample[:1]).any()):
            reason = "the questions make the tokens before them differ"
            raise UnsupportedMask("a shared prefix", rule, reason)
        queries = (x.flatten(0, 1)[None] for x in (prefix.query_sample, prefix.lower, prefix.upper))
        sample, lower, upper = queries
        once = CompactMask(sample, prefix.key_sample[:1], lower, upper, prefix.value[:1])
        return once, mask.columns(slice(self.length, None))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | SharedMask,
        attention: Attention,
        scale: float | None = None,
    ) -> Tensor:
        """[B, H, Q, D] over the prefix and the later tokens; `mask` is bool [B, 1, Q, P + U] if not two masks."""
        prefix = self.layers[layer].prefix
        if isinstance(mask, Tensor):
            mask = SharedMask(*mask.tensor_split([self.length], -1))
        return relay_attention(query, prefix, (key, value), mask.own, scale, mask.prefix, attention)[0]


@dataclass(frozen=True)
class SharedMask:
    """What a backend is handed for many queries after a shared prefix: its masks of what `PrefixCache.split` gives."""

    prefix: Any
    own: Any


def batch_after(layouts: Sequence[TokenLayout], prefix: int) -> TokenLayout:
    """One layout [B, L, K] from those of single questions, padded between their shared beginning and what follows.

    Args:
        layouts: [1, L_i, K] each; the first `prefix` tokens are the same in all.
        prefix: P.

    Raises:
        InputError: the beginnings differ.
    """
    beginnings = {tuple(layout[:prefix].data.flatten().tolist()) for layout in layouts}
    if len(beginnings) != 1:
        raise InputError(f"{len(layouts)} layouts have {len(beginnings)} different beginnings of {prefix} tokens.")
    rest = batch([layout[prefix:] for layout in layouts], "left").data
    whole = TokenLayout(torch.cat([layouts[0][:prefix].data.expand(rest.shape[0], -1, -1), rest], 1))
    return whole.field("index", torch.arange(len(whole), device=rest.device))
