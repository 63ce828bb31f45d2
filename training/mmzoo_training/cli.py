"""The Lightning CLI: `mmzoo fit --config aki-nano`.

A configuration is a recipe's name (shipped in `mmzoo_training/recipes`) or a YAML file. The configuration that a run
saves runs it again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mmzoo import hub
from mmzoo.errors import InputError

RECIPES = resources.files("mmzoo_training") / "recipes"


def recipe(name: str) -> str:
    """The path of a shipped recipe, or of a YAML file. Raises InputError if there is neither."""
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return str(shipped)
    if Path(name).is_file():
        return name
    known = sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir() if path.name.endswith(".yaml"))
    raise InputError(f"No recipe or file named {name!r}. Recipes: {', '.join(known)}.")


class RecipeCLI(LightningCLI):
    """LightningCLI that finds recipes by name and exports the trained model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--export FOLDER`: where the trained model is saved as `mmzoo.load` reads it."""
        parser.add_argument("--export", type=str, default=None, help="folder for the trained model")
        parser.link_arguments("model.init_args.name", "data.init_args.model_name")
        parser.link_arguments("model.init_args.describe_steps", "data.init_args.describe_steps")

    def after_fit(self) -> None:
        """Save the model, without its training heads."""
        folder = self.config[self.subcommand].export
        if folder and self.trainer.is_global_zero:
            hub.save(self.model.model.eval(), folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run fit, validate, test or predict, as the process's own command line."""
    sys.argv[1:] = _with_recipes(list(sys.argv[1:] if arguments is None else arguments))
    RecipeCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
    )


def _with_recipes(arguments: list[str]) -> list[str]:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            arguments[i + 1] = recipe(arguments[i + 1])
        elif argument.startswith("--config="):
            arguments[i] = "--config=" + recipe(argument.removeprefix("--config="))
    return arguments
