"""Draw every rule that a model of the zoo has, and those of the documentation, into docs/images."""

from __future__ import annotations

from pathlib import Path

import mmzoo
from mmzoo.attention import draw_example
from mmzoo.registry import entry

FOLDER = Path(__file__).parent.parent / "docs" / "images"


def names() -> list[str]:
    entries = map(entry, mmzoo.list_models())
    used = {name for one in entries for name in (one.rule, one.connector_rule) if name}
    return sorted(used | {"sink-window", "causal-temporal"})


if __name__ == "__main__":
    for name in names():
        draw_example(name, FOLDER / f"{name}.png")
