"""Weights in and out: safetensors + config.json + card, from the Hub, the package or a folder."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmzoo import integrity
from mmzoo.errors import CheckpointError, HubError, InputError, MissingExtra, MmzooError

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from mmzoo.language import MultimodalLM
    from mmzoo.registry import Entry

HUB, PACKAGE = "hf-hub:", "package:"
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "projector/*.bin", "models/*.pt"]
_OLDER_FILES = ["pytorch_model*.bin"]  # read as tensors only, never unpickled
_WEIGHTS = [
    f"{stem}{rest}"
    for stem in ("model", "diffusion_pytorch_model")
    for rest in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")
]
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHARD = "5GB"


def is_location(name: str) -> bool:
    """Whether a name says where weights are, rather than being a registered name."""
    return name.startswith((HUB, PACKAGE)) or Path(name).is_dir() or "/" in name or "\\" in name


def locate(place: str, *, token: str | None = None, endpoint: str | None = None) -> Path:
    """The local folder of "hf-hub:org/name[@revision]" (downloaded into the Hub's cache), "package:..." or a path.

    Args:
        place: where it is.
        token: for a private or gated repository; what `hf auth login` stored if None.
        endpoint: the Hub's address; huggingface_hub's own if None.

    Raises:
        CheckpointError: it is not there, cannot be downloaded, or links to files elsewhere. Random weights are never
            put in its place.
    """
    if place.startswith(HUB):
        try:
            folder = _download(*place.removeprefix(HUB).split("@", 1), token=token, endpoint=endpoint)
        except Exception as error:  # the client raises classes of its own, of httpx and of the standard library
            raise CheckpointError(
                f"Cannot download {place}: {type(error).__name__}: {error}\n{access_hint(error)}"
            ) from error
    elif place.startswith(PACKAGE):
        folder = Path(str(resources.files("mmzoo") / "assets" / place.removeprefix(PACKAGE)))
    else:
        folder = Path(place)
    parts = (*folder.glob(f"*/{ADAPTER}"), *folder.glob("*.pt"), *folder.glob("models/*.pt"))
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER)) and not parts:
        raise CheckpointError(f"No checkpoint at {place}: {folder} has no config.json.")
    _check_links(folder)
    return folder


def _download(repo: str, revision: str | None = None, *, token: str | None = None, endpoint: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision or None, "token": token, "endpoint": endpoint}
    folder = Path(snapshot_download(repo, allow_patterns=_FILES, **options))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(repo, allow_patterns=_FILES + _OLDER_FILES, **options))
    return folder


def access_hint(error: Exception) -> str:
    """What to do about an error of huggingface_hub."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "The repository is gated: ask for access on its page, then log in with `hf auth login` or give a token."
    if isinstance(error, RepositoryNotFoundError):
        return "It does not exist, or it is private: log in with `hf auth login`, or give a token that may see it."
    if isinstance(error, RevisionNotFoundError):
        return "The repository has no such branch, tag or commit."
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return "The token does not allow this: log in with `hf auth login`, or give another one."
    return "Try again: what was transferred is kept. Without a connection, give a local folder."


def _check_links(folder: Path) -> None:
    """Raises CheckpointError for a file that is a link out of the folder; the Hub's cache links to its own blobs."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # <cache>/models--org--name/snapshots/<commit>, and blobs shared by all
        allowed += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        read = any(fnmatch(path.name, pattern) for pattern in (*_FILES, "*.bin"))
        there = Path(os.path.realpath(path))  # which resolves a circle of links as far as it goes
        if read and not any(there.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{path} is a link to {there}, which lies outside the checkpoint. Copy the file into it."
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises CheckpointError if it is no JSON object."""
    return _read_object(folder / "config.json")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}.") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path} does not hold a configuration.")
    return described


def check_files(folder: Path, sha256: Mapping[str, str] | None = None, *, verify: bool = True) -> None:
    """Look at the weights' file, or at the shards and their index, before anything is loaded.

    They are model.safetensors, or else pytorch_model.bin, of which tensors are read and nothing else.

    Args:
        folder: the checkpoint.
        sha256: file name -> digest that must hold.
        verify: also check the digests that the files themselves hold, where they do: see `mmzoo.integrity`.

    Raises:
        CheckpointError: a file is missing, damaged, or not the known one.
    """
    names = _shards(folder)
    for name in names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"The checkpoint {folder} lacks the file {name}.")
        known = (sha256 or {}).get(name)
        if known is not None and (found := integrity.file_sha256(path)) != known:
            raise CheckpointError(f"{path} is damaged or another file: its sha256 is {found}, not {known}.")
        _shapes_in(path)
    if verify:
        integrity.verify(folder, [name for name in names if name.endswith(".safetensors")])


