"""Learning in the synthetic world: clips and questions as batches, and the module that learns to answer.

Shape legend: C clips, T frames, R questions (rows of the language model), L tokens, K layout fields, V tokens a frame,
D width, P patches a frame, X colours of the world.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import Muon
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import mmzoo
from mmzoo import hub
from mmzoo.errors import InputError
from mmzoo.layout import Modality, Span, TokenLayout
from mmzoo.processing import IMAGE, MultimodalProcessor
from mmzoo.world import COLOURS, QUESTION_KINDS, SHAPES, Clip, Question, make_clip
from mmzoo_training.finetune import answers, check_fits

OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}
ABSENT = 0
_COLOURS, _SHAPES = tuple(COLOURS), tuple(SHAPES)


EPOCH = 1_000_000
"""Batches of new clips that count as an epoch: Lightning has to know where one ends, or it fetches a batch ahead."""


class QuestionBatches(IterableDataset):
    """Endless batches of new clips, first frames to describe and then questions; or a fixed set of questions.

    Clip i is always the same, and so is batch i: of the endless ones the next batch is a function of how many there
    were, and `state_dict` holds that number.
    """

    def __init__(self, processor: MultimodalProcessor, data: WorldData, split: str, clips: int | None = None):
        self.processor, self.data, self.split, self.clips = processor, data, split, clips
        self.batches = 0
        self.spans = processor.spans(torch.zeros(data.num_frames, 3, data.size, data.size), Modality.VIDEO)
        self._layouts: dict[tuple[int, ...], tuple[list[int], TokenLayout]] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.clips is not None:
            yield from map(self.questions, range(len(self)))
            return
        for _ in range(EPOCH - self.batches % EPOCH):
            self.batches += 1
            yield self.new(self.batches - 1)

    def new(self, number: int) -> dict[str, Any]:
        """Batch `number` of the endless ones."""
        data = self.data
        if number >= data.describe_steps:
            return self.questions(number - data.describe_steps, data.describe_steps * data.describe_clips)
        first = number * data.describe_clips
        return self.described([self.clip(first + i) for i in range(data.describe_clips)], number)

    def questions(self, number: int, skipped: int = 0) -> dict[str, Any]:
        """Batch `number` of questions, after clips that were only described."""
        first = skipped + number * self.data.batch_size
        clips = [self.clip(first + i) for i in range(self.data.batch_size)]
        return self.batch(clips, random.Random(first), late=self.clips is None and number >= self.data.late_from)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]

    def described(self, clips: Sequence[Clip], seed: int, frames: int = 64) -> dict[str, Tensor]:
        """Some frames of the clips, drawn at random: frames uint8 [N, H, W, 3], looks [N, X], places [N, X, 2]."""
        looks, places = describe(clips, self.data.num_frames)
        every = np.concatenate([clip.frames for clip in clips])
        some = np.random.default_rng(seed).permutation(len(every))[:frames]
        return {
            "frames": torch.from_numpy(every[some]),
            "looks": looks.flatten(0, 1)[some],
            "places": places.flatten(0, 1)[some],
        }

    def __len__(self) -> int:
        return EPOCH if self.clips is None else math.ceil(self.clips / self.data.batch_size)

    def clip(self, seed: int) -> Clip:
        return make_clip(seed, split=self.split, size=self.data.size, num_frames=self.data.num_frames)

    def batch(self, clips: Sequence[Clip], rng: random.Random, late: bool = False) -> dict[str, Any]:
        """frames uint8 [C, T, H, W, 3]; owner [R]; input_ids, labels [R, L]; layout [R, L, K]; kinds of questions."""
        chosen = [(i, question) for i, clip in enumerate(clips) for question in self.choose(clip, rng, late)]
        rows = [self.row(question) for _, question in chosen]
        collated = self.processor.collate(
            [ids for ids, _ in rows],
            [layout for _, layout in rows],
            [()] * len(rows),
            padding_side="right",
            labels=True,
        )
        return {
            **collated,
            "frames": torch.from_numpy(np.stack([clip.frames for clip in clips])),
            "owner": torch.tensor([i for i, _ in chosen]),
            "kinds": [question.kind for _, question in chosen],
        }

    def choose(self, clip: Clip, rng: random.Random, late: bool = False) -> list[Question]:
        """All questions of a fixed set; some of a training clip, rare kinds and weighted kinds first."""
        if self.clips is not None:
            return list(clip.questions)
        kinds = [question.kind for question in clip.questions]
        weights = self.data.late_question_weights if late else self.data.question_weights
        key = [rng.random() ** (kinds.count(kind) / weights.get(kind, 1.0)) for kind in kinds]
        order = sorted(range(len(key)), key=key.__getitem__, reverse=True)
        return [clip.questions[i] for i in order[: self.data.questions_per_clip]]

    def row(self, question: Question) -> tuple[list[int], TokenLayout]:
        """Ids with a place for every visual token, and their layout; layouts of the same shape are made once."""
        text = self.processor.prompt(question.text, IMAGE * len(self.spans)) + question.answer
        tokens = self.processor.tokenizer(text)["input_ids"] + [self.processor.tokenizer.eos_token_id]
        markers = set(self.processor.tokenizer.get_added_vocab().values())
        shape = tuple(token if token in markers else -1 for token in tokens)
        if shape not in self._layouts:
            self._layouts[shape] = self.processor.lay_out(tokens, self.spans)
        template, layout = self._layouts[shape]
        words = iter([token for token in tokens if token not in markers])
        return [token if token in markers else next(words) for token in template], layout


class WorldData(lightning.LightningDataModule):
    """Clips and questions of the synthetic world.

    Args:
        model_name: whose processor lays the questions out.
        batch_size: clips of a batch of questions; the validation set is rounded up to whole batches.
        describe_steps: batches of frames to describe before the questions start.
        describe_clips: clips that the frames of such a batch are drawn from.
        questions_per_clip: questions of a clip in training; its visual tokens are made once for all of them.
        question_weights: how much more often a kind is asked than the others.
        late_question_weights: the same from the batch of questions number `late_from` on.
        size: pixels of a frame's side.
        num_frames: frames of a clip.
        val_clips: clips of the validation set, and of the test set.
    """

    def __init__(
        self,
        model_name: str = "aki-nano",
        batch_size: int = 12,
        describe_steps: int = 3500,
        describe_clips: int = 24,
        questions_per_clip: int = 4,
        question_weights: Mapping[str, float] | None = None,
        late_question_weights: Mapping[str, float] | None = None,
        late_from: int = 10**9,
        size: int = 32,
        num_frames: int = 8,
        val_clips: int = 120,
    ):
        super().__init__()
        self.model_name, self.batch_size, self.questions_per_clip = model_name, batch_size, questions_per_clip
        self.question_weights, self.late_question_weights = question_weights or {}, late_question_weights or {}
        self.late_from = late_from
        self.describe_steps, self.describe_clips = describe_steps, describe_clips
        self.size, self.num_frames, self.val_clips = size, num_frames, val_clips

    @property
    def processor(self) -> MultimodalProcessor:
        model = self.trainer.lightning_module.model if self.trainer is not None else mmzoo.create(self.model_name)
        return model.processor

    def train_dataloader(self) -> QuestionBatches:
        return QuestionBatches(self.processor, self, "train")

    def val_dataloader(self) -> DataLoader:
        return self._fixed("val")

    def test_dataloader(self) -> DataLoader:
        return self._fixed("test")

    def predict_dataloader(self) -> DataLoader:
        return self._fixed("test")

    def _fixed(self, split: str) -> DataLoader:
        return DataLoader(QuestionBatches(self.processor, self, split, self.val_clips), batch_size=None)


def describe(clips: Sequence[Clip], num_frames: int) -> tuple[Tensor, Tensor]:
    """What every frame shows: looks int64 [C, T, X] (0 absent, else 1 + shape) and places float32 [C, T, X, 2]."""
    times = (np.arange(num_frames) + 0.5) / num_frames
    looks = np.zeros((len(clips), num_frames, len(_COLOURS)), np.int64)
    places = np.zeros((*looks.shape, 2), np.float32)
    for c, clip in enumerate(clips):
        for thing in clip.objects:
            colour = _COLOURS.index(thing.colour)
            seen = (times > thing.appear) & (times < thing.disappear)
            looks[c, seen, colour] = 1 + _SHAPES.index(thing.shape)
            places[c, :, colour] = np.stack(thing.at(times), -1)
    return torch.from_numpy(looks), torch.from_numpy(places)


class FrameDescription(nn.Module):
    """Heads that make encoder and connector see before they are asked: thrown away after the first stage.

    Each patch says which colour and shape has its centre there. Tokens say shape and place of the colours: each of
    those that stand on a grid of what is in its cell, and otherwise, where they are a multiple of the colours, each of
    one colour. The place is said twice, in numbers and in bins: bins make it large enough in the tokens for the
    language model to tell directions.

    Args:
        width: of the patches.
        token_width: D.
        span: the tokens of one frame.
        side: of the square grid that the tokens stand on, where the span does not say it.
    """

    BINS = 8
    PARTS = (1 + len(_SHAPES), 2, 2 * BINS)
    """What a token says of a colour: which shape it has there, if any, and its place in numbers and in bins."""

    def __init__(self, width: int, token_width: int, span: Span, side: int | None = None):
        super().__init__()
        if side is not None and side**2 != len(span):
            raise InputError(f"A frame has {len(span)} tokens, which do not stand on a grid of {side} x {side}.")
        self.grid = (side, side) if side else (span.rows, span.columns) if span.grid else None
        self.patch = nn.Linear(width, 1 + len(_COLOURS) + 1 + len(_SHAPES))
        by_colour = len(span) % len(_COLOURS) == 0
        colours = len(_COLOURS) if self.grid else 1 if by_colour else 0
        self.token = nn.Linear(token_width, colours * sum(self.PARTS)) if colours else None

    def loss(self, patches: Tensor, tokens: Tensor, looks: Tensor, places: Tensor) -> Tensor:
        """From patches [N, P, D], tokens [N, V, D], looks [N, X] and places [N, X, 2] of N frames."""
        loss = self.patch_loss(patches, looks, places)
        return loss if self.token is None else loss + self.token_loss(self.token(tokens), looks, places)

    def patch_loss(self, patches: Tensor, looks: Tensor, places: Tensor) -> Tensor:
        side = math.isqrt(patches.shape[1])
        frame, colour = (looks != ABSENT).nonzero(as_tuple=True)
        at = (frame, _cells(places, side, side)[frame, colour])
        patch_colour = looks.new_zeros(patches.shape[:2]).index_put(at, colour + 1)
        patch_shape = looks.new_zeros(patches.shape[:2]).index_put(at, looks[frame, colour])
        said_colour, said_shape = self.patch(patches).split((1 + len(_COLOURS), 1 + len(_SHAPES)), -1)
        return _rare_classes(said_colour, patch_colour, 0.2) + _rare_classes(said_shape, patch_shape, 0.2)

    def token_loss(self, said: Tensor, looks: Tensor, places: Tensor) -> Tensor:
        """Of what the tokens say [N, V, ...]."""
        if self.grid:
            said = said.unflatten(-1, (len(_COLOURS), -1)).transpose(1, 2)  # [N, X, V, ...]
            cells = _cells(places, *self.grid)
            here = torch.arange(said.shape[2], device=said.device) == cells[..., None]
            looks, places = looks[..., None] * here, places[:, :, None].expand(-1, -1, said.shape[2], -1)
        else:
            said = said.unflatten(1, (-1, len(_COLOURS)))  # [N, V / X, X, ...]
            looks, places = (x[:, None].expand(-1, said.shape[1], *[-1] * (x.dim() - 1)) for x in (looks, places))
        seen = looks != ABSENT
        said_look, said_place, said_bins = said.split(self.PARTS, -1)
        bins = (places[seen] * self.BINS).long().clamp(0, self.BINS - 1)
        return (
            _rare_classes(said_look, looks, 0.1 if self.grid else 0.5)
            + F.mse_loss(said_place[seen], places[seen] * 4 - 2)
            + 2 * F.cross_entropy(said_bins[seen].unflatten(-1, (2, self.BINS)).flatten(0, 1), bins.flatten())
        )


def _cells(places: Tensor, rows: int, columns: int) -> Tensor:
    """int64 [N, X]: the cell, in raster order, of a grid in which each place [N, X, 2] lies."""
    sides = torch.tensor([columns, rows], device=places.device)
    column, row = (places * sides).long().clamp(min=0).minimum(sides - 1).unbind(-1)
    return row * columns + column


def _rare_classes(logits: Tensor, target: Tensor, weight_of_none: float) -> Tensor:
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = weight_of_none
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight=weight)


class WorldQuestions(lightning.LightningModule):
    """Trains a model of the zoo on the world's questions.

    First the encoder and the connector learn to describe single frames, then the whole model learns to answer. A
    clip's visual tokens are made once and serve all its questions.

    Args:
        name: a registered model.
        config: fields of its configuration to change, such as `connector: linear`.
        describe_steps: steps of the first stage.
        describe_lr: peak learning rate of the first stage.
        answer_steps: steps of the second stage; the trainer's max_steps is the sum of both.
        lr: peak learning rate of the second stage.
        encoder_lr: the encoder's and connector's part of `lr`.
        weight_decay: of the optimizer.
        optimizer: "adamw", or "muon" (with AdamW for what is no matrix), whose updates have AdamW's scale.
        token_grid: side of the grid that a frame's tokens stand on, for a family whose layout does not say it.
        blind: hide the pixels, as the text-only baseline.
    """

    def __init__(
        self,
        name: str = "aki-nano",
        config: dict[str, Any] | None = None,
        describe_steps: int = 1000,
        describe_lr: float = 3e-3,
        answer_steps: int = 2500,
        lr: float = 1.5e-3,
        encoder_lr: float = 0.3,
        weight_decay: float = 0.01,
        optimizer: Literal["adamw", "muon"] = "adamw",
        token_grid: int | None = None,
        blind: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.model = mmzoo.create(name, **(config or {})).train()
        self.blind = blind
        processor, config = self.model.processor, self.model.config
        side = config.vision_config.image_size
        self.description = FrameDescription(
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            processor.spans(torch.zeros(1, 3, side, side), Modality.IMAGE)[0],
            token_grid,
        )
        for name in ("image_mean", "image_std"):
            value = torch.tensor(getattr(processor.image_processor, name))[:, None, None]
            self.register_buffer(name, value, persistent=False)
        self.right: dict[str, list[bool]] = {}

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        describing = "looks" in batch
        loss = self.describing_loss(batch) if describing else self.answers(batch)[0]
        self.log("describe_loss" if describing else "answer_loss", loss, prog_bar=True)
        return loss

    def pixels(self, batch: dict[str, Any]) -> Tensor:
        """float32 [..., 3, H, W] of all frames, as the processor normalises them."""
        pixels = (batch["frames"].movedim(-1, -3).float() / 255 - self.image_mean) / self.image_std
        return torch.zeros_like(pixels) if self.blind else pixels

    def describing_loss(self, batch: dict[str, Any]) -> Tensor:
        pixels = self.pixels(batch)
        patches, tokens = self.model.grid_features(pixels), self.model.visual_tokens(pixels)
        return self.description.loss(patches, tokens, batch["looks"], batch["places"])

    def answers(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss, and whether each question [R] is answered in full."""
        layout = TokenLayout(batch["layout"])
        tokens = self.model.clip_tokens(self.pixels(batch))
        embeddings = self.model.get_input_embeddings()(batch["input_ids"])
        embeddings = self.model.place(embeddings, layout, tokens[batch["owner"]])
        outputs = self.model(inputs_embeds=embeddings, layout=layout, labels=batch["labels"])
        labels = batch["labels"][:, 1:]
        right = (outputs.logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        return outputs.loss, right.all(1)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the model's `forward` takes of a batch of questions, each with the frames of its own clip."""
        pixels = self.pixels(batch)[batch["owner"]]
        media = {"pixel_values": pixels}
        if "num_frames" in self.model.media_inputs:
            media["num_frames"] = torch.full((len(pixels), 1), pixels.shape[1], device=pixels.device)
        return {"input_ids": batch["input_ids"], "layout": batch["layout"], **media}

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        loss, right = self.answers(batch)
        self.log(f"{stage}_loss", loss, batch_size=len(right))
        for kind, one in zip(batch["kinds"], right.tolist(), strict=True):
            self.right.setdefault(kind, []).append(one)

    def _log_accuracy(self, stage: str) -> None:
        accuracy = {
            kind: sum(self.right[kind]) / len(self.right[kind]) for kind in QUESTION_KINDS if kind in self.right
        }
        self.right.clear()
        self.log_dict({f"{stage}_{kind}": value for kind, value in accuracy.items()})
        self.log(f"{stage}_accuracy", sum(accuracy.values()) / len(accuracy), prog_bar=True)

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._log_accuracy("val")

    def test_step(self, batch: dict[str, Any], _: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._log_accuracy("test")

    def predict_step(self, batch: dict[str, Any], _: int) -> list[dict[str, str]]:
        return answers(self.model, self.inputs(batch), batch["labels"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(self, checkpoint)

    def export(self, folder: str | Path) -> Path:
        """Write the model, without its training heads, as `mmzoo.load` reads it; the first process does."""
        return hub.save(self.model.eval(), folder) if self.global_rank == 0 else Path(folder)

    def configure_optimizers(self) -> dict[str, Any]:
        language = list(self.model.language_model.parameters())
        known = {id(parameter) for parameter in language}
        groups = {
            "seeing": [parameter for parameter in self.model.parameters() if id(parameter) not in known],
            "language": language,
            "description": list(self.description.parameters()),
        }
        options = self.hparams
        optimizer = OPTIMIZERS[options.optimizer](
            [{"params": parameters} for parameters in groups.values()],
            lr=1.0,
            betas=(0.9, 0.98),
            weight_decay=options.weight_decay,
        )

        def first(step: int) -> float:
            return options.describe_lr * warm_cosine(step, options.describe_steps)

        def second(step: int) -> float:
            return options.lr * warm_cosine(step - options.describe_steps, options.answer_steps)

        def seeing_lr(step: int) -> float:
            return first(step) if step < options.describe_steps else options.encoder_lr * second(step)

        def language_lr(step: int) -> float:
            return 0.0 if step < options.describe_steps else second(step)

        def description_lr(step: int) -> float:
            return first(step) if step < options.describe_steps else 0.0

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [seeing_lr, language_lr, description_lr])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warm_cosine(step: int, steps: int, warm: float = 0.05, end: float = 0.02) -> float:
    """0 to 1 over the first part of the steps, while half a cosine falls to `end`."""
    done = min(1.0, step / max(1, steps))
    return min(1.0, done / warm) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done)))
