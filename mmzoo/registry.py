"""Names -> entries. One new model is one file in `mmzoo/models` and one line in `mmzoo/models/__init__.py`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from mmzoo.errors import InputError, MissingExtra, NoPretrainedWeights, UnknownModel

if TYPE_CHECKING:
    import torch

    from mmzoo.language import MultimodalLM
    from mmzoo.masks import Rule


class NonCommercialWeights(UserWarning):
    """The weights that were just loaded may not be used commercially."""


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: `<system>-<size>`.
        family: a file of `mmzoo.models`, or a dotted module name. The module holds `MODEL`, `CONFIGS` (name ->
            configuration) and `processor(name, config)`.
        task: what it does, in the Hub's words: "video-text-to-text", "image-text-to-text" ...
        rule: name of its mask.
        scheme: name of its positions.
        paper: where it is described.
        summary: one line.
        weights: where they are: "hf-hub:org/name", "package:<folder of mmzoo/assets>", or None.
        license: of the weights, as the Hub names it; "unknown" where it was not seen, None without weights.
        sha256: file name -> digest, where known; checked when loading.
        connector_rule: name of the mask inside its connector, where it has one.
        library: whose model it is: understanding models are of transformers, generators of diffusers.
        base_model: Hub names of the models it was built from, where known.
        datasets: Hub names of what it was trained on, where known.
    """

    name: str
    family: str
    task: str
    rule: str
    scheme: str
    paper: str
    summary: str
    weights: str | None = None
    license: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    connector_rule: str | None = None
    library: Literal["transformers", "diffusers"] = "transformers"
    base_model: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    @property
    def rules(self) -> dict[str, tuple[Rule, ...]]:
        """Where a mask rules ("mask", "mask of the connector") -> its rules; two-softmax attention has a pair."""
        from mmzoo import masks

        names = {"mask": self.rule, "mask of the connector": self.connector_rule}
        found = {where: masks.rule(name) for where, name in names.items() if name}
        return {where: rule if isinstance(rule, tuple) else (rule,) for where, rule in found.items()}

    @property
    def module(self) -> ModuleType:
        """The family's module, imported."""
        if self.library == "diffusers" and importlib.util.find_spec("diffusers") is None:
            raise MissingExtra("diffusers", "diffusion", f"The generator {self.name}")
        if self.library == "diffusers":
            importlib.import_module("mmzoo.generation")  # first, for it imports diffusers without advice
        return importlib.import_module(self.family if "." in self.family else f"mmzoo.models.{self.family}")

    @property
    def non_commercial(self) -> bool:
        """Whether the licence of the weights forbids commercial use."""
        return self.license is not None and "-nc" in self.license


@contextmanager
def without_kernel_advice() -> Iterator[None]:
    """Imports diffusers without what its bitsandbytes says on some CPUs of 4-bit weights, which no generator has."""

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


_ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> Entry:
    """Add an entry. Raises InputError if its name is taken by another one."""
    if _ENTRIES.setdefault(entry.name, entry) != entry:
        raise InputError(f"A model named {entry.name!r} is registered already. Choose another name.")
    return entry


def entry(name: str) -> Entry:
    """The entry of that name. Raises UnknownModel, with the three closest names."""
    if name not in _ENTRIES:
        close = difflib.get_close_matches(name, _ENTRIES, n=3, cutoff=0.0)
        raise UnknownModel(
            f"Unknown model {name!r}. The closest names are {', '.join(close)}. mmzoo.list_models() gives them all; "
            "models on the Hub are named 'hf-hub:org/name', local ones by their folder."
        )
    return _ENTRIES[name]


def tasks() -> list[str]:
    """The tasks of the registered models, in alphabetical order."""
    return sorted({entry.task for entry in _ENTRIES.values()})


