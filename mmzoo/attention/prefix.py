"""A beginning that many questions share: its keys and values exist once, whatever the batch.

    prefix = PrefixCache(cache)          # of one pass over the beginning alone, a batch of one
    model.set_attention("eager")
    model.generate(ids, layout, past_key_values=prefix.fresh())

The questions' padding stands after the beginning, see `batch_after`. Under a rule whose beginning
sees later tokens, such as `modality_mutual`, the model refuses any such cache.

Shape legend: B batch, H query heads, G key/value heads, Q queries, P prefix tokens, U later tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from mmzoo.errors import InputError
from mmzoo.layout import TokenLayout, batch
from mmzoo_kernels.relay import relay_attention


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

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None
    ) -> Tensor:
        """[B, H, Q, D] over the prefix and the later tokens; `mask` is bool [B, 1, Q, P + U]."""
        prefix = self.layers[layer].prefix
        prefix_mask, own_mask = mask.tensor_split([prefix[0].shape[2]], -1)
        return relay_attention(query, prefix, (key, value), own_mask, scale, prefix_mask)[0]


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