def read_tensors(folder: Path, sha256: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name there, mapped into memory rather than read.

    Raises:
        CheckpointError: as `check_files`.
    """
    check_files(folder, sha256)
    tensors: dict[str, torch.Tensor] = {}
    for name in _shards(folder):
        tensors.update(read_file(folder / name, verify=False))
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


def read_file(path: Path, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of one file, safetensors or torch's. Raises CheckpointError if it is damaged or holds code."""
    from safetensors.torch import load_file

    _shapes_in(path)
    if verify and path.suffix == ".safetensors":
        integrity.verify_tensors(path)
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
    names = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
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
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != suffix:
            raise CheckpointError(f"{index} names {name!r}, which is no file of this checkpoint.")
    return names


def load_from(
    place: str,
    entry: Entry | None = None,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    **loading: Any,
) -> MultimodalLM:
    """The model and processor of a checkpoint: mmzoo's own, one released by a family's authors, or a LoRA adapter.

    An adapter is merged into its base model, which is loaded from where the adapter says.

    Args:
        place: as `locate` takes it.
        entry: the registered model that it is, if it is one.
        dtype: the checkpoint's own if None.
        verify: check the digests that the files hold, where they do; they are read once more for it.
        token: for a private or gated repository.
        endpoint: the Hub's address.
        **loading: what transformers' `from_pretrained` takes, such as device_map and quantization_config.

    Raises:
        CheckpointError: nothing in the zoo can read it, or it does not fit the model.
        MissingExtra: a device map or quantisation needs a package that is not installed.
    """
    from mmzoo.registry import families

    _check_packages(loading)
    folder = locate(place, token=token, endpoint=endpoint)
    if not (folder / "config.json").is_file() and (folder / ADAPTER).is_file():
        reading: dict[str, Any] = {"verify": verify, "token": token, "endpoint": endpoint}
        return _load_adapted(folder, entry, dtype=dtype, **reading, **loading)
    if (folder / "config.json").is_file() and "_class_name" in (described := read_config(folder)):
        return _load_generator(place, folder, described, entry, dtype=dtype, verify=verify, **loading)
    known = families()
    for family in [entry.module] if entry else known.values():
        if hasattr(family, "is_in_parts") and family.is_in_parts(folder):
            merged = family.read_parts(folder, entry.name if entry else None, dtype=dtype, **loading)
            merged.name_or_path = place
            return merged
    described, tensors = read_config(folder), None
    own = known.get(str(described.get("model_type")))
    module = own or _reader(place, described, entry)
    check_files(folder, entry.sha256 if entry and place == entry.weights else None, verify=verify)
    if own is not None:
        config, processor = _read_own(folder, module)
    else:
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
    model.name_or_path = place  # what peft writes into an adapter as its base
    return model


def _load_generator(
    place: str,
    folder: Path,
    described: Mapping[str, Any],
    entry: Entry | None,
    *,
    dtype: torch.dtype | None,
    verify: bool,
    **loading: Any,
) -> Any:
    """A generator in diffusers' layout, which names its class."""
    from mmzoo.registry import generators

    name = str(described["_class_name"])
    known = [entry.module] if entry else list(generators().values())
    module = next((one for one in known if one.MODEL.__name__ == name or _is_release(one, described)), None)
    if module is None:
        raise CheckpointError(f"{place} is a checkpoint of diffusers' {name}, which is no generator of mmzoo.")
    check_files(folder, entry.sha256 if entry and place == entry.weights else None, verify=verify)
    try:
        model, report = module.MODEL.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **loading
        )
    except (ValueError, OSError, TypeError) as error:
        raise CheckpointError(f"Cannot read the generator in {folder}: {type(error).__name__}: {error}") from error
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise CheckpointError(
            f"The checkpoint {place} does not fit {name}.",
            missing=report["missing_keys"],
            unexpected=report["unexpected_keys"],
            misshapen=[(key, tuple(there), tuple(here)) for key, there, here in report["mismatched_keys"]],
        )
    model.name_or_path = place
    return model


