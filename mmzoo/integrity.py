"""Digests of tensors: what was saved is what is loaded, and which weights gave an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and little-endian bytes, wherever it lies."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a model's tensors with their names, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensor_sha256(tensors[name])}\n".encode())
    return digest.hexdigest()
