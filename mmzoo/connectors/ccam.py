"""CCAM projector: learned queries read a whole clip under a causal cross-attention mask.

Source: "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and Long
Videos", arXiv 2408.14023. The authors' code of this module is not public. The sizes are those that the released
configuration of Video-CCAM-7B-v1.2 names; the order of norms and residuals, the rounding of the mask and the parameter
names are this project's definition.

Shape legend: B rows, M items (images or clips) of a row, F frames of a row, P patches of a frame, C width of the
patches, N queries of an item, E hidden size, W output size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmzoo import masks
from mmzoo.attention.backends import attend, eager_attention
from mmzoo.attention.compiler import allowed
from mmzoo.errors import InputError
from mmzoo.layout import TokenLayout
from mmzoo.masks.ccam import Rounding, item_layouts, last_frames


class CrossAttention(nn.Module):
    """Queries attend to patches under a rule; heads of keys and values may be grouped."""

    def __init__(self, hidden_size: int, cross_hidden_size: int, num_heads: int, num_key_value_heads: int, bias: bool):
        super().__init__()
        if hidden_size % num_heads or num_heads % num_key_value_heads:
            raise InputError(
                f"Hidden size {hidden_size}, {num_heads} heads and {num_key_value_heads} key/value heads must divide "
                "one another in this order."
            )
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(cross_hidden_size, num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(cross_hidden_size, num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(
        self,
        queries: Tensor,
        patches: Tensor,
        rule: masks.Rule,
        layouts: tuple[TokenLayout, TokenLayout],
        attention: str,
    ) -> Tensor:
        """[B, M * N, E] from queries [B, M * N, E] and patches [B, F * P, C]."""
        attended = attend(*self.heads_of(queries, patches), rule, *layouts, attention=attention)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def heads_of(self, queries: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by head."""
        projected = self.q_proj(queries), self.k_proj(patches), self.v_proj(patches)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        return query, key, value


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class CCAMProjector(nn.Module):
    """`num_query` tokens for each item, however many frames it has.

    There is no position or time encoding: the mask is what tells the order of frames.

    Args:
        cross_hidden_size: C.
        output_size: W.
        num_query: N.
        hidden_size: E.
        intermediate_size: of the feed-forward part.
        num_heads, num_key_value_heads: of the attention; as many of both if None.
        attention_bias, mlp_bias: whether their linear layers have biases.
        layer_norm_eps: of every norm.
        rule: "ccam", or another rule of the zoo, such as "bidirectional": plain cross-attention, to compare with.
        rounding: which frames a query sees where frames and queries do not divide: see `masks.ccam.query_layout`.

    Raises:
        InputError: sizes that do not divide, an unknown rule or rounding.
    """

    def __init__(
        self,
        cross_hidden_size: int,
        output_size: int,
        num_query: int = 1024,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_heads: int = 16,
        num_key_value_heads: int | None = None,
        attention_bias: bool = True,
        mlp_bias: bool = True,
        layer_norm_eps: float = 1e-5,
        rule: str = "ccam",
        rounding: Rounding = "ceil",
    ):
        super().__init__()
        self.rule, self.rounding, self.attention = masks.rule(rule), rounding, "sdpa"
        last_frames(1, torch.ones(1, dtype=torch.long), rounding)  # an unknown rounding is an error here, not later
        self.query = nn.Parameter(torch.randn(num_query, hidden_size) * 0.02)
        self.norm_q = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.norm_kv = nn.LayerNorm(cross_hidden_size, eps=layer_norm_eps)
        self.cross_attn = CrossAttention(
            hidden_size, cross_hidden_size, num_heads, num_key_value_heads or num_heads, attention_bias
        )
        self.norm_mlp = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.mlp = SwiGLU(hidden_size, intermediate_size, mlp_bias)
        self.norm_out = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.out_proj = nn.Linear(hidden_size, output_size)

    def forward(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """Tokens [B, M, N, W] of the items of each row, which never meet.

        Args:
            features: [B, F, P, C], the frames of a row's items one after another, then padding.
            num_frames: int64 [B, M], frames of each item, then 0; the tokens of an item of 0 frames say nothing.
        """
        queries, layouts = self._queries(features, num_frames)
        attended = self.cross_attn(
            self.norm_q(queries), self.norm_kv(features.flatten(1, 2)), self.rule, layouts, self.attention
        )
        hidden = queries + attended
        hidden = hidden + self.mlp(self.norm_mlp(hidden))
        return self.out_proj(self.norm_out(hidden)).unflatten(1, (num_frames.shape[1], -1))

    def _queries(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, tuple[TokenLayout, TokenLayout]]:
        rows, frames, patches = features.shape[:3]
        queries = self.query.to(features.dtype).repeat(num_frames.shape[1], 1).expand(rows, -1, -1)
        return queries, item_layouts(len(self.query), num_frames, frames, patches, self.rounding)

    @torch.no_grad()
    def patch_weights(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """[B, M, N, F * P]: how much each token takes from each patch, mean over heads; an item's rows sum to 1."""
        queries, layouts = self._queries(features, num_frames)
        heads = self.cross_attn.heads_of(self.norm_q(queries), self.norm_kv(features.flatten(1, 2)))
        weights = eager_attention(*heads, allowed(self.rule, *layouts))[1]
        return weights.float().mean(1).unflatten(1, (num_frames.shape[1], -1))
