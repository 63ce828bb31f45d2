"""The Lightning CLI: `mmzoo fit --config aki-nano`.

A configuration is a recipe's name (shipped in `mmzoo_training/recipes`) or a YAML file. The configuration that a run
saves runs it again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from mmzoo.errors import InputError
from mmzoo.files import replacing
from mmzoo_training.callbacks import ExactResume, latest_checkpoint

RECIPES = resources.files("mmzoo_training") / "recipes"
SUBCOMMANDS = ("fit", "validate", "test", "predict")


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
    """LightningCLI that finds recipes by name, resumes exactly, and exports the trained model."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options beside those of trainer, model and data."""
        parser.add_argument("--export", type=str | None, default=None, help="folder for the trained model")
        parser.add_argument("--export_adapter", type=str | None, default=None, help="folder for the LoRA adapter alone")
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: go on from the latest valid checkpoint in trainer.default_root_dir, if there is one",
        )
        parser.add_argument(
            "--output", type=str | None, default=None, help="file for predictions; predictions.jsonl in the log folder"
        )
        parser.link_arguments("model.init_args.name", "data.init_args.model_name")
        parser.link_arguments("model.init_args.describe_steps", "data.init_args.describe_steps")

    def _parse_ckpt_path(self) -> None:
        """The configuration says what the model is. Lightning would let the checkpoint replace it."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Lightning's, with exact resume before all other callbacks."""
        trainer = super().instantiate_trainer(**kwargs)
        if not any(isinstance(one, ExactResume) for one in trainer.callbacks):
            trainer.callbacks.insert(0, ExactResume())
        return trainer

    def before_fit(self) -> None:
        """Find the checkpoint for `--resume auto`, and see that what is to be exported can be."""
        options = self.config_init[self.subcommand]
        for option in ("export", "export_adapter"):
            if options[option] and not hasattr(self.model, option):
                raise InputError(f"--{option} needs a module that can: {type(self.model).__name__} has no {option}().")
        if options.resume is None:
            return
        if options.ckpt_path:
            raise InputError("Give --resume auto or --ckpt_path, not both.")
        if options.trainer.default_root_dir is None:
            raise InputError("--resume auto looks in trainer.default_root_dir. Set it to a folder of this run's own.")
        found = latest_checkpoint(options.trainer.default_root_dir)
        where = (
            f"No checkpoint in {options.trainer.default_root_dir}: starting." if found is None else f"Found {found}."
        )
        rank_zero_info(where)
        options.ckpt_path = None if found is None else str(found)

    def after_fit(self) -> None:
        """Save the adapter, and then the model, without its training heads."""
        options = self.config[self.subcommand]
        for option in ("export_adapter", "export"):
            if options[option]:
                getattr(self.model, option)(options[option])

    def predict(self, **kwargs: Any) -> None:
        """Write the answers, a JSON object a line."""
        batches = self.trainer.predict(**kwargs)
        path = Path(self.config[self.subcommand].output or Path(self.trainer.log_dir or ".") / "predictions.jsonl")
        if self.trainer.is_global_zero:
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(one) + "\n" for batch in batches for one in batch))
            rank_zero_info(f"Written: {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run fit, validate, test or predict, as the process's own command line.

    Raises:
        InputError: the configuration has an unknown key or a value of a wrong type.
    """
    sys.argv[1:] = _with_recipes(list(sys.argv[1:] if arguments is None else arguments))
    strict = {"exit_on_error": False}
    try:
        RecipeCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={**strict, **dict.fromkeys(SUBCOMMANDS, strict)},
        )
    except ArgumentError as error:
        raise InputError(f"The configuration cannot be read. {error}") from error


def _with_recipes(arguments: list[str]) -> list[str]:
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            arguments[i + 1] = recipe(arguments[i + 1])
        elif argument.startswith("--config="):
            arguments[i] = "--config=" + recipe(argument.removeprefix("--config="))
    return arguments
