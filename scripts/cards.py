"""Write model_cards/<name>.md for every registered model."""

from __future__ import annotations

from pathlib import Path

import yaml

import mmzoo
from mmzoo.cards import card
from mmzoo.files import replacing
from mmzoo.registry import entry

ROOT = Path(__file__).parent.parent


def page(name: str) -> str:
    return card(entry(name), recipes=[recipe for recipe, model in _trained().items() if model == name])


def _trained() -> dict[str, str]:
    """Recipe -> name of the model that it trains."""
    paths = sorted((ROOT / "training" / "mmzoo_training" / "recipes").glob("*.yaml"))
    described = {path.stem: yaml.safe_load(path.read_text()) for path in paths}
    return {recipe: one["model"]["init_args"]["name"] for recipe, one in described.items()}


if __name__ == "__main__":
    for name in mmzoo.list_models():
        with replacing(ROOT / "model_cards" / f"{name}.md") as temporary:
            temporary.write_text(page(name))
