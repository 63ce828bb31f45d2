"""What a push writes: the model or the adapter, its card, and evaluation results in the Hub's format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmzoo import hub, integrity
from mmzoo.attention import draw_example
from mmzoo.cards import WORLD, adapter_card, card
from mmzoo.errors import InputError

if TYPE_CHECKING:
    from mmzoo.language import MultimodalLM
    from mmzoo.registry import Entry

_SCORES = {"benchmark": str, "protocol": str, "label": str, "scores": dict, "date": str}


def stage(
    model: MultimodalLM | str | Path,
    folder: Path,
    repo: str,
    *,
    revision: str | None,
    adapter: bool,
    base: str | None,
    license: str | None,
    datasets: Sequence[str],
    eval_results: Sequence[str | Path],
    max_shard_size: int | str,
    reading: Mapping[str, Any],
) -> None:
    """Write the folder that `mmzoo.push` uploads; arguments and errors are those of `push`.

    `reading` is what `mmzoo.hub.load_from` needs to reach the place of a model that is given by name.
    """
    from mmzoo.registry import _ENTRIES

    scores = [one for path in eval_results for one in read_scores(path)]
    address = f"{hub.HUB}{repo}" + (f"@{revision}" if revision else "")
    facts: dict[str, Any] = {"license": license, "datasets": datasets, "scores": scores}
    if adapter:
        _stage_adapter(model, folder, address, base, facts, reading)
    else:
        if base is not None:
            raise InputError("base is for adapters: a whole model is pushed with its own weights.")
        if hasattr(model, "peft_config"):
            raise InputError("This is peft's model: give adapter=True, or push model.merge_and_unload().")
        entry = None
        if isinstance(model, (str, Path)):
            entry = _ENTRIES.get(str(model))
            model = _load(str(model), reading)
        title = entry.name if entry else repo
        hub.save(model, folder, describe(model, title, address, entry=entry, **facts), max_shard_size=max_shard_size)
        draw_masks(model, folder)
    write_results(scores, folder)


def _load(name: str, reading: Mapping[str, Any]) -> MultimodalLM:
    from mmzoo.registry import load

    return load(name, **reading)


def describe(
    model: MultimodalLM,
    title: str,
    address: str,
    *,
    entry: Entry | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    scores: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of a model that was loaded or trained.

    Args:
        model: whose family, rule and scheme are named.
        title: the heading.
        address: what `mmzoo.load` is given to load it.
        entry: the registered model that it is; else the card names what it was made from, as far as the model knows.
        license: of the weights; the origin's if None.
        datasets: Hub names.
        scores: as `read_scores` gives them.
    """
    from mmzoo.registry import _ENTRIES

    family = next((one for one in _ENTRIES.values() if type(model) is one.module.MODEL), None)
    if family is None:
        raise InputError(f"{type(model).__name__} is of no registered family. Register an entry for it first.")
    origin = str(model.name_or_path or "")
    source = entry or next((one for one in _ENTRIES.values() if one.weights == origin), None)
    if entry is None:
        size = sum(parameter.numel() for parameter in model.parameters())
        bases = (_hub_name(origin),) if origin.startswith(hub.HUB) else source.base_model if source else ()
        entry = replace(
            source or family,
            summary=f"{type(model).__name__} under {model.rule_name} attention, {size:,} parameters",
            rule=getattr(model.config, "rule", family.rule),
            scheme=getattr(model.config, "scheme", family.scheme),
            license=source.license if source else None,
            base_model=bases,
            datasets=(),
        )
    entry = replace(
        entry, name=title, weights=address, license=license or entry.license, datasets=(*entry.datasets, *datasets)
    )
    ours = source is not None and (source.weights or "").startswith("package:")
    return card(
        entry,
        address=address,
        rules=_rules(model),
        scores=scores,
        benchmark=WORLD if ours else None,
        pictures=lambda rule: f"{rule}.png",
    )


def draw_masks(model: MultimodalLM, folder: Path) -> None:
    """Draw the model's masks beside its card, which shows them."""
    for rules in _rules(model).values():
        draw_example(rules if len(rules) > 1 else rules[0], folder / f"{rules[0].name}.png")


def _rules(model: MultimodalLM) -> dict[str, tuple[Any, ...]]:
    found = {"mask": model.rule, "mask of the connector": model.connector_rule}
    return {where: rule if isinstance(rule, tuple) else (rule,) for where, rule in found.items() if rule is not None}