def _is_release(module: ModuleType, described: Mapping[str, Any]) -> bool:
    return hasattr(module, "is_release") and module.is_release(described)


def _read_own(folder: Path, module: ModuleType) -> tuple[Any, Any]:
    """Configuration and processor of a checkpoint in mmzoo's format. Code in the folder is never run."""
    try:
        config = module.MODEL.config_class.from_pretrained(folder)
        return config, module.PROCESSOR.from_pretrained(folder, trust_remote_code=False)
    except (MmzooError, ImportError):
        raise
    except Exception as error:  # what a damaged file makes transformers raise is of any class
        raise CheckpointError(
            f"Cannot read the configuration or the processor in {folder}: {type(error).__name__}: {error}"
        ) from error


def _load_adapted(
    folder: Path,
    entry: Entry | None,
    *,
    dtype: torch.dtype | None,
    verify: bool,
    token: str | None,
    endpoint: str | None,
    **loading: Any,
) -> MultimodalLM:
    """The base model with a LoRA adapter merged into it."""
    from mmzoo.registry import _ENTRIES

    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtra("peft", "train", "Loading an adapter") from error
    given = read_adapter(folder, verify=verify)
    described = _read_object(folder / ADAPTER)
    base, revision = described.get("base_model_name_or_path"), described.get("revision")
    if not base:
        raise CheckpointError(f"{folder / ADAPTER} does not name its base model.")
    if base in _ENTRIES:
        entry = _ENTRIES[base]
        base = entry.weights or base
    elif not base.startswith((HUB, PACKAGE)) and not Path(base).is_dir():
        base = f"{HUB}{base}" + (f"@{revision}" if revision else "")
    model = load_from(base, entry, dtype=dtype, verify=verify, token=token, endpoint=endpoint, **loading)
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"The adapter {folder} does not fit its base model {base}: {error}") from error
    # Told whether it holds embeddings, peft does not ask the Hub for the vocabulary of the base model.
    least, most = (get_peft_model_state_dict(adapted, save_embedding_layers=held).keys() for held in (False, True))
    if least - given.keys() or given.keys() - most:
        raise CheckpointError(
            f"The adapter {folder} does not fit its base model {base}.",
            missing=least - given.keys(),
            unexpected=given.keys() - most,
        )
    return adapted.merge_and_unload()


