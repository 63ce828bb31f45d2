"""Model cards: the registry entry's facts, and prose beside them.

Prose lives in `mmzoo/assets/cards/<name>.md`; `python scripts/cards.py` writes `model_cards/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from mmzoo.registry import Entry

if TYPE_CHECKING:
    from mmzoo.masks import Rule


def card(
    entry: Entry,
    *,
    address: str | None = None,
    rules: Mapping[str, Sequence[Rule]] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md of a model: metadata as the Hub reads it, facts, the rule, what was measured, prose.

    Args:
        entry: its facts.
        address: what `mmzoo.load` is given; the entry's name if None.
        rules: where a mask rules -> its rules; those of the entry's names if None.
        scores: as `mmzoo.publishing.read_scores` gives them.
    """
    prose = resources.files("mmzoo") / "assets" / "cards" / f"{entry.name}.md"
    arxiv = entry.paper.removeprefix("arXiv:")
    source = "picture.png" if entry.task == "image-text-to-text" else "clip.mp4"
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
        "```python",
        "import mmzoo",
        "",
        f'model = mmzoo.load("{address or entry.name}"' + (")" if entry.weights else ", weights=None)"),
        *([f'model.ask("{source}", "what colour is the square")'] if entry.library == "transformers" else []),
        "```",
        "",
    ]
    for where, given in (entry.rules if rules is None else rules).items():
        lines += [f"The {where} as mmzoo declares it:", "", "```", *(repr(one) for one in given), "```", ""]
    lines += _measured(scores)
    lines.pop()
    if prose.is_file():
        lines += ["", prose.read_text().strip()]
    return "\n".join(lines) + "\n"


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


def _measured(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    if not scores:
        return []
    rows = [
        f"| {one['label']} | {metric} | {score['value']:g} | {score.get('stderr', '')} | {score.get('n', '')} |"
        for one in scores
        for metric, score in one["scores"].items()
    ]
    head = ["| protocol | metric | value | standard error | n |", "|---|---|---|---|---|"]
    return ["## Measured with mmzoo", "", *head, *rows, ""]
