"""Model cards: the registry entry's facts, and prose beside them.

Prose lives in `mmzoo/assets/cards/<name>.md`; `python scripts/cards.py` writes `model_cards/`.
"""

from __future__ import annotations

from importlib import resources

from mmzoo.registry import Entry


def card(entry: Entry) -> str:
    """README.md of a model: metadata as the Hub reads it, facts, the rule, prose."""
    prose = resources.files("mmzoo") / "assets" / "cards" / f"{entry.name}.md"
    source = "picture.jpg" if entry.task == "image-text-to-text" else "clip.mp4"
    arxiv = entry.paper.removeprefix("arXiv:")
    source = "picture.png" if entry.task == "image-text-to-text" else "clip.mp4"
    masks = filter(None, (entry.rule, entry.connector_rule))
    tags = ("mmzoo", entry.family, *masks, entry.scheme, f"arxiv:{arxiv}")
    metadata = [
        "library_name: mmzoo",
        f"pipeline_tag: {entry.task}",
        *([f"license: {entry.license}"] if entry.license else []),
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]
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
        "---",
        *metadata,
        "---",
        "",
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
        f'model = mmzoo.load("{entry.name}"' + (")" if entry.weights else ", weights=None)"),
        f'model.ask("{source}", "what colour is the square")',
        "```",
        "",
    ]
    for where, rules in entry.rules.items():
        lines += [f"The {where} as mmzoo declares it:", "", "```", *(repr(one) for one in rules), "```", ""]
    lines.pop()
    if prose.is_file():
        lines += ["", prose.read_text().strip()]
    return "\n".join(lines) + "\n"
