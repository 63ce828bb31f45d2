"""Learning in the synthetic world with sound, for models that see and hear.

Shape legend: C clips, T frames, R questions (rows of the language model), M mel bins, F feature frames, E events that
are seen, S sounds that are heard.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmzoo.encoders.audio import log_mel
from mmzoo.layout import TokenLayout
from mmzoo.media import Audio
from mmzoo.world import COLOURS
from mmzoo.world_sound import SECONDS, SOUND_KINDS, TONES, SoundClip, make_sound_clip
from mmzoo_training.world import ABSENT, QuestionBatches, WorldData, WorldQuestions, describe

SOUNDS = ("", *TONES, "click")
EVENTS = (*COLOURS, "hit")
"""A colour appears, or two objects run into each other."""
STREAMS = ("both", "sight", "sound")


class SoundBatches(QuestionBatches):
    """As `QuestionBatches`, of clips with their sound."""

    def clip(self, seed: int) -> Any:
        data = self.data
        return make_sound_clip(seed, split=self.split, size=data.size, num_frames=data.num_frames)  # type: ignore[arg-type]

    def described(self, clips: Sequence[Any], seed: int, frames: int = 64) -> dict[str, Tensor]:
        """Whole clips: frames uint8 [C, T, H, W, 3], looks [C, T, X] and places, features [C, M, F], heard [C, T],
        hits [C, T] and pairs [C, T, E, S]."""
        looks, places = describe([clip.clip for clip in clips], self.data.num_frames)
        return {
            "frames": torch.from_numpy(np.stack([clip.clip.frames for clip in clips])),
            "looks": looks,
            "places": places,
            "features": self.features(clips),
            "heard": heard(clips, self.data.num_frames),
            "hits": hits(clips, self.data.num_frames),
            "pairs": pairs(clips, self.data.num_frames),
        }

    def batch(self, clips: Sequence[Any], rng: random.Random, late: bool = False) -> dict[str, Any]:
        """As of the world, with features [C, M, F]."""
        chosen = [(i, question) for i, clip in enumerate(clips) for question in self.choose(clip, rng, late)]
        rows = [self.row(question) for _, question in chosen]
        ids, layouts = [one for one, _ in rows], [layout for _, layout in rows]
        collated = self.processor.collate(ids, layouts, [()] * len(rows), padding_side="right", labels=True)
        return {
            **collated,
            "frames": torch.from_numpy(np.stack([clip.clip.frames for clip in clips])),
            "features": self.features(clips),
            "owner": torch.tensor([i for i, _ in chosen]),
            "kinds": [question.kind for _, question in chosen],
        }

    def features(self, clips: Sequence[SoundClip]) -> Tensor:
        return log_mel(self.processor.feature_extractor, [Audio(clip.waveform) for clip in clips])


def heard(clips: Sequence[SoundClip], num_frames: int) -> Tensor:
    """int64 [C, T]: which of `SOUNDS` begins in each frame; "" is none."""
    found = torch.zeros(len(clips), num_frames, dtype=torch.long)
    for row, clip in zip(found, clips, strict=True):
        for sound in clip.sounds:
            row[int(sound.time * num_frames)] = SOUNDS.index(sound.name)
    return found


def hits(clips: Sequence[SoundClip], num_frames: int) -> Tensor:
    """float32 [C, T]: in which frame two objects run into each other."""
    found = torch.zeros(len(clips), num_frames)
    for row, clip in zip(found, clips, strict=True):
        for thing in clip.clip.objects:
            if thing.collides:
                row[int(thing.path[1][0] * num_frames)] = 1
    return found


def pairs(clips: Sequence[SoundClip], num_frames: int) -> Tensor:
    """float32 [C, T, E, S]: which of `EVENTS` makes which of `SOUNDS` but the first, and in which frame."""
    found = torch.zeros(len(clips), num_frames, len(EVENTS), len(SOUNDS) - 1)
    for row, clip in zip(found, clips, strict=True):
        for sound in clip.sounds:
            if sound.true:
                frame = int(sound.time * num_frames)
                row[frame, EVENTS.index(sound.source or "hit"), SOUNDS.index(sound.name) - 1] = 1
    return found


class SoundData(WorldData):
    """Clips with sound and questions about them; the arguments are `WorldData`'s."""

    def train_dataloader(self) -> QuestionBatches:
        return SoundBatches(self.processor, self, "train")

    def _fixed(self, split: str) -> DataLoader:
        return DataLoader(SoundBatches(self.processor, self, split, self.val_clips), batch_size=None)


