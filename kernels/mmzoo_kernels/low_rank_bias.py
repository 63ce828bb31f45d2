"""FlashBias: attention with a low-rank bias on its scores, which is attention with longer queries and keys.

Source: arXiv 2505.12044.

Shape legend: B batch, H heads, Q queries, K keys, D head dim, R rank of the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bias: Tensor,
    key_bias: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + query_bias key_bias^T) v: [B, H, Q, D]. The bias is not scaled.

    Args:
        query: [B, H, Q, D].
        key, value: [B, H, K, D].
        query_bias: [B or 1, H, Q, R].
        key_bias: [B or 1, H, K, R].
        causal: a query sees no later key.
        scale: D ** -0.5 if None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Fused kernels take head dims that are multiples of 8.
    padding = (0, -(query.shape[-1] + query_bias.shape[-1]) % 8)
    queries, keys = (
        F.pad(torch.cat([x, bias.expand(x.shape[0], -1, -1, -1)], -1), padding)
        for x, bias in ((query * scale, query_bias), (key, key_bias))
    )
    return F.scaled_dot_product_attention(queries, keys, value, is_causal=causal, scale=1.0)
