"""Weights in and out: safetensors + config.json + card, from the Hub, the package or a folder."""

from __future__ import annotations

import hashlib
import importlib
import json
import tempfile
import zipfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmzoo.errors import CheckpointError, MissingExtra

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from mmzoo.language import MultimodalLM
    from mmzoo.registry import Entry

HUB, PACKAGE = "hf-hub:", "package:"
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "projector/*.bin"]
_OLDER_FILES = ["pytorch_model*.bin"]  # read as tensors only, never unpickled


def is_location(name: str) -> bool:
    """Whether a name says where weights are, rather than being a registered name."""
    return name.startswith((HUB, PACKAGE)) or Path(name).is_dir() or "/" in name or "\\" in name


def locate(place: str) -> Path:
    """The local folder of "hf-hub:org/name[@revision]" (downloaded into the Hub's cache), "package:..." or a path.

    Raises:
        CheckpointError: it is not there, or cannot be downloaded. Random weights are never put in its place.
    """
    if place.startswith(HUB):
        try:
            folder = _download(*place.removeprefix(HUB).split("@", 1))
        except Exception as error:  # the client raises classes of its own, of requests and of the standard library
            raise CheckpointError(
                f"Cannot download {place}: {type(error).__name__}: {error}\nWithout a connection, give a local folder."
            ) from error
    elif place.startswith(PACKAGE):
        folder = Path(str(resources.files("mmzoo") / "assets" / place.removeprefix(PACKAGE)))
    else:
        folder = Path(place)
    if not (folder / "config.json").is_file() and not any(folder.glob("*/adapter_config.json")):
        raise CheckpointError(f"No checkpoint at {place}: {folder} has no config.json.")
    return folder


def _download(repo: str, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=_FILES))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=_FILES + _OLDER_FILES))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises CheckpointError if it is no JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {folder / 'config.json'}: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} does not hold a configuration.")
    return config


def check_files(folder: Path, sha256: Mapping[str, str] | None = None) -> None:
    """Look at the weights' file, or at the shards and their index, before anything is loaded.

    They are model.safetensors, or else pytorch_model.bin, of which tensors are read and nothing else.

    Args:
        folder: the checkpoint.
        sha256: file name -> digest that must hold.

    Raises:
        CheckpointError: a file is missing, damaged, or not the known one.
    """
    for name in _shards(folder):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"The checkpoint {folder} lacks the file {name}.")
        known = (sha256 or {}).get(name)
        if known is not None:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != known:
                raise CheckpointError(f"{path} is damaged or another file: its sha256 is {found}, not {known}.")
        _shapes_in(path)


def read_tensors(folder: Path, sha256: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name there, mapped into memory rather than read.

    Raises:
        CheckpointError: as `check_files`.
    """
    check_files(folder, sha256)
    tensors: dict[str, torch.Tensor] = {}
    for name in _shards(folder):
        tensors.update(read_file(folder / name))
    return tensors


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint. Raises CheckpointError if a file is damaged."""
    return {name: shape for file in _shards(folder) for name, shape in _shapes_in(folder / file).items()}


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in _unpickled(path, "meta").items()}
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Download or copy it again.") from error


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, safetensors or torch's. Raises CheckpointError if it is damaged or holds code."""
    from safetensors.torch import load_file

    _shapes_in(path)
    return _unpickled(path, "cpu") if path.suffix == ".bin" else load_file(path)