def list_models(
    pattern: str = "*", *, task: str | None = None, pretrained: bool | None = None, library: str | None = None
) -> list[str]:
    """Names that match a pattern such as "aki-*", in natural order.

    Args:
        pattern: with `*` and `?`.
        task: only models for this task.
        pretrained: only models with (True) or without (False) weights.
        library: only understanding models ("transformers"), or only generators ("diffusers").

    Raises:
        InputError: no model is for this task.
    """
    if task is not None and task not in tasks():
        raise InputError(f"No model is for the task {task!r}. The tasks are {', '.join(tasks())}.")
    found = [
        entry.name
        for entry in _ENTRIES.values()
        if fnmatch(entry.name, pattern)
        and task in (None, entry.task)
        and pretrained in (None, entry.weights is not None)
        and library in (None, entry.library)
    ]
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def create(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    **overrides: Any,
) -> MultimodalLM:
    """A model with random weights, evaluation mode, with its processor where that needs no download.

    Args:
        name: a registered name.
        device: "meta" builds names and shapes only.
        dtype: float32 if None.
        attention: "sdpa" or "eager".
        **overrides: fields of the family's configuration.

    Raises:
        UnknownModel: no such name.
        InputError: no such device here.
        UnsupportedMask: the backend cannot express the model's rule.
    """
    import torch

    found = entry(name)
    _check_device(device)
    module = found.module
    with torch.device(device):
        model = module.MODEL.build({**module.CONFIGS[name], **overrides}, dtype or torch.float32)
    model.set_attention(attention)
    if found.library == "transformers":
        model.processor = module.processor(name, model.config)
    return model.eval()


def load(
    name: str,
    weights: str | None = "default",
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    verify: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    **loading: Any,
) -> MultimodalLM:
    """A model with its weights and its `.processor`, in evaluation mode.

    Args:
        name: a registered name, "hf-hub:org/name" (with "@revision"), or a local folder.
        weights: where a registered model's weights come from: "default", another "hf-hub:..." or folder, or None for
            random ones.
        device: where it is put.
        dtype: the checkpoint's own if None.
        attention: "sdpa", "eager" or "flex_attention".
        verify: check the sha256 of every tensor in files that hold them, as those of `mmzoo.push` and
            `mmzoo.hub.save` do. The files are read once more for it, at the speed of sha256.
        token: for a private or gated repository; what `hf auth login` stored if None.
        endpoint: the Hub's address; huggingface_hub's own if None.
        **loading: what transformers' `from_pretrained` takes, such as `device_map="auto"` (then `device` is not used)
            and `quantization_config`.

    Raises:
        UnknownModel: no such name.
        InputError: no such device here.
        NoPretrainedWeights: no weights are known for it.
        CheckpointError: the checkpoint is missing, damaged, or of another model.
        UnsupportedMask: the backend cannot express the model's rule.
    """
    from mmzoo import hub

    place: str | None
    found: Entry | None
    if name in _ENTRIES or not hub.is_location(name):
        found = entry(name)
        if weights is None:
            return create(name, device=device, dtype=dtype, attention=attention)
        place = found.weights if weights == "default" else weights
        if place is None:
            raise NoPretrainedWeights(
                f"No pretrained weights are known for {name!r}. Use load({name!r}, weights=None) for random ones, or "
                "weights='hf-hub:org/name' or a folder."
            )
    else:
        found, place = next((one for one in _ENTRIES.values() if one.weights == name), None), name
    placed = {"device_map", "quantization_config"} & loading.keys()
    if not placed:
        _check_device(device)
    model = hub.load_from(place, found, dtype=dtype, verify=verify, token=token, endpoint=endpoint, **loading)
    if not placed:
        model = model.to(device)
    model.set_attention(attention)
    if found and found.non_commercial:
        warnings.warn(
            f"The weights of {name!r} are licensed {found.license}: non-commercial use only.", NonCommercialWeights, 2
        )
    return model.eval()


def _check_device(device: str | torch.device) -> None:
    """Raises InputError where nothing can be put on the device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # by kind of device: none, not built in, no package
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"The device {str(device)!r} cannot be used here: {reason}. Use one of {', '.join(there)}."
        ) from error


def families() -> dict[str, ModuleType]:
    """model_type of the configuration -> family module, for every registered family of understanding models."""
    modules = {found.family: found.module for found in _ENTRIES.values() if found.library == "transformers"}
    return {module.MODEL.config_class.model_type: module for module in modules.values()}


def generators() -> dict[str, ModuleType]:
    """Class name, as diffusers writes it into config.json -> family module, for every registered family of generators.

    Raises:
        MissingExtra: diffusers is not installed.
    """
    modules = {found.family: found.module for found in _ENTRIES.values() if found.library == "diffusers"}
    return {module.MODEL.__name__: module for module in modules.values()}
