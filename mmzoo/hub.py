"""Weights in and out: safetensors + config.json + card, from the Hub, the package or a folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmzoo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from mmzoo.language import MultimodalLM
    from mmzoo.registry import Entry

HUB, PACKAGE = "hf-hub:", "package:"
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "projector/*.bin"]


def is_location(name: str) -> bool:
    """Whether a name says where weights are, rather than being a registered name."""
    return name.startswith((HUB, PACKAGE)) or Path(name).is_dir() or "/" in name or "\\" in name


def locate(place: str) -> Path:
    """The local folder of "hf-hub:org/name[@revision]" (downloaded into the Hub's cache), "package:..." or a path.

    Raises:
        CheckpointError: it is not there, or cannot be downloaded. Random weights are never put in its place.
    """
    if place.startswith(HUB):
        from huggingface_hub import snapshot_download

        repo, _, revision = place.removeprefix(HUB).partition("@")
        try:
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=_FILES))
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
    """Look at model.safetensors, or at the shards and their index, before anything is loaded.

    Args:
        folder: the checkpoint.
        sha256: file name -> digest that must hold.

    Raises:
        CheckpointError: a file is missing, damaged, or not the known one.
    """
    from safetensors import SafetensorError, safe_open

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
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. Download or copy it again.") from error


def _shards(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        described = json.loads(index.read_text())
        if "metadata" not in described:  # transformers needs it
            raise KeyError("metadata")
        names = sorted(set(described["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}.") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
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
    """
    from mmzoo.registry import families

    folder = locate(place)
    known = families()
    for family in [entry.module] if entry else known.values():
        if hasattr(family, "is_in_parts") and family.is_in_parts(folder):
            return family.read_parts(folder, entry.name if entry else None, dtype=dtype, **loading)
    described = read_config(folder)
    check_files(folder, entry.sha256 if entry else None)
    module = known.get(described.get("model_type", ""))
    if module is not None:
        config = module.MODEL.config_class.from_pretrained(folder)
        processor = module.PROCESSOR.from_pretrained(folder)
    else:
        module = entry.module if entry else next((m for m in known.values() if m.is_release(described)), None)
        if module is None or not module.is_release(described):
            raise CheckpointError(
                f"{place} is no checkpoint that mmzoo can read: its config.json has model_type "
                f"{described.get('model_type')!r} and is not a known release either."
            )
        config, processor = module.read_release(folder, described)
    model, report = module.MODEL.from_pretrained(
        folder,
        config=config,
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


def save(model: MultimodalLM, folder: str | Path, card: str | None = None) -> Path:
    """Write model.safetensors, config.json, the processor's files and README.md, each whole or not at all.

    Args:
        model: with its processor.
        folder: made if it does not exist; files of the same names are replaced, config.json last.
        card: text of README.md.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as name:
        model.save_pretrained(name)
        if model.processor is not None:
            model.processor.save_pretrained(name)
        if card is not None:
            (Path(name) / "README.md").write_text(card)
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == "config.json"):
            path.chmod(0o644)
            path.replace(folder / path.name)
    return folder
