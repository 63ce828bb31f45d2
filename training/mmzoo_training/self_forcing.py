"""Self-forcing: a causal generator learns from what it makes itself, by distribution matching with two score models.

Source: "LongLive: Real-time Interactive Long Video Generation", arXiv 2509.22622, and "Self Forcing: Bridging the
Train-Test Gap in Autoregressive Video Diffusion", arXiv 2506.08009; formulas of the authors' code.

Shape legend: B clips, X channels of the latents, F frames, H, W height and width of the latents, L text tokens, E their
width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchLCMScheduler, WanTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import default_collate

import mmzoo
from mmzoo.errors import CheckpointError, DatasetError, InputError, MissingExtra
from mmzoo.models.longlive import LongLive, Stream, StreamingDecoder, moments
from mmzoo_training.finetune import is_sharded


class FlowSchedule:
    """Flow matching with 1000 timesteps: x_t = (1 - sigma) x + sigma noise; the flow is noise - x.

    Attributes:
        sigmas: float32 [1000], from 1 down; u = 1, 0.999 ... 0.001 shifted: shift u / (1 + (shift - 1) u).
        timesteps: float32 [1000], 1000 sigmas.
    """

    def __init__(self, shift: float = 5.0):
        scheduler = FlowMatchLCMScheduler(shift=shift)
        self.sigmas, self.timesteps = scheduler.sigmas, scheduler.timesteps

    def sigma(self, timestep: Tensor, like: Tensor) -> Tensor:
        """Of the nearest timestep of the schedule; for timestep [B] or [B, F], in a shape that fits `like`."""
        nearest = (self.timesteps.to(timestep.device) - timestep[..., None]).abs().argmin(-1)
        found = self.sigmas.to(timestep.device)[nearest].to(like.device)
        found = found[:, None, :] if found.dim() == 2 else found  # beside the channels
        return found.view(*found.shape, *[1] * (like.dim() - found.dim()))

    def add_noise(self, x: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """x_t [B, X, F, H, W]."""
        sigma = self.sigma(timestep, x)
        return ((1 - sigma) * x + sigma * noise).type_as(x)

    def clean(self, x_t: Tensor, flow: Tensor, timestep: Tensor) -> Tensor:
        """x0 = x_t - sigma flow."""
        return (x_t.double() - self.sigma(timestep, x_t).double() * flow.double()).type_as(flow)

    def flow(self, x_t: Tensor, x0: Tensor, timestep: Tensor) -> Tensor:
        """The inverse of `clean`."""
        return ((x_t.double() - x0.double()) / self.sigma(timestep, x_t).double()).type_as(x0)

    def training_weights(self) -> Tensor:
        """float32 [1000], mean 1: a bell around timestep 500. The authors' schedule has them, their losses do not."""
        bell = torch.exp(-2 * ((self.timesteps - 500) / 1000) ** 2)
        bell = bell - bell.min()
        return bell / bell.mean()


def sampled_timesteps(count: int, shift: float, random: torch.Generator | None = None) -> Tensor:
    """float32 [count]: whole numbers of [0, 1000), shifted, and kept in [20, 980]."""
    u = torch.randint(0, 1000, (count,), generator=random) / 1000
    return (1000 * shift * u / (1 + (shift - 1) * u)).clamp(20, 980)


def matching_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """(fake - real) / mean |x - real|, the mean over each clip; what both scores think x is, [B, X, F, H, W]."""
    return (fake - real) / (x - real).abs().mean((1, 2, 3, 4), keepdim=True)


def matching_loss(x: Tensor, gradient: Tensor, counted: Tensor) -> Tensor:
    """0.5 mean (x - stopgrad(x - gradient))^2 over the frames that bool [F] names: its gradient there is `gradient`."""
    target = (x - gradient).detach()
    return 0.5 * F.mse_loss(x.double()[:, :, counted], target.double()[:, :, counted])


def self_forced(
    stream: Stream, noise: Tensor, exit_step: int, random: torch.Generator | None, gradient: bool = True
) -> Tensor:
    """What a stream makes of noise [B, X, F, H, W], F of whole blocks, as x0 after the same step in every block.

    Only that step has gradients. The cache is written without, by a clean pass over what came out.
    """
    scheduler, made = stream.model.build_scheduler(), []
    timestep, sigma = scheduler.timesteps[exit_step], float(scheduler.sigmas[exit_step])
    for block in noise.split(stream.model.config.frames_per_block, 2):
        x = stream.denoise(block, random, exit_step)
        with torch.set_grad_enabled(gradient):
            x = x - sigma * stream.flow(x, timestep, write=False)
        stream.keep(x.detach())
        made.append(x)
    return torch.cat(made, 2)


