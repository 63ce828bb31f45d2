"""Digests of tensors: what was saved is what is loaded, and which weights gave an answer.

A checkpoint that `mmzoo.hub.save` wrote is sealed: the metadata of each of its safetensors files hold
    sha256.tensor.<name>    of every tensor in the file
    sha256.file.<name>      of config.json, the index and the processor's files
    sha256.weights          of all tensors of the checkpoint, so that a shard of another one is known
transformers and safetensors read such files as any others; what either of them writes anew is not sealed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmzoo.errors import CheckpointError
from mmzoo.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "sha256."
TENSOR, FILE, WEIGHTS = f"{SEAL}tensor.", f"{SEAL}file.", f"{SEAL}weights"
UNSEALED = {"README.md"}  # prose is there to be edited


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and little-endian bytes, wherever it lies."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a model's tensors with their names, in the order of the names."""
    return _combined({name: tensor_sha256(tensor) for name, tensor in tensors.items()})


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write the digests of a folder's tensors and small files into the metadata of its safetensors files.

    Each safetensors file is read once and written once more, in pieces of a megabyte.
    """
    weights = sorted(folder.glob("*.safetensors"))
    tensors = {path: _tensor_digests(path) for path in weights}
    whole = _combined({name: digest for found in tensors.values() for name, digest in found.items()})
    others = (path for path in folder.iterdir() if path.is_file() and path not in tensors and path.name not in UNSEALED)
    files = {f"{FILE}{path.name}": file_sha256(path) for path in sorted(others)}
    for path, digests in tensors.items():
        own = {f"{TENSOR}{name}": digest for name, digest in digests.items()}
        _add_metadata(path, {WEIGHTS: whole, **files, **own})


def verify(folder: Path, names: Iterable[str]) -> None:
    """Check the digests that a checkpoint's safetensors files hold; files that hold none are left as they are.

    Tensors are mapped and hashed one by one, at the speed of sha256: about a second for each gigabyte.

    Args:
        folder: the checkpoint.
        names: its safetensors files.

    Raises:
        CheckpointError: a tensor or file is not what was saved, or the files are not of one checkpoint.
    """
    paths = [folder / name for name in names]
    seals = {path: stated for path in paths if (stated := seal_of(path))}
    if not seals:
        return
    tensors: dict[str, str] = {}
    for path in paths:
        if path not in seals:
            raise _damaged(path, "it lacks the digests that the other files of this checkpoint hold")
        tensors.update(verify_tensors(path))
    if {stated.get(WEIGHTS) for stated in seals.values()} != {_combined(tensors)}:
        raise _damaged(folder, "its weights' files are not of one checkpoint, or one is missing")
    files = {item for stated in seals.values() for item in stated.items() if item[0].startswith(FILE)}
    for key, digest in sorted(files):
        name = key.removeprefix(FILE)
        if Path(name).name != name or not (folder / name).is_file():
            raise _damaged(folder, f"it was saved with a file {name!r}, which is missing")
        if file_sha256(folder / name) != digest:
            raise _damaged(folder / name, "it is not the file that was saved with these weights")


def verify_tensors(path: Path) -> dict[str, str]:
    """Digests of the tensors of one safetensors file, checked against those that it holds; empty if it holds none.

    Raises:
        CheckpointError: a tensor is not what was saved.
    """
    held = seal_of(path)
    if not held:
        return {}
    found = _tensor_digests(path)
    stated = {key.removeprefix(TENSOR): digest for key, digest in held.items() if key.startswith(TENSOR)}
    wrong = [name for name in found.keys() | stated.keys() if found.get(name) != stated.get(name)]
    if wrong:
        raise _damaged(path, f"these tensors are not what was saved: {', '.join(sorted(wrong)[:5])}")
    return found


def seal_of(path: Path) -> dict[str, str]:
    """The digests in the metadata of a safetensors file; empty where nobody wrote any."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    held = {key: text for key, text in metadata.items() if key.startswith(SEAL)}
    if held and metadata.get("format") != "pt":
        raise _damaged(path, f"its format is {metadata.get('format')!r}, not 'pt'")
    return held


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or was changed since it was saved: {what}. Download or copy it again; if the change is "
        "yours, load with verify=False and save anew."
    )


def _combined(digests: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(digests):
        digest.update(f"{name} {digests[name]}\n".encode())
    return digest.hexdigest()


def _tensor_digests(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: tensor_sha256(file.get_tensor(name)) for name in file.keys()}


def _add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """The same file with more metadata: its header grows, its tensors are copied as they are."""
    with path.open("rb") as old, replacing(path) as temporary, temporary.open("wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header = json.loads(old.read(length))
        header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
        new.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(old, new, 1 << 20)