class SoundQuestions(WorldQuestions):
    """As `WorldQuestions`, for models that see and hear.

    Args:
        name: a registered model of FAVOR's family.
        one_stream: how often a batch is only seen, and how often only heard, so that the model knows both cases.
        config, describe_steps, describe_lr, answer_steps, lr, encoder_lr, weight_decay, optimizer: as
            `WorldQuestions` takes them.
    """

    def __init__(
        self,
        name: str = "favor-nano",
        config: dict[str, Any] | None = None,
        describe_steps: int = 1000,
        describe_lr: float = 3e-3,
        answer_steps: int = 2500,
        lr: float = 1.5e-3,
        encoder_lr: float = 0.3,
        weight_decay: float = 0.01,
        optimizer: Literal["adamw", "muon"] = "adamw",
        one_stream: float = 0.1,
    ):
        super().__init__(
            name, config, describe_steps, describe_lr, answer_steps, lr, encoder_lr, weight_decay, optimizer
        )
        self.one_stream = one_stream
        # What the tokens of a frame say: which colours are there, and where, what begins, what is heard, and what of it
        # belongs together. Their mean says it, so that all say it in one way. Thrown away later.
        self.parts = (len(COLOURS), 2 * len(COLOURS), len(EVENTS), len(SOUNDS), len(EVENTS) * (len(SOUNDS) - 1))
        self.description.frame = nn.Linear(self.model.config.text_config.hidden_size, sum(self.parts))
        self.streams = "both"

    def describing_loss(self, batch: dict[str, Any]) -> Tensor:
        looks, places = batch["looks"].flatten(0, 1), batch["places"].flatten(0, 1)
        some = slice(None, None, 4)
        pixels = self.pixels(batch).flatten(0, 1)[some]
        seen = self.description.patch_loss(self.model.grid_features(pixels), looks[some], places[some])
        return seen + self.token_loss(self.model.clip_tokens(**self.clip_media(batch)), batch)

    def token_loss(self, tokens: Tensor, batch: dict[str, Any]) -> Tensor:
        """Of what the tokens [C, W, N, D] of each frame say of it."""
        by_frame = tokens.flatten(1, 2).unflatten(1, (batch["heard"].shape[1], -1)).mean(2)
        there, place, begins, sound, together = self.description.frame(by_frame).split(self.parts, -1)
        seen = batch["looks"] != ABSENT
        present = seen.float()
        appears = (present - F.pad(present, (0, 0, 1, 0))[:, :-1]).clamp(min=0)
        weight = torch.ones(len(SOUNDS), device=sound.device)
        weight[0] = 0.3
        return (
            4 * F.binary_cross_entropy_with_logits(there, present)
            + F.mse_loss(place.unflatten(-1, (-1, 2))[seen], batch["places"][seen] * 4 - 2)
            + 4 * _rare(begins, torch.cat([appears, batch["hits"][..., None]], -1))
            + F.cross_entropy(sound.flatten(0, 1), batch["heard"].flatten(), weight=weight)
            + 8 * _rare(together, batch["pairs"].flatten(2))
        )

    def clip_media(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What the model takes of every clip of a batch, as far as `self.streams` lets it see and hear."""
        pixels = self.pixels(batch)
        counts = torch.full((len(pixels), 1), pixels.shape[1], device=pixels.device)
        features = batch["features"][:, None]
        sounds = torch.full_like(counts, round(2 * SECONDS))
        return {
            "pixel_values": pixels,
            "num_frames": counts * (self.streams != "sound"),
            "input_features": features,
            "audio_frames": sounds * (self.streams != "sight"),
        }

    def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
        chance = 1.0 if "looks" in batch else random.Random(self.global_step).random()
        self.streams = "sight" if chance < self.one_stream else "sound" if chance < 2 * self.one_stream else "both"
        loss = super().training_step(batch, number)
        self.streams = "both"
        return loss

    def answers(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss, and whether each question [R] is answered in full."""
        layout = TokenLayout(batch["layout"])
        tokens = self.model.clip_tokens(**self.clip_media(batch))
        embeddings = self.model.get_input_embeddings()(batch["input_ids"])
        embeddings = self.model.place(embeddings, layout, tokens[batch["owner"]])
        outputs = self.model(inputs_embeds=embeddings, layout=layout, labels=batch["labels"])
        labels = batch["labels"][:, 1:]
        right = (outputs.logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        return outputs.loss, right.all(1)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        media = {name: one[batch["owner"]] for name, one in self.clip_media(batch).items()}
        return {"input_ids": batch["input_ids"], "layout": batch["layout"], **media}

    def _log_accuracy(self, stage: str) -> None:
        accuracy = {kind: sum(self.right[kind]) / len(self.right[kind]) for kind in SOUND_KINDS if kind in self.right}
        self.right.clear()
        self.log_dict({f"{stage}_{kind}": value for kind, value in accuracy.items()})
        self.log(f"{stage}_accuracy", sum(accuracy.values()) / len(accuracy), prog_bar=True)


def _rare(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of what seldom happens."""
    return F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.full_like(logits[0, 0], 4.0))