@torch.no_grad()
def image_latent(model: LongLive, latents: Tensor) -> Tensor:
    """The last of latents [B, X, F, H, W] as an image that begins a clip has it, [B, X, 1, H, W].

    A first frame is encoded alone, others in fours; so the last pixels are decoded, and encoded by themselves.
    """
    if not model.decodes:
        return latents[:, :, -1:]
    vae = model.part("vae")
    pixels = StreamingDecoder(vae)(latents)[:, :, -1:]
    mean, deviation = moments(vae, latents)
    return ((vae.encode(pixels).latent_dist.mode() - mean) / deviation).type_as(latents)


class SelfForcing(lightning.LightningModule):
    """Trains LongLive, or any causal Wan, by distribution matching on its own rollouts.

    With `max_frames` as long as a chunk every step makes new clips ("init" in the paper). With more it is streaming
    long tuning: clips and their caches live on from step to step, each adds `new_frames`, the loss is over the last
    `chunk_frames`, and the prompt changes once, where a chunk begins. One chunk serves both models in a step.

    A stream is part of the checkpoint of a run on one process, which resumes exactly; on several, a resumed run begins
    new clips.

    Args:
        name: a registered model of this kind.
        weights: "default", a place, or null for random ones.
        real_score: the frozen teacher: the place of a pipeline of diffusers' Wan, or fields of one with random weights.
        fake_score: the model that follows the generator; as real_score.
        negative_prompt: for the teacher, unless batches have one.
        guidance: s in cond + s (cond - uncond), of the teacher's x0.
        chunk_frames: frames of latents in the loss, and of a clip's first chunk.
        new_frames: frames of later chunks.
        max_frames: where clips end.
        cache_frames: frames in the cache; those of the model's window if None. The authors' training cache holds 33.
        recache_frames: frames that pass again at a change of prompt; those of the cache if None. In the authors'
            training 21, in their generation 12.
        global_sink: whether the sink outlives a change of prompt. In the authors' training it never does.
        lora: fields of peft's LoraConfig for both models that train, on every linear layer of their blocks.
        lr: the generator's learning rate.
        critic_lr: the fake score's.
        generator_every: steps of the fake score for one of the generator.
        betas: of AdamW.
        weight_decay: of AdamW.
        gradient_clip: largest norm of a model's gradient.
        ema: decay of an average of the generator's weights, which is then exported; None for none.
        ema_from: the step from which on it is one; before, it is a copy.
        gradient_checkpointing: compute activations again in the backward pass.
        seed: of noise and choices, with the step and the process.
    """

    def __init__(
        self,
        name: str,
        real_score: str | dict[str, Any],
        fake_score: str | dict[str, Any],
        weights: str | None = "default",
        negative_prompt: str = "",
        guidance: float = 3.0,
        chunk_frames: int = 21,
        new_frames: int = 18,
        max_frames: int = 240,
        cache_frames: int | None = None,
        recache_frames: int | None = None,
        global_sink: bool = True,
        lora: dict[str, Any] | None = None,
        lr: float = 1e-5,
        critic_lr: float = 2e-6,
        generator_every: int = 5,
        betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 0.01,
        gradient_clip: float = 10.0,
        ema: float | None = None,
        ema_from: int = 200,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if ema is not None and lora is not None:
            raise InputError("An average of the weights is not kept beside LoRA: give ema or lora.")
        self.automatic_optimization = False
        self.generator: LongLive = mmzoo.load(name, weights)
        block = self.generator.config.frames_per_block
        if chunk_frames % block or new_frames % block or not 0 < new_frames <= chunk_frames <= max_frames:
            raise InputError(
                f"Chunks are whole blocks of {block} frames, and new_frames <= chunk_frames <= max_frames; not "
                f"{new_frames}, {chunk_frames} and {max_frames}."
            )
        self.real, self.fake = (build_score(one) for one in (real_score, fake_score))
        self.real.requires_grad_(False)
        self.keeps_real = not isinstance(real_score, str)
        self.generator.train()
        for model in (self.generator, self.fake):
            if lora is not None:
                add_lora(model, lora)
            if gradient_checkpointing:
                model.enable_gradient_checkpointing()
        self.average = None if ema is None else copy.deepcopy(self.generator).requires_grad_(False)
        self.lora, self.ema, self.ema_from, self.seed = lora, ema, ema_from, seed
        self.negative_prompt, self.guidance = negative_prompt, guidance
        self.chunk_frames, self.new_frames, self.max_frames = chunk_frames, new_frames, max_frames
        self.stream_options = {"window": cache_frames, "recache_frames": recache_frames, "global_sink": global_sink}
        self.lr, self.critic_lr, self.generator_every = lr, critic_lr, generator_every
        self.betas, self.weight_decay, self.gradient_clip = tuple(betas), weight_decay, gradient_clip
        self.schedule = FlowSchedule(self.generator.config.timestep_shift)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.stream: Stream | None = None
        self._resumed: dict[str, Any] | None = None

    def configure_model(self) -> None:
        """Shard the three models under Lightning's ModelParallelStrategy (FSDP2), each block by itself."""
        if self.device_mesh is None or is_sharded(self.generator):
            return
        for model in filter(None, (self.generator, self.fake, self.real, self.average)):
            for block in model.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(model, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW(
                [one for one in model.parameters() if one.requires_grad],
                lr=lr,
                betas=self.betas,
                weight_decay=self.weight_decay,
            )
            for model, lr in ((self.generator, self.lr), (self.fake, self.critic_lr))
        ]

    def random(self, *what: int) -> torch.Generator:
        """The source of noise or choices of this step; the same for a resumed run."""
        seeds = np.random.SeedSequence([self.seed, int(self.iteration), *what])
        return torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))

    def training_step(self, batch: dict[str, Any], _: int) -> None:
        generator_optimizer, critic_optimizer = self.optimizers()
        random = self.random(1, self.global_rank)
        turn = int(self.iteration) % self.generator_every == 0
        chunk, counted = self.next_chunk(batch, random, turn)
        if turn:
            loss = self.generator_loss(chunk, counted, batch, random)
            self._step(generator_optimizer, self.generator, loss)
            self.log("generator_loss", loss, prog_bar=True, batch_size=len(chunk))
        loss = self.critic_loss(chunk.detach(), random)
        self._step(critic_optimizer, self.fake, loss)
        self.log("critic_loss", loss, prog_bar=True, batch_size=len(chunk))
        if turn and self.average is not None:
            self._average()
        self.iteration += 1

    def _step(self, optimizer: Any, model: torch.nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.gradient_clip)
        optimizer.step()

    @torch.no_grad()
    def _average(self) -> None:
        decay = self.ema if int(self.iteration) >= self.ema_from else 0.0
        for kept, new in zip(self.average.parameters(), self.generator.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)

    def next_chunk(self, batch: Mapping[str, Any], random: torch.Generator, gradient: bool) -> tuple[Tensor, Tensor]:
        """The last `chunk_frames` frames [B, X, F, H, W] after the next have been made; bool [F], which are new."""
        # Processes that shard a model must run it equally often: what decides that is drawn alike on all of them.
        shared = self.random(0)
        if self._resumed is not None:
            self._go_on(self._resumed)
        if self.stream is None or self.stream.frame + self.new_frames > self.max_frames:
            self._begin(batch, shared)
        assert self.stream is not None
        self.stream.cache.drop_text()  # made by weights that have changed
        if self.stream.frame == self.switch_frame:
            self.stream.switch(self.later_prompts)
        new = self.new_frames if self.stream.frame else self.chunk_frames
        noise = torch.cat([self.stream.noise(random) for _ in range(new // self.generator.config.frames_per_block)], 2)
        exit_step = int(torch.randint(0, len(self.generator.config.denoising_steps), (), generator=shared))
        made = self_forced(self.stream, noise, exit_step, random, gradient)
        kept = self.chunk_frames - new
        if kept:  # a chunk begins with an image, as a clip does
            first = new + 1
            image = image_latent(self.generator, self.chunk[:, :, :first])
            made = torch.cat([image, self.chunk[:, :, first:], made], 2)
        self.chunk = made.detach()
        return made, torch.arange(self.chunk_frames, device=made.device) >= kept

    def _begin(self, batch: Mapping[str, Any], shared: torch.Generator) -> None:
        """New clips, and where their prompt changes; clips of one chunk keep theirs."""
        prompts, self.later_prompts = (
            self.generator.encode_prompts(batch[name]) for name in ("prompt", "switch_prompt")
        )
        self.stream = Stream(self.generator, prompts, **self.stream_options)
        places = range(self.chunk_frames, self.max_frames - self.chunk_frames, self.new_frames)
        chosen = int(torch.randint(0, max(1, len(places)), (), generator=shared))
        self.switch_frame = places[chosen] if places else -1

    def noised(self, x: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, the noise in it, and t [B], one of each clip."""
        noise = randn_tensor(x.shape, random, device=x.device, dtype=x.dtype)
        timestep = sampled_timesteps(len(x), self.generator.config.timestep_shift, random).to(x.device)
        return self.schedule.add_noise(x, noise, timestep), noise, timestep

    def generator_loss(
        self, chunk: Tensor, counted: Tensor, batch: Mapping[str, Any], random: torch.Generator
    ) -> Tensor:
        """Distribution matching, under the prompts that hold now."""
        assert self.stream is not None
        prompts = self.stream.prompts
        with torch.no_grad():
            negative = self.generator.encode_prompts(batch.get("negative_prompt", self.negative_prompt))
            x_t, _, timestep = self.noised(chunk.detach(), random)
            fake, real, plain = (
                self.schedule.clean(x_t, score(model, x_t, timestep, text), timestep)
                for model, text in ((self.fake, prompts), (self.real, prompts), (self.real, negative))
            )
            gradient = matching_gradient(chunk, fake, real + self.guidance * (real - plain))
        return matching_loss(chunk, gradient, counted)

    def critic_loss(self, chunk: Tensor, random: torch.Generator) -> Tensor:
        """Flow matching of the fake score on what the generator made."""
        assert self.stream is not None
        x_t, noise, timestep = self.noised(chunk, random)
        flow = score(self.fake, x_t, timestep, self.stream.prompts)
        return F.mse_loss(flow.float(), (noise - chunk).float())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.keeps_real:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: x for name, x in state.items() if not name.startswith("real.")}
        if self.stream is not None and self.trainer.world_size == 1:
            held = {"stream": self.stream.state_dict(), "chunk": self.chunk, "later_prompts": self.later_prompts}
            checkpoint["clips"] = {**held, "switch_frame": self.switch_frame}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self.keeps_real:
            own = {f"real.{name}": x for name, x in self.real.state_dict().items()}
            checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}
        self._resumed = checkpoint.get("clips")

    def _go_on(self, held: Mapping[str, Any]) -> None:
        """Take up the clips of a checkpoint."""
        prompts = held["stream"]["prompts"].to(self.device)
        self.stream = Stream(self.generator, prompts, **self.stream_options)
        self.stream.load_state_dict(held["stream"])
        self.chunk, self.later_prompts = (held[name].to(self.device) for name in ("chunk", "later_prompts"))
        self.switch_frame, self._resumed = int(held["switch_frame"]), None

    def export(self, folder: str | Path) -> Path:
        """Write the generator, or the average of its weights, as diffusers does. Merging LoRA ends its training.

        Raises:
            InputError: LoRA in a sharded model, which is merged on one process only.
        """
        model = self.generator if self.average is None else self.average
        if self.lora is not None:
            if is_sharded(model):
                raise InputError("LoRA is merged on one process: resume the checkpoint without ModelParallelStrategy.")
            model.fuse_lora()
            model.unload_lora()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options) if is_sharded(model) else None
        if self.global_rank == 0:
            if state is not None:
                whole = LongLive.from_config(model.config)
                whole.load_state_dict(state)
                model = whole
            model.save_pretrained(folder)
        return Path(folder)


def score(model: WanTransformer3DModel, x: Tensor, timestep: Tensor, prompts: Tensor) -> Tensor:
    """The flow [B, X, F, H, W] that a bidirectional Wan sees in x; one prompt may serve all clips."""
    return model(x, timestep, prompts.expand(len(x), -1, -1), return_dict=False)[0]


def build_score(given: str | dict[str, Any]) -> WanTransformer3DModel:
    """A bidirectional Wan from the place of its pipeline, or from fields, with random weights.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if not isinstance(given, str):
        return WanTransformer3DModel(**given)
    try:
        return WanTransformer3DModel.from_pretrained(given.removeprefix("hf-hub:"), subfolder="transformer")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"No Wan can be loaded from {given}: {error}") from error


def add_lora(model: WanTransformer3DModel, options: Mapping[str, Any]) -> None:
    """LoRA on every linear layer of the blocks; all else is frozen.

    Raises:
        InputError: fields that peft refuses.
        MissingExtra: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtra("peft", "train", "LoRA") from error
    layers = [f"blocks.{name}" for name, one in model.blocks.named_modules() if isinstance(one, torch.nn.Linear)]
    try:
        model.add_adapter(LoraConfig(**{"target_modules": layers, **options}))
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from error


class PromptLoader:
    """Batches of pairs of prompts, in another order each epoch; a resumed run goes on where it stood.

    Args:
        data: the pairs.
        batch_size: pairs in a batch.
        seed: of the order.
        rank, world_size: which of how many processes, each of which has pairs of its own.

    Raises:
        DatasetError: there are fewer pairs than a batch of all processes needs.
    """

    def __init__(self, data: Sequence[dict[str, Any]], batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.data, self.batch_size, self.seed, self.rank, self.world_size = data, batch_size, seed, rank, world_size
        self.count = 0
        if not len(self):
            raise DatasetError("No batch can be filled.", [f"{len(data)} prompts, {batch_size * world_size} a batch"])

    def __len__(self) -> int:
        return len(self.data) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, done = divmod(self.count, len(self))
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        own = order[self.rank :: self.world_size]
        for i in range(done, len(self)):
            self.count += 1
            chosen = own[i * self.batch_size : (i + 1) * self.batch_size]
            yield default_collate([self.data[place] for place in chosen])

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def _place(trainer: lightning.Trainer | None) -> tuple[int, int]:
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class PromptData(lightning.LightningDataModule):
    """Prompts from text files, a line each; training needs nothing else.

    Args:
        path: the prompts.
        switch_path: what each changes to, as many lines; the prompts themselves if None.
        batch_size: clips of a step on one process.
        seed: of their order.

    Raises:
        DatasetError: a file is missing or empty, or the two have different numbers of lines.
    """

    def __init__(self, path: str, switch_path: str | None = None, batch_size: int = 1, seed: int = 0):
        super().__init__()
        self.path, self.switch_path, self.batch_size, self.seed = path, switch_path, batch_size, seed

    def setup(self, stage: str) -> None:
        lines = [_lines(path) for path in (self.path, self.switch_path or self.path)]
        if len(lines[0]) != len(lines[1]):
            problem = f"{self.path} has {len(lines[0])} lines, {self.switch_path} {len(lines[1])}"
            raise DatasetError("Each prompt needs one to change to.", [problem])
        self.data = [{"prompt": prompt, "switch_prompt": later} for prompt, later in zip(*lines, strict=True)]

    def train_dataloader(self) -> PromptLoader:
        return PromptLoader(self.data, self.batch_size, self.seed, *_place(self.trainer))


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError("Prompts cannot be read.", [f"{path}: {error}"]) from error
    if not any(lines) or not all(line.strip() for line in lines):
        raise DatasetError("Each line is a prompt.", [f"{path}: it has empty lines, or none at all"])
    return lines


class RandomPromptData(lightning.LightningDataModule):
    """Random features in place of prompts, to try the machinery without a text encoder.

    Args:
        length, width: L and E.
        number: of pairs.
        batch_size: clips of a step on one process.
        seed: of all of them.
    """

    def __init__(self, length: int = 8, width: int = 20, number: int = 8, batch_size: int = 2, seed: int = 0):
        super().__init__()
        self.shape, self.batch_size, self.seed = (number, length, width), batch_size, seed

    def train_dataloader(self) -> PromptLoader:
        random = torch.Generator().manual_seed(self.seed)
        pairs = [torch.randn(self.shape, generator=random) for _ in range(2)]
        data = [
            {"prompt": prompt, "switch_prompt": later, "negative_prompt": torch.zeros(self.shape[1:])}
            for prompt, later in zip(*pairs, strict=True)
        ]
        return PromptLoader(data, self.batch_size, self.seed, *_place(self.trainer))
