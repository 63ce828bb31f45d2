"""The three projections of DeepSpeed-VisualChat: from the vision tower to the language model.

Source: "DeepSpeed-VisualChat: Multi-Round Multi-Image Interleave Chat via Multi-Modal Causal Attention",
arXiv 2309.14327, section 3, with the details of the authors' code. The paper's models use `baseline_projection`.

Shape legend: N images, P patches, D width of the tower, W width of the language model.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from mmzoo.encoders.qwen_vit import AttentionPool

EPS = 1e-12


def baseline_projection(dim: int, width: int) -> nn.Sequential:
    """[N, P, W] from features [N, P, D]: Linear, LayerNorm."""
    return nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width, EPS))


class VitProjection(nn.Module):
    """One more layer of the tower's kind, then the baseline."""

    def __init__(self, config: CLIPVisionConfig, width: int):
        super().__init__()
        self.vis_layer = CLIPEncoderLayer(config)
        self.projection = baseline_projection(config.hidden_size, width)

    def forward(self, features: Tensor) -> Tensor:
        """[N, P, W] from features [N, P, D]."""
        hidden = self.vis_layer(features, attention_mask=None)
        return self.projection(hidden[0] if isinstance(hidden, tuple) else hidden)


class PerceiverProjection(AttentionPool):
    """A fixed number of queries reads the patches, without the class token that comes first; then LayerNorm, Linear."""

    def __init__(self, dim: int, width: int, num_queries: int = 256, head_dim: int = 128):
        super().__init__(dim, width, num_queries, head_dim, EPS, bias=True)
        self.projection = nn.Sequential(nn.LayerNorm(width, EPS), nn.Linear(width, width))

    def forward(self, features: Tensor) -> Tensor:
        """[N, Q, W] from features [N, 1 + P, D], the class token first."""
        return self.projection(super().forward(features[:, 1:]))

    def patch_weights(self, features: Tensor) -> Tensor:
        """[N, Q, P]: how much each query takes from each patch, mean over heads; rows sum to 1."""
        return super().patch_weights(features[:, 1:])