def read_adapter(folder: Path, *, verify: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA adapter's folder. Raises CheckpointError if it is none, or damaged."""
    _read_object(folder / ADAPTER)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"The adapter {folder} lacks the file {ADAPTER_WEIGHTS}.")
    tensors = read_file(folder / ADAPTER_WEIGHTS, verify=False)
    if verify:
        integrity.verify(folder, [ADAPTER_WEIGHTS])
    return tensors


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
    max_shard_size: int | str = SHARD,
    **options: Any,
) -> Path:
    """Write model.safetensors, config.json, the processor's files and README.md, each whole or not at all.

    The digests of all of them but the card are in the metadata of the safetensors files: see `mmzoo.integrity`.

    Args:
        model: with its processor.
        folder: made if it does not exist; files of the same names are replaced, config.json last, and the weights of
            an earlier save are removed.
        card: text of README.md.
        max_shard_size: weights above it become several files with an index.
        **options: of `save_pretrained` of the library that the model is of.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as name:
        model.write_files(name, max_shard_size=max_shard_size, **options)
        if model.processor is not None:
            model.processor.save_pretrained(name)
        integrity.seal(Path(name))
        if card is not None:
            (Path(name) / "README.md").write_text(card)
        new = sorted(Path(name).iterdir(), key=lambda path: path.name == "config.json")
        for old in [old for old in folder.iterdir() if any(fnmatch(old.name, pattern) for pattern in _WEIGHTS)]:
            if old.name not in {path.name for path in new}:
                old.unlink()
        for path in new:
            path.chmod(0o644)
            path.replace(folder / path.name)
    return folder


def convert(
    source: str,
    folder: str | Path,
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    max_shard_size: int | str = SHARD,
) -> Path:
    """Write a checkpoint of any layout that `mmzoo.load` reads in mmzoo's own format, with digests and a card.

    Args:
        source: a registered name, or a place as `locate` takes it: a release of the authors, an adapter, mmzoo's own.
        folder: where to write; not the source itself.
        name: the registered model that it is, where its files do not say so, or to choose among several.
        dtype: the checkpoint's own if None.
        verify: check the digests of a checkpoint that holds some.
        max_shard_size: weights above it become several files with an index.

    Raises:
        CheckpointError: nothing in the zoo can read the source.
        InputError: the folder is the source.
    """
    from mmzoo import registry
    from mmzoo.publishing import describe, draw_masks

    if Path(folder).resolve() == Path(source).resolve():
        raise InputError(f"{folder} is the source itself. Give another folder.")
    if name is None and (source in registry.list_models() or not is_location(source)):
        name, source = source, "default"
    model = registry.load(name or source, source if name else "default", dtype=dtype, verify=verify)
    card = describe(model, name or Path(folder).name, str(folder), entry=registry.entry(name) if name else None)
    save(model, folder, card, max_shard_size=max_shard_size)
    draw_masks(model, Path(folder))
    return Path(folder)


def push(
    model: MultimodalLM | str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str | None = None,
    adapter: bool = False,
    base: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    eval_results: Sequence[str | Path] = (),
    max_shard_size: int | str = SHARD,
    token: str | None = None,
    endpoint: str | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Put a model on the Hub: weights with digests, config.json, the processor's files, a card, evaluation results.

    The repository is made if it does not exist, and weights of an earlier push that this one does not replace are
    removed from it. After an interruption the same call goes on: large files that arrived are not sent again.

    Args:
        model: a model, a registered name, a folder, or any other place that `mmzoo.load` takes.
        repo: "org/name".
        revision: a branch, made if it does not exist; main if None.
        private: whether a new repository is private; the account's own choice if None.
        message: of the commit.
        adapter: push a LoRA adapter alone: `model` is peft's model, or the folder of one.
        base: "hf-hub:org/name" of an adapter's base model, where the adapter names none or a local folder.
        license: of the weights, as the Hub names it; that of the checkpoint they come from if None.
        datasets: Hub names of what it was trained on.
        eval_results: files of scores, as `mmzoo.publishing.read_scores` takes them.
        max_shard_size: weights above it become several files with an index.
        token: what `hf auth login` stored if None.
        endpoint: the Hub's address; huggingface_hub's own if None.
        dry_run: a new folder: what would be uploaded is written there, byte for byte, and nothing is sent.

    Returns:
        The address of the commit, or the folder of the dry run.

    Raises:
        HubError: the Hub refused it, or cannot be reached.
        InputError: scores, an adapter or a folder that cannot be used.
        CheckpointError: the checkpoint to push is damaged.
    """
    from mmzoo.publishing import stage

    if dry_run is not None and Path(dry_run).exists() and any(Path(dry_run).iterdir()):
        raise InputError(f"The folder {dry_run} of the dry run is not empty. Give a new one.")
    with tempfile.TemporaryDirectory(prefix="mmzoo.") as temporary:
        folder = Path(dry_run) if dry_run is not None else Path(temporary) / "model"
        stage(
            model,
            folder,
            repo,
            revision=revision,
            adapter=adapter,
            base=base,
            license=license,
            datasets=datasets,
            eval_results=eval_results,
            max_shard_size=max_shard_size,
            reading={"token": token, "endpoint": endpoint},
        )
        if dry_run is not None:
            return str(folder)
        return _upload(folder, repo, revision, private, message or "Push with mmzoo", token, endpoint)


def _upload(
    folder: Path,
    repo: str,
    revision: str | None,
    private: bool | None,
    message: str,
    token: str | None,
    endpoint: str | None,
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="mmzoo")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        if (folder / ADAPTER).is_file() and api.file_exists(repo, "config.json", revision=revision):
            raise HubError(f"{repo} holds a whole model. Push the adapter to a repository or a branch of its own.")
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message, delete_patterns=_WEIGHTS
        )
    except HubError:
        raise
    except Exception as error:  # the client raises classes of its own, of httpx and of the standard library
        raise HubError(f"Cannot push to {repo}: {type(error).__name__}: {error}\n{access_hint(error)}") from error
    return done.commit_url
