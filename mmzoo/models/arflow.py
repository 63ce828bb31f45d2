"""ARFlow's attention: softmax inside each image, gated linear attention over the images before.

Source: ARFlow, arXiv 2501.16085, `GateRetention` in the authors' code. A sequence is several images of one class, from
the noisiest to the clean one. This is the module alone: no model around it is registered.

Shape legend: B batch, I images, N tokens of an image, C width, H heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmzoo.errors import InputError


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class GateRetention(nn.Module):
    """Hybrid linear attention.

    For image s, with keys k scaled by D ** -0.5 and m_s the mean over its tokens of its gates a:

        inner = softmax(q k^T) v
        cross = (q * exp(cumsum(a))) S_s,   S_0 = 0,   S_{s+1} = exp(m_s) S_s + k^T v
        output = W_o(silu(W x) * rms_norm(inner + cross))

    Image s decays S_s by its own gate. All images of a call are computed at once; given the state that an earlier call
    left, the next images give what they give as a part of the whole.

    Args:
        width: C.
        num_heads: H.
        tokens_per_image: N.
        gate_normalizer: what the gates' logarithms are divided by.
        norm_eps: of the norms, which have no weights.
    """

    def __init__(
        self, width: int, num_heads: int, tokens_per_image: int, gate_normalizer: float = 16, norm_eps: float = 1e-6
    ):
        super().__init__()
        if width % num_heads:
            raise InputError(f"{num_heads} heads do not divide a width of {width}.")
        self.num_heads, self.tokens_per_image = num_heads, tokens_per_image
        self.gate_normalizer, self.norm_eps = gate_normalizer, norm_eps
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.g_proj = nn.Linear(width, width, bias=False)
        self.gt_proj = nn.Linear(width, num_heads, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output [B, I N, C] and the state [B, H, D, D] after the last image.

        Args:
            x: [B, I N, C], whole images.
            condition: time and class, [B, I N, C], the same for all tokens of an image.
            state: what the call on the images before returned; None at the first image.

        Raises:
            InputError: an image is not whole.
        """
        if x.shape[1] == 0 or x.shape[1] % self.tokens_per_image:
            raise InputError(f"{x.shape[1]} tokens are not whole images of {self.tokens_per_image}.")
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        key = key * key.shape[-1] ** -0.5
        gate = self._images(self.gt_proj(x + condition))  # [B, H, I, N]
        gate = F.logsigmoid(gate.to(_precision(x))) / self.gate_normalizer
        inner = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        states, last = self._states(key, value, gate.mean(-1), state)
        cross = (query * gate.cumsum(-1)[..., None].exp()) @ states
        seen = self._norm(inner + cross.to(inner.dtype)).permute(0, 2, 3, 1, 4).reshape(x.shape)
        return self.out_proj(F.silu(self.g_proj(x)) * seen), last

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.norm_eps)

    def _images(self, x: Tensor) -> Tensor:
        """[B, H, I, N, ...] of [B, I N, H, ...]."""
        return x.unflatten(1, (-1, self.tokens_per_image)).movedim(3, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, I, N, D] of [B, I N, C], normalised over all heads."""
        return self._images(self._norm(x).unflatten(-1, (self.num_heads, -1)))

    @staticmethod
    def _states(key: Tensor, value: Tensor, gate: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """States before each image [B, H, I, D, D], and after the last, in float32 at least.

        Image r still counts in S_s by the gates of the images between the two.
        """
        added = key.transpose(-1, -2).to(gate.dtype) @ value.to(gate.dtype)
        past = F.pad(gate.cumsum(-1), (1, 0))  # [B, H, I + 1]: decay since the first image
        apart = past[..., :, None] - past[..., None, 1:]
        number = torch.arange(past.shape[-1], device=key.device)
        kept = torch.where(number[:, None] > number[:-1], apart, float("-inf")).exp()  # [B, H, I + 1, I]
        states = torch.einsum("bhsr,bhrde->bhsde", kept, added)
        if state is not None:
            states = states + past.exp()[..., None, None] * state[:, :, None]
        return states[:, :, :-1], states[:, :, -1]
