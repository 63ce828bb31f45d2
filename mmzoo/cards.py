"""Model cards: the registry entry's facts, and prose beside them.

Prose lives in `mmzoo/assets/cards/<name>.md`; `python scripts/cards.py` writes `model_cards/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from mmzoo.registry import Entry

if TYPE_CHECKING:
    from mmzoo.masks import Rule

WORLD = "world"
"""The benchmark of models that know the synthetic world alone."""


def in_docs(rule: str) -> str:
    """Where the picture of a rule lies, as seen from `model_cards/`."""
    return f"../docs/images/{rule}.png"


def card(
    entry: Entry,
    *,
    address: str | None = None,
    rules: Mapping[str, Sequence[Rule]] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
    recipes: Sequence[str] = (),
    benchmark: str | None = None,
    pictures: Callable[[str], str] = in_docs,
) -> str:
    """README.md of a model: metadata as the Hub reads it, facts, the rule, its use, prose, what was measured.

    Args:
        entry: its facts.
        address: what `mmzoo.load` is given; the entry's name if None.
        rules: where a mask rules -> its rules; those of the entry's names if None.
        scores: as `mmzoo.publishing.read_scores` gives them.
        recipes: names of the recipes that train it.
        benchmark: what it is scored on; if None, by where its weights are and its task.
        pictures: name of a rule -> where its picture lies.
    """
    prose = resources.files("mmzoo") / "assets" / "cards" / f"{entry.name}.md"
    arxiv = entry.paper.removeprefix("arXiv:")
    masks = filter(None, (entry.rule, entry.connector_rule))
    metadata = {
        "library_name": "mmzoo",
        "pipeline_tag": entry.task,
        "license": entry.license,
        "base_model": list(entry.base_model),
        "datasets": list(entry.datasets),
        "tags": ["mmzoo", entry.family, *masks, entry.scheme, f"arxiv:{arxiv}"],
    }
    facts = {
        "weights": entry.weights or "none: `mmzoo.load` builds it with `weights=None`",
        "licence of the weights": (entry.license or "-")
        + (" (non-commercial use only)" if entry.non_commercial else "")
        + (" (not seen: read the model's page before you use them)" if entry.license == "unknown" else ""),
        "mask": entry.rule,
        **({"mask of the connector": entry.connector_rule} if entry.connector_rule else {}),
        "positions": entry.scheme,
        "paper": f"[arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})",
    }
    told = (entry.rules if rules is None else rules).items()
    lines = [
        *_front_matter(metadata),
        f"# {entry.name}",
        "",
        f"{entry.summary}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {value} |" for label, value in facts.items()),
        "",
    ]
    for where, given in told:
        lines += [f"The {where} as mmzoo declares it:", "", "```", *(repr(one) for one in given), "```", ""]
        shown = pictures(given[0].name if len(given) == 1 else entry.rule)
        lines += [f"![The {where}, queries downwards and keys to the right]({shown})", ""]
    lines += _use(entry, address, recipes, benchmark or _benchmark(entry))
    lines += ["## About", "", *prose.read_text().strip().split("\n"), ""] if prose.is_file() else []
    lines += _measured(scores, entry if address is None else None)
    return "\n".join(lines[:-1]) + "\n"


def _benchmark(entry: Entry) -> str:
    if (entry.weights or "").startswith("package:"):
        return WORLD
    return "pope" if entry.task == "image-text-to-text" else "mvbench"


def _use(entry: Entry, address: str | None, recipes: Sequence[str], benchmark: str) -> list[str]:
    """How to load, train and evaluate it."""
    load = f'model = mmzoo.load("{address or entry.name}"' + (")" if entry.weights else ", weights=None)")
    lines = ["## Use", "", "```python", "import mmzoo", "", load]
    if entry.library != "diffusers":
        source = "picture.png" if entry.task == "image-text-to-text" else "clip.mp4"
        lines.append(f'model.ask("{source}", "what colour is the square")')
    return [*lines, "```", "", *_commands(entry, address, recipes, benchmark)]


def _commands(entry: Entry, address: str | None, recipes: Sequence[str], benchmark: str) -> list[str]:
    name = address or entry.name
    lines = [f"mmzoo fit --config {recipe}" for recipe in recipes]
    if entry.library == "diffusers":
        lines += [f"mmzoo generate {name} --out made.mp4"] if entry.weights else []
    elif entry.weights:
        asked = "--batch-size 8" if benchmark == WORLD else "--data ANNOTATIONS --media FOLDER --device cuda"
        lines.append(f"mmzoo eval run {name} {benchmark} {asked}")
    return ["```bash", *lines, "```", ""] if lines else []


def adapter_card(
    address: str,
    base: str,
    base_on_hub: str | None,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    scores: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md of a LoRA adapter.

    Args:
        address: what `mmzoo.load` is given.
        base: the base model.
        base_on_hub: its name on the Hub, if it is there.
        license: of the adapter.
        datasets: Hub names of what it was trained on.
        scores: as `mmzoo.publishing.read_scores` gives them.
    """
    metadata = {
        "library_name": "mmzoo",
        "license": license,
        "base_model": base_on_hub,
        "base_model_relation": "adapter" if base_on_hub else None,
        "datasets": list(datasets),
        "tags": ["mmzoo", "lora", "peft"],
    }
    lines = [
        *_front_matter(metadata),
        f"# {address.removeprefix('hf-hub:')}",
        "",
        f"A LoRA adapter of {base}; loading it loads the base and merges the two.",
        "",
        "```python",
        "import mmzoo",
        "",
        f'model = mmzoo.load("{address}")',
        "```",
        "",
        *_measured(scores),
    ]
    return "\n".join(lines[:-1]) + "\n"


def _front_matter(metadata: Mapping[str, Any]) -> list[str]:
    import yaml

    given = {key: value for key, value in metadata.items() if value}
    return ["---", *yaml.safe_dump(given, sort_keys=False, width=1000).splitlines(), "---", ""]


def _measured(scores: Sequence[Mapping[str, Any]], entry: Entry | None = None) -> list[str]:
    if not scores and entry is not None and not (entry.weights or "").startswith("package:"):
        why = "its released weights have not been run" if entry.weights else "there are no weights of it"
        return ["## Measured with mmzoo", "", f"Nothing: {why}.", ""]
    if not scores:
        return []
    rows = [
        f"| {one['label']} | {metric} | {score['value']:.6g} | {_number(score, 'stderr')} | {_number(score, 'n')} |"
        for one in scores
        for metric, score in one["scores"].items()
    ]
    head = ["| protocol | metric | value | standard error | n |", "|---|---|---|---|---|"]
    return ["## Measured with mmzoo", "", *head, *rows, ""]


def _number(score: Mapping[str, Any], key: str) -> str:
    value = score.get(key)
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
