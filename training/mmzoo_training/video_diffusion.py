"""Learning to go on with a clip: ViD-GPT's training, with clean frames first and the loss on the noisy ones.

Source: "ViD-GPT: Introducing GPT-style Autoregressive Generation in Video Diffusion Models", arXiv 2406.10981; the
variance's loss is that of "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672.

Shape legend: B clips, X channels, F frames, P clean frames, h, w height and width of what is denoised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import lightning
import numpy as np
import torch
from timm.optim import Muon
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mmzoo import hub
from mmzoo.errors import InputError
from mmzoo.models.vid_gpt import CONFIGS, ViDGPT, progressive
from mmzoo.world import make_bouncing_clip
from mmzoo_training.finetune import check_fits
from mmzoo_training.rollouts import continued


class Chain:
    """The noising of a scheduler of diffusers over all its timesteps, and the losses of what is said of it.

    Args:
        scheduler: of which the betas and the prediction type are read.
    """

    def __init__(self, scheduler: Any):
        self.betas = scheduler.betas.double()
        self.kept = torch.cumprod(1 - self.betas, 0)
        self.predicts = scheduler.config.prediction_type

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """[B, X, F, h, w] at timesteps int64 [B]; 0 is nearly clean."""
        kept = self.kept[t].view(-1, *[1] * (clean.dim() - 1))
        return (kept.sqrt().to(clean) * clean + (1 - kept).sqrt().to(clean) * noise).to(clean.dtype)

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the mean is compared with. Raises InputError for a prediction type that is not known here."""
        if self.predicts not in ("epsilon", "sample"):
            raise InputError(f"ViD-GPT learns to say 'epsilon' or 'sample', not {self.predicts!r}.")
        return noise if self.predicts == "epsilon" else clean

    def variance_bound(self, said: Tensor, clean: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """Bits of the variational bound at each element [B, X, F, h, w] of eps and variance said [B, 2 X, F, h, w].

        The mean is held fixed, so that the variance alone learns from it.
        """
        eps, logits = said.double().chunk(2, 1)
        eps, shape = eps.detach(), (-1, *[1] * (clean.dim() - 1))
        beta, kept = self.betas[t].view(shape), self.kept[t].view(shape)
        before = torch.where(t > 0, self.kept[(t - 1).clamp(min=0)], torch.ones_like(self.kept[t])).view(shape)
        shortest = self._posterior(t.clamp(min=1)).view(shape)
        longest, share = beta.log(), (logits + 1) / 2
        log_variance = share * longest + (1 - share) * shortest
        first = before.sqrt() * beta / (1 - kept)
        second = (1 - beta).sqrt() * (1 - before) / (1 - kept)
        guess = (noisy - (1 - kept).sqrt() * eps) / kept.sqrt()
        truth, mean = first * clean + second * noisy, first * guess + second * noisy
        apart = (truth - mean) ** 2
        bound = 0.5 * (log_variance - shortest - 1 + (shortest - log_variance).exp() + apart * (-log_variance).exp())
        at_zero = -_discretised(clean.double(), mean, log_variance / 2)
        return torch.where((t == 0).view(shape), at_zero, bound) / math.log(2)

    def _posterior(self, t: Tensor) -> Tensor:
        """Log variance of q(x[t-1] | x[t], x[0]) for t > 0."""
        return ((1 - self.kept[t - 1]) / (1 - self.kept[t]) * self.betas[t]).log()


def _discretised(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log likelihood of x, one of 256 steps from -1 to 1, under a Gaussian, by tanh's approximation to its sum."""

    def below(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))

    scale = (-log_scale).exp()
    upper, lower = below(scale * (x - mean + 1 / 255)), below(scale * (x - mean - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    ends = torch.where(x < -0.999, upper.clamp(min=1e-12).log(), (1 - lower).clamp(min=1e-12).log())
    return torch.where(x.abs() > 0.999, ends, inside)


def losses(
    model: ViDGPT,
    chain: Chain,
    clean: Tensor,
    num_prompt_frames: int,
    t: Tensor,
    noise: Tensor,
    *,
    prompt: Tensor | None = None,
    text: tuple[Tensor | None, Tensor | None] = (None, None),
    first_frame: int = 0,
) -> tuple[Tensor, Tensor]:
    """The mean's squared error and the variance's bound, each [B], over the noisy frames alone; the bound is 0 if the
    model says no variance.

    Args:
        clean: [B, X, F, h, w].
        num_prompt_frames: P.
        t: int64 [B] of the noisy frames; clean ones have 0.
        noise: [B, X, F, h, w].
        prompt: what stands for the clean frames [B, X, P, h, w]; themselves if None.
        text: features and mask.
        first_frame: number of the first frame.
    """
    rest = slice(num_prompt_frames, None)
    noisy = chain.noised(clean, noise, t)[:, :, rest]
    given = clean[:, :, :num_prompt_frames] if prompt is None else prompt
    said = model(torch.cat([given, noisy], 2), t, *text, num_prompt_frames=num_prompt_frames, first_frame=first_frame)[
        :, :, rest
    ]
    x, channels = clean[:, :, rest], clean.shape[1]
    mse = ((said[:, :channels] - chain.target(x, noise[:, :, rest])) ** 2).flatten(1).mean(1)
    if said.shape[1] == channels:
        return mse, torch.zeros_like(mse)
    return mse, chain.variance_bound(said, x, noisy, t).flatten(1).mean(1).to(mse.dtype)


class ClipBatches(IterableDataset):
    """Batch i is always the same: frames uint8 [B, F, H, W, 3] of new clips, and how many of them are clean.

    Of the endless ones the next batch is a function of how many there were, which `state_dict` holds.
    """

    EPOCH = 1_000_000

    def __init__(self, data: ClipData, split: str, batches: int | None = None):
        self.data, self.split, self.fixed = data, split, batches
        self.batches = 0

    def __len__(self) -> int:
        return self.fixed or self.EPOCH

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.fixed is not None:
            yield from map(self.batch, range(self.fixed))
            return
        for _ in range(self.EPOCH - self.batches % self.EPOCH):
            self.batches += 1
            yield self.batch(self.batches - 1)

    def batch(self, number: int) -> dict[str, Any]:
        """The clips of one batch, all as long: its clean frames, those that the model shall make, and one chunk."""
        data = self.data
        rolled = data.rolled(number) if self.split == "train" else 0
        # After one frame the model may choose a direction, and would be told that of another clip.
        clean = max(data.prompt_frames) if rolled else data.prompt_frames[number % len(data.prompt_frames)]
        length = clean + (rolled + 1) * data.chunk_frames
        seeds = range(data.first_seed + number * data.batch_size, data.first_seed + (number + 1) * data.batch_size)
        clips = [
            make_bouncing_clip(seed, split=self.split, size=data.size, num_frames=length).frames  # type: ignore[arg-type]
            for seed in seeds
        ]
        return {"frames": torch.from_numpy(np.stack(clips)), "num_prompt_frames": clean, "rolled": rolled}

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


class ClipData(lightning.LightningDataModule):
    """Clips of the world that go on for good (`mmzoo.world.make_bouncing_clip`), as the rollout meets them.

    Args:
        size: height and width.
        batch_size: B.
        chunk_frames: frames to be made, after
        prompt_frames: clean ones; each batch takes the next of these numbers in turn, 1 or 1 and whole chunks.
        first_seed: of the clips.
        validation_batches: of the fixed set.
        rolled_from: number of the batch from which on, in every second one, the clean frames are the model's own.
        rolled_chunks: the most chunks that it makes for that.
    """

    def __init__(
        self,
        size: int = 16,
        batch_size: int = 20,
        chunk_frames: int = 4,
        prompt_frames: Sequence[int] = (5, 5, 1),
        first_seed: int = 0,
        validation_batches: int = 8,
        rolled_from: int | None = None,
        rolled_chunks: int = 6,
    ):
        super().__init__()
        self.size, self.batch_size, self.chunk_frames = size, batch_size, chunk_frames
        self.prompt_frames, self.first_seed = tuple(prompt_frames), first_seed
        self.validation_batches = validation_batches
        self.rolled_from, self.rolled_chunks = rolled_from, rolled_chunks

    def rolled(self, number: int) -> int:
        """How many chunks the model makes by itself before what it learns from batch `number`."""
        if self.rolled_from is None or number < self.rolled_from or number % 2:
            return 0
        return Random(number).randint(1, self.rolled_chunks)

    def train_dataloader(self) -> ClipBatches:
        return ClipBatches(self, "train")

    def val_dataloader(self) -> DataLoader:
        return DataLoader(ClipBatches(self, "val", self.validation_batches), batch_size=None)


class VideoDiffusion(lightning.LightningModule):
    """Trains a generator of pixels on clips: the loss is on the noisy frames, the clean ones are slightly noised.

    By Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), with AdamW for what is no matrix.

    Args:
        name: of the family's configurations.
        config: fields of its configuration to change.
        lr: peak learning rate of one cycle, for Muon's updates at the scale of AdamW's.
        warmup: part of the cycle that it rises.
        perturb: highest timestep of the noise on clean frames; each clip draws its own, up to this.
        begin_drop: how often the first frame is hidden behind the "begin of video" frame.
        weight_decay: of Muon.
        rolled_steps: denoising steps of the frames that it makes for itself (`ClipData`'s `rolled_from`).
    """

    def __init__(
        self,
        name: str = "vid-gpt-nano",
        config: dict[str, Any] | None = None,
        lr: float = 2e-3,
        warmup: float = 0.1,
        perturb: int = 100,
        begin_drop: float = 0.1,
        weight_decay: float = 0.0,
        rolled_steps: int = 4,
    ):
        super().__init__()
        self.model = ViDGPT.build({**CONFIGS[name], **(config or {})}, torch.float32)
        open_gates(self.model)
        self.chain = Chain(self.model.build_scheduler())
        self.lr, self.warmup, self.perturb = lr, warmup, perturb
        self.begin_drop, self.weight_decay = begin_drop, weight_decay
        self.rolled_steps = rolled_steps

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The mean loss of a batch, with its noise, timesteps, hidden first frames and cyclic start drawn anew."""
        frames, given = batch["frames"], batch["num_prompt_frames"]
        if batch["rolled"]:
            frames = self.own(frames, given)
            given = frames.shape[1] - self.model.config.chunk_frames
        clean = frames.permute(0, 4, 1, 2, 3).to(self.device, torch.float32) / 127.5 - 1
        return drawn_loss(self.model, self.chain, clean, given, self.perturb, self.begin_drop)

    def own(self, frames: Tensor, given: int) -> Tensor:
        """The last chunk of frames uint8 [B, F, H, W, 3] behind a window of the model's own, made from the given ones.

        Such frames, with their mistakes, are what generation has before it; of true ones alone the model learns to
        trust what it sees, and a small mistake grows.
        """
        config, seed = self.model.config, int(torch.randint(2**31, ()))
        until = frames.shape[1] - config.chunk_frames
        made = continued(self.model.eval(), frames[:, :given], until, seed=seed, num_steps=self.rolled_steps)
        self.model.train()
        return torch.cat([made[:, -config.window :].to(frames), frames[:, until:]], 1)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["frames"]))
        return loss

    def validation_step(self, batch: dict[str, Any], number: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch["frames"]))

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = self.model.parameters()
        optimizer = Muon(parameters, self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.99))
        steps = max(2, int(self.trainer.estimated_stepping_batches))
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=steps, pct_start=self.warmup, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_fits(self, checkpoint)

    def export(self, folder: str | Path) -> Path:
        """Write the model as `mmzoo.load` reads it."""
        return hub.save(self.model.eval(), folder)


def open_gates(model: ViDGPT) -> None:
    """Begin with an output of zero and with open gates; those of random weights let an eighth of a layer through."""
    nn.init.zeros_(model.proj_out.weight)
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table[[2, 5]] = 1.0


def drawn_loss(
    model: ViDGPT,
    chain: Chain,
    clean: Tensor,
    num_prompt_frames: int,
    perturb: int,
    begin_drop: float,
    late: float = 1.0,
) -> Tensor:
    """The mean loss of clips [B, X, F, h, w] in training, with all that is random drawn from torch's generator.

    Args:
        late: 1 draws timesteps evenly; more, and noisy ones are drawn more often.
    """
    batch, _, count = clean.shape[:3]
    config, length = model.config, len(chain.betas)
    noise = progressive(torch.randn_like(clean), config.progressive_noise)
    # 0 is what clean frames have. Where there is more noise, frames are known from those before them alone.
    t = length - 1 - ((length - 1) * torch.rand(batch) ** late).long()
    hidden = torch.rand(batch, 1, 1, 1) < begin_drop
    clean = clean.clone()
    clean[:, :, 0] = torch.where(hidden.to(clean.device), model.begin_of_video, clean[:, :, 0])
    given = clean[:, :, :num_prompt_frames]
    if perturb:
        given = chain.noised(given, torch.randn_like(given), torch.randint(perturb + 1, (batch,)))
    full = config.temporal_positions == "cyclic" and count == config.max_frames
    start = int(torch.randint(config.max_frames, ())) if full else 0
    mse, bound = losses(model, chain, clean, num_prompt_frames, t, noise, prompt=given, first_frame=start)
    return (mse + bound).mean()
