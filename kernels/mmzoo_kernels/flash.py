"""Flash attention under compact masks: O(L) integers and lists of tiles in place of an L x L mask.

Any ratio of query to key/value heads without repeating, cross-attention, one softmax or several over the same keys
(multi-modal causal attention is two), log-sum-exps out, 0 for a query without an open key. The backward pass has no
atomics, so it is deterministic. `naive_masked_attention` is the reference.

Shape legend: B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, R branches, T terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmzoo_kernels.masks import CompactMask, tile_lists
from mmzoo_kernels.softmax import softmax_attention

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST_HEAD_DIM = 256


@dataclass(frozen=True)
class FlashMask:
    """What the kernels are told of a mask; made once a batch, for all layers and heads.

    Attributes:
        arrays: query and key samples, lower and upper bounds, values, each padded to whole tiles with the terms before
            the tokens, [R B, (T,) L]; then counts and numbers of partial and of full tiles, by query and by key.
        size: side of a tile.
        shape: R, B, Q, K.
    """

    arrays: tuple[Tensor, ...]
    size: int
    shape: tuple[int, int, int, int]

    def opened(self) -> Tensor:
        """bool [R, B, Q, K]: the pairs that the kernels open, by the lists of tiles and inside the partial ones."""
        samples, (lower, upper, value) = self.arrays[:2], (one.mT for one in self.arrays[2:5])
        inside = CompactMask(*samples, lower, upper, value).dense()
        partial, full = (_of_tiles(*self.arrays[i : i + 2], self.size) for i in (5, 7))
        branches, batch, queries, keys = self.shape
        return ((inside & partial) | full)[:, :queries, :keys].unflatten(0, (branches, batch))

    def to(self, device: torch.device | str) -> FlashMask:
        return FlashMask(tuple(one.to(device) for one in self.arrays), self.size, self.shape)


def _of_tiles(count: Tensor, index: Tensor, size: int) -> Tensor:
    """bool [R B, Q, K] of whole tiles, from a list by query."""
    listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    tiles = torch.zeros_like(listed).scatter(-1, index.long(), listed)
    return tiles.repeat_interleave(size, 1).repeat_interleave(size, 2)


def flash_mask(*branches: CompactMask, size: int = 128) -> FlashMask:
    """The masks of one softmax or several, for the kernels.

    Args:
        branches: one mask a softmax; the outputs are added.
        size: side of a tile; the kernels' blocks divide it.

    Raises:
        ValueError: the branches are of different shapes.
    """
    shapes = {(*one.query_sample.shape, one.key_sample.shape[1]) for one in branches}
    if len(shapes) != 1:
        raise ValueError(f"One or more branches of one shape (batch, queries, keys) are needed, got {sorted(shapes)}.")
    terms = max(one.value.shape[-1] for one in branches)
    padded = [one.padded(size).with_terms(terms) for one in branches]
    samples = [torch.cat([getattr(one, name) for one in padded]) for name in ("query_sample", "key_sample")]
    bounds = [torch.cat([getattr(one, name) for one in padded]).mT for name in ("lower", "upper", "value")]
    tiles = [one.tiles(size) for one in branches]
    partial = torch.cat([one.visited & ~one.full for one in tiles])
    full = torch.cat([one.full for one in tiles])
    lists = [part for one in (partial, full, partial.mT, full.mT) for part in tile_lists(one)]
    arrays = tuple(one.contiguous() for one in (*samples, *bounds, *lists))
    return FlashMask(arrays, size, (len(branches), *shapes.pop()))


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: FlashMask, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention under a mask: output [B, H, Q, D], summed over the branches, and log-sum-exps [R, B, H, Q] in float32.

    Args:
        query: [B, H, Q, D]; float16, bfloat16 or float32.
        key, value: [B, G, K, D]; H is a multiple of G.
        mask: of `flash_mask`.
        scale: D ** -0.5 if None.

    Raises:
        ValueError: shapes, dtypes or head dims that do not fit.
    """
    _check(query, key, value, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    outputs, lse = _forward_op(query, key, value, list(mask.arrays), mask.size, mask.shape[0], scale)
    return outputs[0] if len(outputs) == 1 else outputs.sum(0), lse


def naive_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, branches: Sequence[CompactMask], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same with the masks as matrices."""
    parts = [softmax_attention(query, key, value, one.dense()[:, None], scale) for one in branches]
    return torch.stack([out for out, _ in parts]).sum(0), torch.stack([lse for _, lse in parts])


def blocks(head_dim: int, dtype: torch.dtype, size: int, shared_memory: int) -> dict[str, dict[str, int]]:
    """Blocks (M queries, N keys), warps and stages of each kernel, by what fits into a multiprocessor.

    Args:
        shared_memory: bytes of it that one program may take.
    """
    wide, large = max(16, 1 << (head_dim - 1).bit_length()), shared_memory >= 160 * 1024
    bytes_a_row = wide * dtype.itemsize
    if bytes_a_row <= 128:
        found = {"forward": (128, 64, 4, 3), "backward": (64, 64, 4, 3 if large else 2)}
    elif bytes_a_row <= 256 and (large or dtype.itemsize < 4):
        found = {"forward": (128, 64, 8, 3 if large else 2), "backward": (64, 64, 8, 2 if large else 1)}
    elif bytes_a_row <= 512:
        found = {"forward": (64, 32, 4, 2 if large else 1), "backward": (32, 32, 4, 2 if large else 1)}
    else:
        found = {"forward": (32, 32, 4, 1), "backward": (32 if large else 16, 16, 4, 1)}
    return {
        kernel: {"M": min(m, size), "N": min(n, size), "num_warps": warps, "num_stages": stages}
        for kernel, (m, n, warps, stages) in found.items()
    }


def _check(query: Tensor, key: Tensor, value: Tensor, mask: FlashMask) -> None:
    (b, h, q, d), (_, g, k, _) = query.shape, key.shape
    if key.shape != value.shape or key.shape[0] != b or key.shape[-1] != d or h % g:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit."
        )
    if mask.shape[1:] != (b, q, k):
        raise ValueError(f"The mask is of {mask.shape[1:]} (batch, queries, keys), the tensors are of {(b, q, k)}.")
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        raise ValueError(f"One dtype of float16, bfloat16 and float32 is needed, got {query.dtype} and {key.dtype}.")
    if d > LARGEST_HEAD_DIM:
        raise ValueError(f"Head dims up to {LARGEST_HEAD_DIM} are taken, not {d}.")


@torch.library.custom_op("mmzoo::masked_attention", mutates_args=())
def _forward_op(
    query: Tensor, key: Tensor, value: Tensor, arrays: list[Tensor], size: int, branches: int, scale: float
) -> tuple[Tensor, Tensor]:
    outputs = query.new_empty(branches, *query.shape)
    lse = torch.empty(branches, *query.shape[:3], dtype=torch.float32, device=query.device)
    launch = _Launch(query, key, value, arrays, size, branches, scale)
    output_strides = outputs.flatten(0, 1).stride()[:3]
    launch(
        "forward",
        (query, key, value, outputs, lse, *arrays[:9], *launch.strides, *output_strides),
        rows=query,
        z=branches,
    )
    return outputs, lse


@_forward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, arrays: list[Tensor], size: int, branches: int, scale: float) -> Any:
    return query.new_empty(branches, *query.shape), query.new_empty(branches, *query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mmzoo::masked_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    arrays: list[Tensor],
    size: int,
    branches: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = {"memory_format": torch.contiguous_format}
    grads = [torch.empty_like(x, **contiguous) for x in (query, key, value)]
    launch = _Launch(query, key, value, arrays, size, branches, scale)
    strides, given = (*launch.strides, *grad.stride()[:3]), (query, key, value, grad, lse, delta)
    launch("backward_query", (*given, grads[0], *arrays[:9], *strides), rows=query)
    launch("backward_key_value", (*given, *grads[1:], *arrays[:5], *arrays[9:], *strides), rows=key)
    return grads[0], grads[1], grads[2]


@_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, arrays, ctx.size, ctx.branches, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, *arrays)


def _backward(ctx: Any, grad_outputs: Tensor, grad_lse: Tensor) -> Any:
    query, key, value, outputs, lse, *arrays = ctx.saved_tensors
    delta = (outputs.float() * grad_outputs.float()).sum(-1) - grad_lse
    # All branches are given one gradient: `masked_attention` adds them up.
    grad = grad_outputs[0]
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = _backward_op(grad, query, key, value, lse, delta.contiguous(), arrays, ctx.size, ctx.branches, ctx.scale)
    return *grads, [None] * len(arrays), None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup)


class _Launch:
    """What the launches of one call have in common."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, arrays: list[Tensor], size: int, branches: int, scale: float
    ):
        self.query, self.key, self.arrays, self.size, self.branches, self.scale = (
            query,
            key,
            arrays,
            size,
            branches,
            scale,
        )
        self.strides = tuple(stride for x in (query, key, value) for stride in x.stride()[:3])

    def __call__(self, name: str, given: tuple[Any, ...], rows: Tensor, z: int = 1) -> None:
        """Run a kernel with a program a block of `rows` and head, for each of `z` branches."""
        import triton

        from mmzoo_kernels import flash_kernels

        (b, h, q, d), (_, g, k, _) = self.query.shape, self.key.shape
        padded_q, padded_k = self.arrays[0].shape[1], self.arrays[1].shape[1]
        options = blocks(d, self.query.dtype, self.size, _shared_memory(self.query.device))[name.split("_")[0]]
        sizes = {
            "TERMS": self.arrays[2].shape[1],
            "D": d,
            "WIDE": max(16, triton.next_power_of_2(d)),
            "SIZE": self.size,
        }
        if name != "forward":
            sizes["BRANCHES"] = self.branches
        side = options["M"] if rows is self.query else options["N"]
        grid = (triton.cdiv(rows.shape[2], side), z * rows.shape[0] * rows.shape[1])
        precision = "tf32x3" if self.query.dtype is torch.float32 else "tf32"
        getattr(flash_kernels, name)[grid](
            *given, b, h, h // g, q, k, padded_q, padded_k, self.scale, **sizes, **options, PRECISION=precision
        )


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