def _stage_adapter(
    model: Any, folder: Path, address: str, base: str | None, facts: Mapping[str, Any], reading: Mapping[str, Any]
) -> None:
    """Weights and configuration of an adapter, its base as the Hub names it, and its card."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder)
    elif isinstance(model, (str, Path)):
        source = hub.locate(str(model), **reading)
        hub.read_adapter(source)
        for name in (hub.ADAPTER, hub.ADAPTER_WEIGHTS):
            shutil.copyfile(source / name, folder / name)
    else:
        raise InputError("adapter=True takes peft's model, or the folder of an adapter.")
    described = json.loads((folder / hub.ADAPTER).read_text())
    named, revision = _base(base or described.get("base_model_name_or_path"), described.get("revision"))
    described |= {"base_model_name_or_path": named, "revision": revision}
    # peft keeps sets, whose order differs from run to run.
    described = {key: sorted(one) if _is_words(one) else one for key, one in described.items()}
    (folder / hub.ADAPTER).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    integrity.seal(folder)
    on_hub = None if named.startswith(hub.PACKAGE) else named
    (folder / "README.md").write_text(adapter_card(address, named, on_hub, **facts))


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _base(named: str | None, revision: str | None) -> tuple[str, str | None]:
    """An adapter's base as it is written into its configuration: (name on the Hub, revision)."""
    from mmzoo.registry import _ENTRIES

    if named in _ENTRIES and _ENTRIES[named].weights:
        named = _ENTRIES[named].weights
    if not named or Path(named).is_dir():
        raise InputError(
            f"The adapter's base model is {named or 'not named'!r}, which others cannot load. Push the base, and give "
            "base='hf-hub:org/name'."
        )
    if named.startswith(hub.PACKAGE):
        return named, None
    name, _, given = named.removeprefix(hub.HUB).partition("@")
    return name, given or revision


def _hub_name(address: str) -> str:
    return address.removeprefix(hub.HUB).partition("@")[0]


def read_scores(path: str | Path) -> list[dict[str, Any]]:
    """The scores in a JSON file: one object, or a list of them.

    Each is {"benchmark", "protocol", "label", "scores": {metric: {"value", "stderr", "n"}}, "date", "dataset_id"}.
    `label` is the protocol as it is printed; `dataset_id`, the benchmark's data set on the Hub, may be left out, and
    the scores then stand in the card alone. `stderr` and `n` may be left out too, and `date`, for which the file's own
    is taken. Of the `scores.json` of `mmzoo eval run`, which says its `headline`, that metric is taken alone.

    Raises:
        InputError: the file cannot be read, or a field is missing or of another type.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read the scores {path}: {error}.") from error
    day = date.fromtimestamp(Path(path).stat().st_mtime).isoformat()
    for one in (found := found if isinstance(found, list) else [found]):
        if isinstance(one, dict):
            one.setdefault("date", day)
        for field, kind in _SCORES.items():
            if not isinstance(one, dict) or not isinstance(one.get(field), kind):
                raise InputError(f"The scores {path} lack the field {field!r}, or it is no {kind.__name__}.")
        for metric, score in one["scores"].items():
            if not isinstance(score, dict) or not isinstance(score.get("value"), (int, float)):
                raise InputError(f"The scores {path} give no value for {metric!r}.")
        if one.get("headline") in one["scores"]:
            one["scores"] = {one["headline"]: one["scores"][one["headline"]]}
    return found


def write_results(scores: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `.eval_results/<benchmark>.yaml` for scores with a data set on the Hub; the protocol stands in `notes`."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    files: dict[str, list[Any]] = {}
    for one in scores:
        for metric, score in one["scores"].items() if one.get("dataset_id") else ():
            spread = [f"{key} {score[key]:g}" for key in ("stderr", "n") if score.get(key) is not None]
            entry = EvalResultEntry(
                dataset_id=one["dataset_id"],
                task_id=metric,
                value=score["value"],
                date=one["date"],
                notes=", ".join([one["label"], *spread]),
            )
            name = "".join(letter if letter.isalnum() else "-" for letter in one["benchmark"].lower())
            files.setdefault(name, []).append(entry)
    for name, entries in files.items():
        path = folder / ".eval_results" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
