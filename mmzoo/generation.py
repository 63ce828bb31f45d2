"""Generators: diffusers models that make a clip block by block, and the rollout that makes it.

A family of generators holds, as every family, `MODEL` and `CONFIGS`; its entries say `library="diffusers"`. It also
gives `example_inputs(model, batch_size)`, what `forward` takes, and `example_options(model)`, options of a `rollout`
that needs no download.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.masks import Rule
from mmzoo.registry import without_kernel_advice

with without_kernel_advice():
    from diffusers import ConfigMixin, ModelMixin

BACKENDS = ("sdpa", "eager")


class Generator(ModelMixin, ConfigMixin):
    """Base of the generators. A family adds its layers, `forward`, and `rollout`.

    Attributes:
        rule: who may look at whom over frames.
        fps: frames a second of what it makes.
        connector_rule: None; generators have no connector with a mask.
        processor: None; a generator takes prompts and frames as they are.
    """

    rule: Rule
    fps: ClassVar[float] = 8.0
    connector_rule: ClassVar[Rule | None] = None
    processor: Any = None
    attention: str = "sdpa"
    name_or_path: str = ""

    @classmethod
    def build(cls, fields: dict[str, Any], dtype: torch.dtype) -> Generator:
        """A model with random weights from the fields of a configuration."""
        model = cls(**fields)
        return model if dtype == torch.float32 else model.to(dtype)

    @property
    def rule_name(self) -> str:
        """The rule's name in the literature."""
        return self.rule.name

    def set_attention(self, name: str) -> None:
        """Choose how attention runs: "sdpa", or "eager", softmax written out.

        Raises:
            UnsupportedMask: another backend, which these models do not run.
        """
        if name not in BACKENDS:
            raise UnsupportedMask(name, self.rule_name, "generators run on sdpa and eager", BACKENDS)
        self.attention = name

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **options: Any) -> None:
        """As `mmzoo.hub.save`: with digests, and each file whole or not at all."""
        from mmzoo import hub

        if is_main_process:
            hub.save(self, save_directory, **options)

    def write_files(self, folder: str | Path, **options: Any) -> None:
        """diffusers' own `save_pretrained`."""
        super().save_pretrained(folder, **options)

    def rollout(self, num_frames: int, *, seed: int = 0, **options: Any) -> Rollout:
        """Begin a clip. A family says what else it takes: a prompt, given frames, steps ...

        Args:
            num_frames: frames in all, given ones included.
            seed: of all noise.
        """
        raise NotImplementedError


def check_switches(switches: Sequence[int], num_prompts: int, num_frames: int) -> None:
    """Raise InputError unless each prompt after the first begins within the clip, and after the one before it."""
    within = all(0 < before < after for before, after in pairwise([*switches, num_frames]))
    if len(switches) != max(0, num_prompts - 1) or not within:
        raise InputError(
            f"{num_prompts} prompts of a clip of {num_frames} frames need {max(0, num_prompts - 1)} frames at which "
            f"the next one begins, ascending and within the clip, not {list(switches)}."
        )


class Rollout:
    """A clip in the making: iterate over it to get its blocks, uint8 [F, H, W, 3], as they come.

    A family overrides `_block`, `_state` and `_load`. A `state_dict` taken after any block, loaded into a fresh rollout
    with the same arguments, goes on exactly as the unbroken one.

    Attributes:
        num_frames: frames in all.
        done: frames that were given out.
        random: the source of all noise.
    """

    def __init__(self, model: Generator, num_frames: int, seed: int):
        if num_frames < 1:
            raise InputError(f"A clip has at least one frame, not {num_frames}.")
        self.model, self.num_frames, self.done = model, num_frames, 0
        if not 0 <= seed < 2**63:
            raise InputError(f"A seed is between 0 and 2**63 - 1, not {seed}.")
        self.random = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        if self.done >= self.num_frames:
            raise StopIteration
        frames = self._block()[: self.num_frames - self.done]
        self.done += len(frames)
        return frames

    def switch(self, prompt: str) -> None:
        """Go on under another prompt from the next block on. Raises InputError where a family has no prompts."""
        raise InputError(f"{type(self.model).__name__} has no prompt that could change.")

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings, by name; what `torch.load(weights_only=True)` reads."""
        return {"done": self.done, "random": self.random.get_state(), **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises InputError if it belongs to another rollout."""
        random = state.get("random")
        if not isinstance(random, Tensor) or not 0 <= state.get("done", -1) <= self.num_frames:
            raise InputError("This state is not one of this rollout.")
        self._load(state)
        self.done = int(state["done"])
        self.random.set_state(random.clone())

    def _block(self) -> Tensor:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError
