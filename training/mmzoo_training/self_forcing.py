"""Self-forcing: a causal generator learns from what it makes itself, by distribution matching with two score models.

Source: "LongLive: Real-time Interactive Long Video Generation", arXiv 2509.22622, and "Self Forcing: Bridging the
Train-Test Gap in Autoregressive Video Diffusion", arXiv 2506.08009; formulas of the authors' code.

Shape legend: B clips, X channels of the latents, F frames, H, W height and width of the latents, L text tokens, E their
width.
"""

from __future__ import annotations

import torch
from diffusers import FlowMatchLCMScheduler
from torch import Tensor


class FlowSchedule:
    """Flow matching with 1000 timesteps: x_t = (1 - sigma) x + sigma noise; the flow is noise - x.

    Attributes:
        sigmas: float32 [1000], from 1 down; u = 1, 0.999 ... 0.001 shifted: shift u / (1 + (shift - 1) u).
        timesteps: float32 [1000], 1000 sigmas.
    """

    def __init__(self, shift: float = 5.0):
        scheduler = FlowMatchLCMScheduler(shift=shift)
        self.sigmas, self.timesteps = scheduler.sigmas, scheduler.timesteps

    def sigma(self, timestep: Tensor, like: Tensor) -> Tensor:
        """Of the nearest timestep of the schedule; for timestep [B] or [B, F], in a shape that fits `like`."""
        nearest = (self.timesteps.to(timestep.device) - timestep[..., None]).abs().argmin(-1)
        found = self.sigmas.to(timestep.device)[nearest].to(like.device)
        found = found[:, None, :] if found.dim() == 2 else found  # beside the channels
        return found.view(*found.shape, *[1] * (like.dim() - found.dim()))

    def add_noise(self, x: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t [B, X, F, H, W]."""
        sigma = self.sigma(timestep, x)
        return ((1 - sigma) * x + sigma * noise).type_as(x)

    def clean(self, x_t: Tensor, flow: Tensor, timestep: Tensor) -> Tensor:
        """x0 = x_t - sigma flow."""
        return (x_t.double() - self.sigma(timestep, x_t).double() * flow.double()).type_as(flow)

    def flow(self, x_t: Tensor, x0: Tensor, timestep: Tensor) -> Tensor:
        """The inverse of `clean`."""
        return ((x_t.double() - x0.double()) / self.sigma(timestep, x_t).double()).type_as(x0)

    def training_weights(self) -> Tensor:
        """float32 [1000], mean 1: a bell around timestep 500. The authors' schedule has them, their losses do not."""
        bell = torch.exp(-2 * ((self.timesteps - 500) / 1000) ** 2)
        bell = bell - bell.min()
        return bell / bell.mean()