def _unpickled(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save; code in it is refused, never run."""
    import torch

    try:
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 are not, and are read whole
        return dict(torch.load(path, map_location=device, mmap=mapped, weights_only=True))
    except Exception as error:  # torch raises classes of its own, of pickle and of the standard library
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors: {said} Download or copy it again."
        ) from error


def _shards(folder: Path) -> list[str]:
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder / f"{name}.index.json", Path(name).suffix)
        if (folder / name).is_file():
            return [name]
    return [names[0]]


def _indexed(index: Path, suffix: str) -> list[str]:
    try:
        described = json.loads(index.read_text())
        if "metadata" not in described:  # transformers needs it
            raise KeyError("metadata")
        names = sorted(set(described["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}.") from error
    for name in names:
        if Path(name).name != name or Path(name).suffix != suffix:
            raise CheckpointError(f"{index} names {name!r}, which is no file of this checkpoint.")
    return names


def load_from(
    place: str, entry: Entry | None = None, *, dtype: torch.dtype | None = None, **loading: Any
) -> MultimodalLM:
    """The model and processor of a checkpoint, mmzoo's own or one released by a family's authors.

    Args:
        place: as `locate` takes it.
        entry: the registered model that it is, if it is one.
        dtype: the checkpoint's own if None.
        **loading: what transformers' `from_pretrained` takes, such as device_map and quantization_config.

    Raises:
        CheckpointError: nothing in the zoo can read it, or it does not fit the model.
        MissingExtra: a device map or quantisation needs a package that is not installed.
    """
    from mmzoo.registry import families

    _check_packages(loading)
    folder = locate(place)
    known = families()
    for family in [entry.module] if entry else known.values():
        if hasattr(family, "is_in_parts") and family.is_in_parts(folder):
            return family.read_parts(folder, entry.name if entry else None, dtype=dtype, **loading)
    described = read_config(folder)
    check_files(folder, entry.sha256 if entry and place == entry.weights else None)
    module, tensors = known.get(described.get("model_type", "")), None
    if module is not None:
        config = module.MODEL.config_class.from_pretrained(folder)
        processor = module.PROCESSOR.from_pretrained(folder)
    else:
        module = _reader(place, described, entry)
        config, processor = module.read_release(folder, described)
        if hasattr(module, "read_weights"):
            tensors = module.read_weights(folder, described)
    model, report = module.MODEL.from_pretrained(
        folder if tensors is None else None,
        config=config,
        state_dict=tensors,
        dtype=dtype or "auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, all of them, instead of the first
        **loading,
    )
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise CheckpointError(
            f"The checkpoint {place} does not fit {module.MODEL.__name__}.",
            missing=report["missing_keys"],
            unexpected=report["unexpected_keys"],
            misshapen=[(name, tuple(there), tuple(here)) for name, there, here in report["mismatched_keys"]],
        )
    model.processor = processor
    return model


def _check_packages(loading: Mapping[str, Any]) -> None:
    """Raises MissingExtra where transformers would fail for want of a package, before anything is read."""
    wanted = {
        "accelerate": loading.get("device_map") is not None or loading.get("quantization_config") is not None,
        "bitsandbytes": type(loading.get("quantization_config")).__name__ == "BitsAndBytesConfig",
    }
    for package, needed in wanted.items():
        if needed:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise MissingExtra(package, "large", "Loading with a device map or quantised") from error


def _reader(place: str, described: Mapping[str, Any], entry: Entry | None) -> ModuleType:
    """The family that reads an authors' release."""
    from mmzoo.registry import families

    modules = [entry.module] if entry else list(families().values())
    readers = [module for module in modules if module.is_release(described)]
    if not readers:
        raise CheckpointError(
            f"{place} is no checkpoint that mmzoo can read: its config.json has model_type "
            f"{described.get('model_type')!r} and is not a known release either."
        )
    if len(readers) > 1:
        names = ", ".join(next(iter(module.CONFIGS)) for module in readers)
        raise CheckpointError(
            f"{place} does not say which model it is: its config.json fits {names}. "
            f"Load it by name, as in load({next(iter(readers[0].CONFIGS))!r}, weights={place!r})."
        )
    return readers[0]


def save(
    model: MultimodalLM,
    folder: str | Path,
    card: str | None = None,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write model.safetensors, config.json, the processor's files and README.md, each whole or not at all.

    Args:
        model: with its processor.
        folder: made if it does not exist; files of the same names are replaced, config.json last.
        card: text of README.md.
        state_dict: the weights, where the model itself holds only a part of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as name:
        model.save_pretrained(name, state_dict=state_dict)
        if model.processor is not None:
            model.processor.save_pretrained(name)
        if card is not None:
            (Path(name) / "README.md").write_text(card)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o644)
            path.replace(folder / path.name)
    return folder
