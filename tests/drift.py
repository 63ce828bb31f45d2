"""A family of generators for tests: each block is the last one, brighter or darker by chance."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mmzoo import masks
from mmzoo.generation import Generator, Rollout


class Drift(Generator):
    @register_to_config
    def __init__(self, size: int = 16):
        super().__init__()
        self.rule = masks.rule("causal-temporal")
        self.weight = torch.nn.Parameter(torch.ones(size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.weight

    def rollout(self, num_frames: int, *, seed: int = 0, start: int = 100) -> Rollout:
        return DriftRollout(self, num_frames, seed, start)


class DriftRollout(Rollout):
    def __init__(self, model: Drift, num_frames: int, seed: int, start: int):
        super().__init__(model, num_frames, seed)
        self.level = torch.tensor(float(start))

    def _block(self) -> Tensor:
        self.level = self.level + torch.randn((), generator=self.random) * 10
        return torch.full((3, 16, 16, 3), float(self.level)).clamp(0, 255).to(torch.uint8)

    def _state(self) -> dict[str, Any]:
        return {"level": self.level}

    def _load(self, state: dict[str, Any]) -> None:
        self.level = state["level"]


MODEL = Drift
CONFIGS = {"drift-tiny": {"size": 16}}


def example_inputs(model: Drift, batch_size: int) -> dict[str, Any]:
    return {"hidden_states": torch.randn(batch_size, model.config.size)}


def example_options(model: Drift) -> dict[str, Any]:
    return {"start": 90}
