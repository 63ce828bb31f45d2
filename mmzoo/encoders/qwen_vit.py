"""The vision transformer of Qwen-VL: a ViT whose patches are read by a fixed number of queries.

Source: "Qwen-VL: A Versatile Vision-Language Model for Understanding, Localization, Text Reading, and Beyond",
arXiv 2308.12966. Parameter names are those of the released checkpoint below `transformer.visual.`, without its last
matrix `proj`.

Shape legend: N images, P patches, Q queries, D width of the transformer, E width of the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput


class QwenVisionConfig(PreTrainedConfig):
    """Configuration of Qwen-VL's vision transformer; the defaults are the released one's.

    Attributes:
        image_size, patch_size: side of the image and of a patch, in pixels.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
        position_side: side of the stored position table, which is resized to the patches.
        output_dim: E, width of the queries and of the output.
        num_queries: Q, a square number.
        pool_head_dim: head width of the attention with which the queries read the patches.
    """

    model_type = "mmzoo_qwen_vit"

    def __init__(
        self,
        image_size: int = 448,
        patch_size: int = 14,
        hidden_size: int = 1664,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 16,
        position_side: int = 16,
        output_dim: int = 4096,
        num_queries: int = 256,
        pool_head_dim: int = 128,
        layer_norm_eps: float = 1e-6,
        **kwargs: Any,
    ):
        self.image_size, self.patch_size = image_size, patch_size
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.position_side, self.output_dim, self.num_queries = position_side, output_dim, num_queries
        self.pool_head_dim, self.layer_norm_eps = pool_head_dim, layer_norm_eps
        super().__init__(**kwargs)


AutoConfig.register(QwenVisionConfig.model_type, QwenVisionConfig, exist_ok=True)


def grid_positions(side: int, dim: int) -> Tensor:
    """float32 [side * side, dim]: sines and cosines of the column, then of the row, in raster order."""
    frequency = 10000.0 ** -(torch.arange(dim // 4) / (dim / 4))
    angle = torch.arange(side)[:, None] * frequency
    table = torch.cat([angle.sin(), angle.cos()], -1)
    row, column = table[:, None].expand(-1, side, -1), table.expand(side, -1, -1)
    return torch.cat([column, row], -1).flatten(0, 1)


def resized(table: Tensor, count: int) -> Tensor:
    """A position table [S * S, D] on another square grid, [count, D], bicubic."""
    if len(table) == count:
        return table
    old, new = math.isqrt(len(table)), math.isqrt(count)
    grid = table.float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.to(table.dtype)


class AttentionPool(nn.Module):
    """Learned queries read the patches once; queries and keys carry fixed positions on a grid, values none.

    Args:
        dim: D, width of the patches.
        output_dim: E.
        num_queries: Q, a square number.
        head_dim: E is a multiple of it.
        eps: of the norms.
        bias: of the matrix that brings the patches to E; without one, patches of that width are taken as they are.
    """

    def __init__(self, dim: int, output_dim: int, num_queries: int, head_dim: int, eps: float, *, bias: bool):
        super().__init__()
        self.pos_embed = nn.Parameter(grid_positions(math.isqrt(num_queries), output_dim), requires_grad=False)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.zeros(num_queries, output_dim), std=0.02))
        self.kv_proj = nn.Identity() if dim == output_dim and not bias else nn.Linear(dim, output_dim, bias=bias)
        self.attn = nn.MultiheadAttention(output_dim, output_dim // head_dim, batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(output_dim, eps), nn.LayerNorm(output_dim, eps)

    def forward(self, patches: Tensor) -> Tensor:
        """[N, Q, E] from patches [N, P, D]."""
        return self.attn(*self._read(patches), need_weights=False)[0]

    def patch_weights(self, patches: Tensor) -> Tensor:
        """[N, Q, P]: how much each query takes from each patch, mean over heads; rows sum to 1."""
        return self.attn(*self._read(patches))[1]

    def _read(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = self.ln_kv(self.kv_proj(patches))
        key = value + resized(self.pos_embed, value.shape[1])
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(value), -1, -1)
        return query, key, value


class Attention(nn.Module):
    """Self-attention whose stacked projection is ordered by head: query, key and value of the first head come first."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, D] from [N, P, D]."""
        query, key, value = self.in_proj(x).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(-2)
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm layer with exact GELU."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        dim, wide = config.hidden_size, config.intermediate_size
        self.ln_1, self.ln_2 = (nn.LayerNorm(dim, config.layer_norm_eps) for _ in range(2))
        self.attn = Attention(dim, config.num_attention_heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, wide), "c_proj": nn.Linear(wide, dim)})

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, D] from [N, P, D]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class QwenVisionTransformer(nn.Module):
    """Qwen-VL's vision transformer with its pooling attention: Q tokens of width E an image."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.conv1 = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(dim**-0.5 * torch.randn(config.position_side**2, dim))
        self.ln_pre = nn.LayerNorm(dim, eps)
        blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.attn_pool = AttentionPool(
            dim, config.output_dim, config.num_queries, config.pool_head_dim, eps, bias=False
        )
        self.ln_post = nn.LayerNorm(config.output_dim, eps)

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """last_hidden_state [N, Q, E] of images [N, 3, H, W]."""
        return BaseModelOutput(last_hidden_state=self.ln_post(self.attn_pool(self.patches(pixel_values))))

    def patches(self, pixel_values: Tensor) -> Tensor:
        """[N, P, D] of images [N, 3, H, W], in raster order, before the queries read them."""
        x = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        x = self.ln_pre(x + resized(self.positional_embedding, x.shape[1]))
        for block in self.transformer["resblocks"]:
            x = block(x)
        return x


def tower_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors under its own names, out of those of a whole Qwen-VL."""
    prefix = "transformer.visual."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and name != f"{prefix}proj"
    }
