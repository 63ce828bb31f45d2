"""Keys and values of the frames that a generator still sees, with the layout of their slots.

Frames of a block get slots when a pass over it begins: their own if it is another pass over the same frames, else free
ones, else those of the oldest frames, but never of the sink. Nothing is moved: softmax does not mind the order of keys.
What a block sees is the rule on (layout of the block, layout of the slots), and nothing else.

    cache = RollingKVCache(num_layers=30, window=12, sink=3, tokens_per_frame=1560)
    cache.begin(range(6, 9))                          # a pass over frames 6, 7, 8
    keys, values = cache.update(layer, key, value)    # in each layer: writes the block's, returns all
    mask = cache.mask(rule)                           # None where the block sees every slot

Shape legend: B batch, F frames of a block, S slots that are taken, N tokens a frame, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmzoo.attention.compiler import allowed
from mmzoo.errors import InputError
from mmzoo.layout import PADDING, Modality, Role, TokenLayout, lay_out, video
from mmzoo.masks import Rule


def frames_layout(frames: Sequence[int], role: Role = Role.PROMPT) -> TokenLayout:
    """The layout [1, F, K] of frames of one clip, a token each, by their numbers."""
    layout = lay_out(video(len(frames), 1, 1))
    numbers = torch.tensor([list(frames)], dtype=torch.int32)
    for field, value in (("index", numbers), ("frame", numbers)):
        layout = layout.field(field, value)
    layout = layout.field("modality", torch.full_like(numbers, int(Modality.LATENT)))
    return layout.field("role", torch.full_like(numbers, int(role)))


class RollingKVCache:
    """A rolling cache of every layer of one model. Buffers are made at the first update.

    Args:
        num_layers: attention layers that write into it.
        window: frames it holds at most, those of the block in work included.
        sink: of the first frames, how many stay for good.
        tokens_per_frame: N.

    Raises:
        InputError: the window is no larger than the sink.
    """

    def __init__(self, num_layers: int, window: int, *, sink: int = 0, tokens_per_frame: int = 1):
        if window <= sink:
            raise InputError(f"A window of {window} frames must be larger than its sink of {sink}.")
        self.window, self.sink, self.tokens_per_frame = window, sink, tokens_per_frame
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.reset()

    def reset(self, first_frame: int = 0) -> None:
        """Forget everything. The sink is then taken by the frames from `first_frame` on."""
        self.first_frame = first_frame
        self.frames: list[int] = []
        self.block: list[int] = []
        self.oldest = first_frame

    def begin(self, frames: Sequence[int], *, keep_sink: bool = False, oldest: int | None = None) -> None:
        """Begin a pass over a block of frames.

        Args:
            frames: their numbers, ascending. Where not all find a slot, because the sink and the block do not fit into
                the window together, the oldest are left out: they see, but are not seen.
            keep_sink: leave what the sink holds already as it is, and let it be seen in place of what the block has.
            oldest: the first frame that is still seen, where earlier ones may have slots; the first of all if None.
        """
        self.oldest = self.first_frame if oldest is None else oldest
        kept = set(self.frames[: self.sink]) if keep_sink else set()
        self.block, slots = list(frames), {}
        for frame in reversed(self.block):
            if frame in self.frames:
                slots[frame] = self.frames.index(frame)
        for frame in self.block[-self.window :] if len(self.frames) < self.window else ():
            if frame not in slots and len(self.frames) < self.window:
                slots[frame] = len(self.frames)
                self.frames.append(frame)
        for frame in reversed(self.block):
            if frame not in slots and (slot := self._oldest(before=frame)) is not None:
                slots[frame] = slot
                self.frames[slot] = frame
        self._slots = [slots.get(frame) if frame not in kept else None for frame in self.block]

    def _oldest(self, before: int) -> int | None:
        """The slot of the oldest frame that may go: not of the sink, not of the block, and older than `before`."""
        fair = [i for i in range(self.sink, len(self.frames)) if self.frames[i] not in self.block]
        oldest = min(fair, key=lambda i: self.frames[i], default=None)
        return oldest if oldest is not None and self.frames[oldest] < before else None

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the block's keys and values [B, F N, H, D]; returns those of every slot, [B, S N, H, D].

        What is returned are views of the buffers: the next update changes them.

        Raises:
            InputError: another batch size, type or device than that of the frames that are held.
        """
        return self._write(self.keys, layer, key), self._write(self.values, layer, value)

    def _write(self, buffers: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        count = self.tokens_per_frame
        buffer = buffers[layer]
        kind = (new.shape[0], *new.shape[2:], new.dtype, new.device)
        if buffer is not None and (buffer.shape[0], *buffer.shape[2:], buffer.dtype, buffer.device) != kind:
            if set(self.frames) - set(self.block):
                raise InputError(
                    f"The cache holds frames of a batch of {buffer.shape[0]} in {buffer.dtype} on {buffer.device}, and "
                    f"these are {new.shape[0]} in {new.dtype} on {new.device}. Use another cache, or reset this one."
                )
            buffer = None
        if buffer is None:
            buffer = buffers[layer] = new.new_zeros(new.shape[0], self.window * count, *new.shape[2:])
        for start, stop, slot in self._runs():
            place = slice(slot * count, (slot + stop - start) * count)
            buffer[:, place] = new[:, start * count : stop * count]
        return buffer[:, : len(self.frames) * count]

    def past_first(self) -> list[int]:
        """All slots: those of other frames than the block's, and then the block's in its order."""
        own = [slot for slot in self._slots if slot is not None]
        return [slot for slot in range(len(self.frames)) if slot not in own] + own

    def past(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Copies of the keys and values [B, (S - F) N, H, D] of other frames than the block's; None without any.

        For a pass that must not write, since it has gradients: its own keys go behind these.

        Raises:
            InputError: a frame of the block has no slot, so that what it sees is not these and its own.
        """
        if None in self._slots:
            raise InputError("A pass that does not write needs a slot for each of its frames.")
        slots = self.past_first()[: len(self.frames) - len(self.block)]
        key, value = self.keys[layer], self.values[layer]
        if not slots or key is None or value is None:
            return None
        key, value = (x.unflatten(1, (self.window, -1))[:, slots].flatten(1, 2) for x in (key, value))
        return key, value

    def _runs(self) -> list[tuple[int, int, int]]:
        """(first, end, slot) of the block's frames that stand side by side in the buffer."""
        runs: list[tuple[int, int, int]] = []
        for i, slot in enumerate(self._slots):
            if slot is None:
                continue
            if runs and runs[-1][1] == i and runs[-1][2] + i - runs[-1][0] == slot:
                runs[-1] = (runs[-1][0], i + 1, runs[-1][2])
            else:
                runs.append((i, i + 1, slot))
        return runs

    @property
    def layout(self) -> TokenLayout:
        """The layout [1, S, K] of the slots, a token each, by numbers from `first_frame` on; the unseen are padding."""
        layout = frames_layout([frame - self.first_frame for frame in self.frames])
        unseen = torch.tensor([[frame < self.oldest for frame in self.frames]], dtype=torch.bool)
        return layout.field("sample", layout.sample.masked_fill(unseen, PADDING))

    @property
    def block_layout(self) -> TokenLayout:
        """The layout [1, F, K] of the block's frames, by the same numbers."""
        return frames_layout([frame - self.first_frame for frame in self.block])

    def mask(self, rule: Rule) -> Tensor | None:
        """bool [F, S], True where a frame of the block sees a slot; None where all do."""
        opened = allowed(rule, self.block_layout, self.layout)[0]
        return None if bool(opened.all()) else opened

    def ranks(self, opened: Tensor | None = None) -> tuple[list[int], list[int]]:
        """The place of each slot, and of each frame of the block, among the visible frames by time, from 0.

        For positions that start anew in every window; a frame that is not visible has the place of the next that is.

        Args:
            opened: bool [F, S]; a slot is visible if any frame of the block sees it. All are if None.
        """
        seen = [True] * len(self.frames) if opened is None else opened.any(0).tolist()
        visible = [frame for frame, one in zip(self.frames, seen, strict=True) if one]
        slots, block = ([sum(other < frame for other in visible) for frame in of] for of in (self.frames, self.block))
        return slots, block

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that it holds, as `torch.load(weights_only=True)` reads it."""
        buffers = {"keys": self.keys, "values": self.values}
        copies = {name: [None if x is None else x.clone() for x in parts] for name, parts in buffers.items()}
        return {"frames": list(self.frames), "first_frame": self.first_frame, "sizes": self._sizes, **copies}

    @property
    def _sizes(self) -> list[int]:
        return [len(self.keys), self.window, self.sink, self.tokens_per_frame]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what another cache of the same sizes held. Raises InputError if it had others."""
        if state.get("sizes") != self._sizes:
            raise InputError(
                f"This state is of a cache with layers, window, sink and frame tokens {state.get('sizes')}, and those "
                f"of this one are {self._sizes}."
            )
        self.reset(int(state["first_frame"]))
        self.frames = list(state["frames"])
        self.keys, self.values = (
            [None if x is None else x.clone() for x in state[name]] for name in ("keys", "values")
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(one.numel() * one.element_size() for one in (*self.keys, *self.values) if one is not None)
