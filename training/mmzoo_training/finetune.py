"""Training a model of the zoo on records: which parts train, at which rates, by which schedule, with or without LoRA.

One run is one stage. The next stage starts from what the last one exported.

Shape legend: B rows, L tokens, K layout fields, S samples of a batch, M media of a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoConfig

import mmzoo
from mmzoo import hub, registry
from mmzoo.errors import CheckpointError, InputError, MissingExtra
from mmzoo.language import MultimodalLM, media_starts
from mmzoo.layout import TokenLayout
from mmzoo.processing import MultimodalProcessor, read_tokenizer
from mmzoo_training.aki_sft import learning_rate

STATES = ("state_dict", "current_model_state")
"""Where a checkpoint holds parameters: Lightning's place, and the one beside it when weights are averaged."""


@dataclass
class Part:
    """Where a part of a new model takes its weights from.

    Attributes:
        weights: "hf-hub:org/name" or a folder.
        prefix: what stands before the part's parameter names in that checkpoint, such as "vision_model."; of a single
            parameter, its name there.
    """

    weights: str
    prefix: str = ""


class Finetune(lightning.LightningModule):
    """Trains a model of the zoo on batches that hold what its `forward` takes, with labels.

    The loss is the mean over the answer tokens of a batch. Gradients that are accumulated over several batches are the
    mean of the batches' gradients, whatever their number of tokens.

    Args:
        name: a registered model, "hf-hub:org/name" or a folder.
        weights: where a registered model's weights come from: "default", another place, or null for random ones.
        parts: instead of `weights`: submodule or parameter -> where its weights come from. The language model's
            configuration comes from there too.
        fresh: with `parts`: regular expressions of parameters that start at random, or whose table has more rows than
            the part's; every other parameter has to come from a part.
        processor: where the processor comes from, for models that are new: a place with a checkpoint of this family,
            or with the base language model where that is enough.
        config: fields of a new model's configuration to change.
        attention: the backend.
        train: regular expressions, matched at the start of parameter names: these train, all others are frozen.
        lora: fields of peft's LoraConfig (r, lora_alpha, lora_dropout, target_modules, modules_to_save ...), instead of
            `train`. Without target_modules these are the linear layers of the language model but its head; what is in
            modules_to_save, such as the connector, trains in full.
        lr: peak learning rate.
        min_lr: where the warm-up starts and the schedule ends.
        lr_factors: regular expression of parameter names -> factor of lr and min_lr; the first that matches counts.
        schedule: "cosine" or "linear" from lr to min_lr after the warm-up, or "constant".
        warmup_steps: optimizer steps of linear warm-up.
        warmup_ratio: instead of warmup_steps: their part of all steps.
        betas: of AdamW.
        weight_decay: of AdamW.
        no_decay: regular expressions of parameter names without weight decay.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: compile the language model with torch.compile.
        save_frozen: whether checkpoints hold the frozen parameters too, DeepSpeed's as well. Without them they are
            small, and resuming reads the frozen ones from where they came from.

    Raises:
        InputError: options that do not fit together, or an expression that matches no parameter.
        CheckpointError: weights that do not fit; each parameter that does not is listed.
        MissingExtra: peft is not installed.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = "default",
        parts: dict[str, Part] | None = None,
        fresh: list[str] | None = None,
        processor: str | None = None,
        config: dict[str, Any] | None = None,
        attention: str = "sdpa",
        train: list[str] | None = None,
        lora: dict[str, Any] | None = None,
        lr: float = 2e-5,
        min_lr: float = 0.0,
        lr_factors: dict[str, float] | None = None,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: int = 0,
        warmup_ratio: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        no_decay: list[str] | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        save_frozen: bool = True,
    ):
        super().__init__()
        if lora is not None and train is not None:
            raise InputError("Give train or lora. With lora, what trains in full is named in its modules_to_save.")
        if warmup_steps and warmup_ratio:
            raise InputError(f"Give warmup_steps ({warmup_steps}) or warmup_ratio ({warmup_ratio}), not both.")
        if not save_frozen and not parts and weights is None:
            raise InputError("save_frozen=False needs weights or parts to read frozen parameters from when resuming.")
        self.name, self.save_frozen = name, save_frozen
        self.model = assemble(name, weights, parts, fresh or [], config or {}, attention)
        if processor is not None:
            self.model.processor = read_processor(name, processor, self.model)
        self.adapted = None if lora is None else (with_lora(self.model, lora),)  # a tuple hides it from the state dict
        if lora is None:
            choose_trained(self.model, train or [".*"])
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if compile:
            self.model.language_model.compile()
        self.lr, self.min_lr, self.lr_factors, self.schedule = lr, min_lr, lr_factors or {}, schedule
        self.warmup_steps, self.warmup_ratio = warmup_steps, warmup_ratio
        self.betas, self.weight_decay, self.no_decay = tuple(betas), weight_decay, no_decay or []
        self.model.train()

    def setup(self, stage: str) -> None:
        """Tell DeepSpeed, which writes checkpoints by itself, which parameters they hold."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy) and not self.save_frozen:
            self.trainer.strategy.exclude_frozen_parameters, self.strict_loading = True, False

    def configure_model(self) -> None:
        """Shard the model under Lightning's ModelParallelStrategy (FSDP2), each decoder layer by itself."""
        if self.device_mesh is not None and not is_sharded(self.model):
            for layer in self.model.get_decoder().layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model's `forward` takes, without labels."""
        wanted = ("input_ids", "layout", "position_ids", *self.model.media_inputs)
        return {name: batch[name] for name in wanted if name in batch}

    def token_losses(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross entropy float32 [B, L] at every token, 0 where none is asked for; and bool [B, L] where one is."""
        logits = self.model(**self.inputs(batch)).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100)
        return F.pad(losses.view(labels.shape), (1, 0)), F.pad(labels != -100, (1, 0))

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        losses, asked = self.token_losses(batch)
        loss = losses.sum() / asked.sum().clamp(min=1)
        self.log("loss", loss, prog_bar=True, batch_size=len(losses))
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            for source, (one, _) in by_source(batch, losses.detach(), asked).items():
                self.log(f"loss/{source}", one, batch_size=len(losses))
        return loss

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        losses, asked = self.token_losses(batch)
        tokens = int(asked.sum())
        if tokens:
            self.log(f"{stage}_loss", losses.sum() / tokens, batch_size=tokens, prog_bar=True, sync_dist=True)
        for source, (loss, count) in by_source(batch, losses, asked).items():
            self.log(f"{stage}_loss/{source}", loss, batch_size=count)

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], _: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], _: int) -> list[dict[str, str]]:
        return answers(self.model, self.inputs(batch), batch["labels"])

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.lr, betas=self.betas)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) and (self.schedule != "constant" or self.warmup_ratio):
            raise InputError("The schedule needs to know its length. Set trainer.max_steps or trainer.max_epochs.")
        warmup = math.ceil(self.warmup_ratio * steps) if self.warmup_ratio else self.warmup_steps
        floor = self.min_lr / self.lr
        factor = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: schedule_factor(self.schedule, step, floor, warmup, steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups: parameters of one learning rate and weight decay each, in the order of their names."""
        trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        check_patterns(self.lr_factors, trained, "lr_factors")
        check_patterns(self.no_decay, trained, "no_decay")
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            factor = next((self.lr_factors[one] for one in self.lr_factors if re.match(one, name)), 1.0)
            decay = 0.0 if matches(self.no_decay, name) else self.weight_decay
            groups.setdefault((factor, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": factor * self.lr, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ]

    def trained_names(self) -> list[str]:
        """Names of the parameters that train, as they stand in a checkpoint."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trained"] = self.trained_names()
        if not self.save_frozen:
            frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
            for key in STATES:
                if key in checkpoint:
                    checkpoint[key] = {name: x for name, x in checkpoint[key].items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.save_frozen:
            own = self.state_dict()
            for key in STATES:
                if key in checkpoint:
                    checkpoint[key] = {**own, **checkpoint[key]}
        check_fits(self, checkpoint)
        if checkpoint.get("trained", self.trained_names()) != self.trained_names():
            raise CheckpointError(
                "The checkpoint was made by a run that trains other parts of the model. Resume it with its own "
                "configuration; to start a new stage from it, export it and give the folder as weights.",
                missing=set(self.trained_names()) - set(checkpoint["trained"]),
                unexpected=set(checkpoint["trained"]) - set(self.trained_names()),
            )

    def export(self, folder: str | Path) -> Path:
        """Write the model as `mmzoo.load` reads it. LoRA is merged into the weights, which ends its training.

        Call it on every process: a sharded model is put together, and the first process writes it.

        Raises:
            InputError: the model is sharded and trains with LoRA, which is merged on one process only.
        """
        if is_sharded(self.model) and self.adapted is not None:
            raise InputError(
                "LoRA is merged on one process, where the model is whole: train under FSDP2 or ZeRO's stage 3 without "
                "it, or with it under another strategy."
            )
        model = self.model if self.adapted is None else self.adapted[0].merge_and_unload()
        self.adapted = None
        state = whole_state(model) if is_sharded(model) else None
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return Path(folder)
        return hub.save(model.eval(), folder, state_dict=state)

    def export_adapter(self, folder: str | Path) -> Path:
        """Write LoRA and what trained in full beside it, as peft's `PeftModel.from_pretrained` reads it.

        Raises:
            InputError: the model trains without LoRA, or it was merged already.
        """
        if self.adapted is None:
            raise InputError("There is no adapter to write: the model was trained without lora, or it was merged.")
        if self.global_rank == 0:
            self.adapted[0].save_pretrained(folder)
        return Path(folder)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO's stage 3 holds its parameters in parts."""
    return isinstance(model, FSDPModule) or _of_zero_3(model)


def _of_zero_3(model: nn.Module) -> bool:
    return any(hasattr(one, "ds_id") for one in model.parameters())


@contextmanager
def on_all_processes(model: nn.Module) -> Iterator[None]:
    """Where all processes run parts of a sharded model together, not just its forward.

    ZeRO gathers each layer by itself. FSDP2 gathers what belongs to no decoder layer, such as tables and encoder, in
    the forward of the whole model alone.
    """
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model on the CPU; all processes call it, and the first one's is whole."""
    if not _of_zero_3(model):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    import deepspeed

    state = {name: x.detach().cpu() for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters(parameter):
            if torch.distributed.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def schedule_factor(schedule: str, step: int, floor: float, warmup: int, steps: int) -> float:
    """The part of the peak rate at an optimizer step: from `floor` up in the warm-up, then back to it or constant."""
    if schedule == "cosine" or step < warmup:
        return learning_rate(step, 1.0, floor, warmup, int(steps) if schedule == "cosine" else warmup + 1)
    if schedule == "constant":
        return 1.0
    return 1.0 - (1.0 - floor) * min(1.0, (step - warmup) / max(1, steps - warmup))


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether an expression matches the beginning of a parameter's name."""
    return any(re.match(one, name) for one in patterns)


def check_patterns(patterns: Iterable[str], names: Iterable[str], option: str) -> None:
    """Raises InputError for an expression that is none, or matches no name."""
    names = list(names)
    for one in patterns:
        try:
            found = any(re.match(one, name) for name in names)
        except re.error as error:
            raise InputError(f"{option}: {one!r} is no regular expression: {error}.") from error
        if not found:
            modules = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
            raise InputError(f"{option}: {one!r} matches no parameter. They begin with: {modules}.")


def choose_trained(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters that match train, and freeze all others. Raises InputError as `check_patterns`."""
    parameters = dict(model.named_parameters())
    check_patterns(patterns, parameters, "train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(matches(patterns, name))


def with_lora(model: MultimodalLM, options: Mapping[str, Any]) -> Any:
    """peft's model around this one, whose layers are replaced in place. Raises InputError for what peft refuses."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("peft", "train", "LoRA") from error
    head = model.get_output_embeddings()
    own = {id(one) for one in model.language_model.modules() if isinstance(one, nn.Linear) and one is not head}
    layers = [name for name, one in model.named_modules() if id(one) in own]
    try:
        return get_peft_model(model, LoraConfig(**{"target_modules": layers, **options}))
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from error


def assemble(
    name: str,
    weights: str | None,
    parts: Mapping[str, Part] | None,
    fresh: Sequence[str],
    config: Mapping[str, Any],
    attention: str,
) -> MultimodalLM:
    """The model that training starts from; see `Finetune`."""
    if fresh and not parts:
        raise InputError("fresh is for models that are made of parts.")
    if parts:
        if weights not in (None, "default"):
            raise InputError(f"Give weights ({weights!r}) or parts, not both.")
        return from_parts(name, parts, fresh, config, attention)
    if weights is None:
        return mmzoo.create(name, attention=attention, **config)
    if config:
        raise InputError("config is for new models: those with weights have their own configuration.")
    return mmzoo.load(name, weights, attention=attention)


def from_parts(
    name: str, parts: Mapping[str, Part], fresh: Sequence[str], config: Mapping[str, Any], attention: str
) -> MultimodalLM:
    """A new model whose parts have the weights of other checkpoints.

    Raises:
        InputError: the model has no such part.
        CheckpointError: a parameter that is not `fresh` is in no part, or has another shape there.
    """
    folders = {where: hub.locate(part.weights) for where, part in parts.items()}
    plan = mmzoo.create(name, device="meta", **{key: x for key, x in config.items() if key != "text_config"})
    parameters = dict(plan.named_parameters())
    for where in parts:
        if where not in parameters and where not in dict(plan.named_modules()):
            raise InputError(f"{name} has no part {where!r}; it has {', '.join(dict(plan.named_children()))}.")
        if where not in parameters and plan.get_submodule(where) is plan.language_model:
            base = AutoConfig.from_pretrained(folders[where]).to_dict()
            config = {**config, "text_config": {**base, **config.get("text_config", {})}}
    model = mmzoo.create(name, attention=attention, **config)
    wanted, missing, misshapen = model.state_dict(), set(model.state_dict()), []
    for where, part in parts.items():
        given = hub.read_tensors(folders[where])
        for own in [own for own in wanted if own == where or own.startswith(f"{where}.")]:
            there = given.get(part.prefix + own.removeprefix(where).removeprefix("."))
            if there is None:
                continue
            missing.discard(own)
            grown = matches(fresh, own) and there.shape[1:] == wanted[own].shape[1:] and len(there) < len(wanted[own])
            if there.shape == wanted[own].shape or grown:
                wanted[own][: len(there)].copy_(there) if there.dim() else wanted[own].copy_(there)
            else:
                misshapen.append((own, tuple(there.shape), tuple(wanted[own].shape)))
    missing = {own for own in missing if not matches(fresh, own)}
    if missing or misshapen:
        raise CheckpointError(
            f"The parts of {name} do not give all its parameters. What shall start at random is named in fresh.",
            missing=missing,
            misshapen=misshapen,
        )
    return model


def read_processor(name: str, place: str, model: MultimodalLM) -> MultimodalProcessor:
    """The processor in a checkpoint of the model's family, or made from the base language model's tokenizer.

    Raises:
        CheckpointError: nothing in the family can make one of what is there.
    """
    family, folder = registry.entry(name).module, hub.locate(place)
    described = hub.read_config(folder)
    if described.get("model_type") == family.MODEL.config_class.model_type:
        return family.PROCESSOR.from_pretrained(folder)
    if family.is_release(described):
        return family.read_release(folder, described)[1]
    if hasattr(family, "released_processor"):
        return family.released_processor(read_tokenizer(folder), model.config)
    raise CheckpointError(f"{place} holds no processor for {name}. Give a checkpoint of the same family.")


def check_fits(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a Lightning checkpoint is of another model; each parameter that differs is listed.

    Strategies that keep parameters in files of their own check them by themselves.
    """
    if "state_dict" not in checkpoint:
        return
    own, state = module.state_dict(), checkpoint["state_dict"]
    shapes = [(name, tuple(state[name].shape), tuple(own[name].shape)) for name in state.keys() & own.keys()]
    misshapen = [one for one in shapes if one[1] != one[2]]
    if state.keys() != own.keys() or misshapen:
        raise CheckpointError(
            f"The checkpoint is of another model than this {type(module).__name__}. Resume it with the configuration "
            "of its own run.",
            missing=own.keys() - state.keys(),
            unexpected=state.keys() - own.keys(),
            misshapen=misshapen,
        )


def by_source(batch: Mapping[str, Any], losses: Tensor, asked: Tensor) -> dict[str, tuple[float, int]]:
    """Source -> mean loss and number of the tokens [B, L] that were asked for; sources without any are left out.

    `batch["source"]` names one source a row, or one a sample, row by row.

    Raises:
        InputError: it names as many as there are neither of rows nor of samples.
    """
    sources: Sequence[str] = batch.get("source", ())
    if not sources:
        return {}
    sample = TokenLayout(batch["layout"]).sample
    rows = torch.arange(len(sample), device=sample.device)[:, None].expand_as(sample)
    if len(sources) == len(sample):
        owner = rows
    else:
        numbers, owner = (rows * (1 + int(sample.max())) + sample)[sample >= 0].unique(return_inverse=True)
        owner = torch.zeros_like(rows).masked_scatter(sample >= 0, owner)
        if len(numbers) != len(sources):
            raise InputError(
                f"source names {len(sources)}, but the batch has {len(sample)} rows and {len(numbers)} samples."
            )
    totals = losses.new_zeros(2, len(sources), dtype=torch.float64)
    totals.index_add_(1, owner.flatten(), torch.stack([losses, asked]).flatten(1).double())
    found: dict[str, list[float]] = {}
    for source, loss, count in zip(sources, *totals.tolist(), strict=True):
        known = found.setdefault(source, [0.0, 0.0])
        known[0], known[1] = known[0] + loss, known[1] + count
    return {source: (loss / count, int(count)) for source, (loss, count) in found.items() if count}


@torch.no_grad()
def answers(
    model: MultimodalLM,
    inputs: Mapping[str, Any],
    labels: Tensor,
    limit: int | None = None,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[dict[str, str]]:
    """What the model says to the samples of a batch, up to `limit`: question, answer, and the right answer of each.

    Of a conversation the first answer is asked for. Samples without a trained token are left out. `options` are those
    of `generate`.
    """
    decode = model.processor.tokenizer.decode
    said: list[dict[str, str]] = []
    for prompt, right in islice(prompts(inputs, labels), limit):
        ids = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, **options)
        words = prompt["input_ids"][0][~TokenLayout(prompt["layout"]).visual[0]]
        texts = {"question": words, "answer": ids[0, prompt["input_ids"].shape[1] :], "right": right}
        said.append({name: decode(one, skip_special_tokens=True).strip() for name, one in texts.items()})
    return said


def prompts(inputs: Mapping[str, Any], labels: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Of each sample with a trained token: inputs up to its first answer, as a batch of one, and that answer's ids."""
    layout = TokenLayout(inputs["layout"])
    for row in range(len(labels)):
        for sample in layout.sample[row].unique().tolist():
            where = (layout.sample[row] == sample).nonzero()[:, 0]
            trained = where[labels[row, where] != -100]
            if sample >= 0 and len(trained):
                turn = layout.turn[row, trained]
                prompt = _prompt(inputs, layout, row, int(where[0]), int(trained[0]))
                yield prompt, labels[row, trained[turn == turn[0]]]


def item_starts(layout: TokenLayout) -> Tensor:
    """bool [B, L]: the first token of every medium, of however many frames or windows."""
    run = layout.runs("sample", "segment")
    starts = layout.visual.clone()
    starts[:, 1:] &= run[:, 1:] != run[:, :-1]
    return starts


def _prompt(inputs: Mapping[str, Any], layout: TokenLayout, row: int, first: int, last: int) -> dict[str, Tensor]:
    """The inputs of the tokens first to last of one row alone, with their own media."""
    own = layout.data[row : row + 1, first:last]
    starts = (media_starts(layout) if inputs.get("num_frames") is None else item_starts(layout))[row]
    before, within = int(starts[:first].sum()), int(starts[first:last].sum())
    prompt = {"input_ids": inputs["input_ids"][row : row + 1, first:last], "layout": own}
    media = {
        name: x[row : row + 1] for name, x in inputs.items() if name not in ("input_ids", "layout", "position_ids")
    }
    counts = media.get("num_frames")
    for name, x in media.items() if within else ():
        if name == "pixel_values" and counts is not None:  # frames of several media in a row
            skipped, taken = int(counts[0, :before].sum()), int(counts[0, before : before + within].sum())
            prompt[name] = x[:, skipped : skipped + taken]
        else:
            prompt[name] = x[:, before : before + within]
    return prompt
