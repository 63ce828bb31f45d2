"""Self-forcing: its formulas, where gradients flow, how clips live on, and that a run resumes exactly."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from test_longlive import a_model, a_vae, features, latents

from mmzoo.errors import CheckpointError, DatasetError, InputError
from mmzoo.models.longlive import LongLive, Stream, StreamingDecoder, moments
from mmzoo_training import cli, self_forcing
from mmzoo_training.callbacks import ExactResume
from mmzoo_training.self_forcing import (
    FlowSchedule,
    PromptData,
    RandomPromptData,
    SelfForcing,
    image_latent,
    matching_gradient,
    matching_loss,
    sampled_timesteps,
    self_forced,
)

WAN: dict[str, Any] = yaml.safe_load(Path(cli.recipe("longlive-tiny")).read_text())["model"]["init_args"]["real_score"]


def a_module(**options: Any) -> SelfForcing:
    torch.manual_seed(0)
    chosen = {"chunk_frames": 4, "new_frames": 2, "max_frames": 12, "lr": 1e-3, "critic_lr": 1e-3, **options}
    return SelfForcing("longlive-tiny", WAN, WAN, weights=None, **chosen)


def trained(module: SelfForcing, steps: int, folder: Path, **options: Any) -> list[float]:
    """The critic's losses of `steps` steps."""
    losses: list[float] = []

    class Trace(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["critic_loss"]))

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=steps + math.ceil(steps / module.generator_every), logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[ExactResume(), Trace()], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, RandomPromptData(batch_size=1, number=16), **options)
    trainer.save_checkpoint(folder / "last.ckpt")
    return losses


def test_the_loss_has_the_gradient_that_the_scores_give() -> None:
    torch.manual_seed(0)
    x, fake, real = torch.randn(3, 2, 3, 4, 2, 2).double().unbind()
    gradient = matching_gradient(x, fake, real)
    for i in range(2):
        torch.testing.assert_close(gradient[i], (fake[i] - real[i]) / (x[i] - real[i]).abs().mean())
    leaf, counted = x.clone().requires_grad_(), torch.tensor([False, True, True, False])
    loss = matching_loss(leaf, gradient, counted)
    torch.testing.assert_close(loss, 0.5 * gradient[:, :, 1:3].square().mean())
    (found,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(found, gradient * counted[:, None, None] / gradient[:, :, 1:3].numel())


def test_timesteps_are_shifted_and_kept_from_the_ends() -> None:
    drawn = sampled_timesteps(20000, 5.0, torch.Generator().manual_seed(0))
    assert drawn.min() == 20 and drawn.max() == 980
    inside = drawn[(drawn > 20) & (drawn < 980)] / 1000
    steps = 1000 * inside / (5 - 4 * inside)  # the shift undone
    torch.testing.assert_close(steps.round(), steps, atol=1e-2, rtol=0)
    assert abs(float(steps.median()) - 457) < 15  # in the middle of 4.06 and 907.4, where the ends are cut


def test_noise_and_flow_undo_each_other() -> None:
    schedule = FlowSchedule()
    x, noise = torch.randn(2, 2, 3, 4, 2, 2).unbind()
    for timestep in (torch.tensor([937.5, 21.0]), torch.tensor([[1000.0, 500.0, 20.0, 833.0]] * 2)):
        x_t = schedule.add_noise(x, noise, timestep)
        torch.testing.assert_close(schedule.clean(x_t, noise - x, timestep), x, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(schedule.flow(x_t, x, timestep), noise - x, atol=1e-3, rtol=1e-3)
    assert float(schedule.sigma(torch.tensor([1000.0]), x)) == 1


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_only_the_step_at_which_blocks_leave_has_gradients(exit_step: int) -> None:
    model = a_model()
    prompts, noise = features(model), latents(model, 8)
    calls: list[tuple[float, bool]] = []

    class Recorder(Stream):
        def flow(self, x: torch.Tensor, timestep: Any, **options: Any) -> torch.Tensor:
            calls.append((round(float(timestep), 1), torch.is_grad_enabled()))
            return super().flow(x, timestep, **options)

    stream = Recorder(model, prompts)
    made = self_forced(stream, noise, exit_step, torch.Generator().manual_seed(0))
    steps = [1000.0, 937.5, 833.3, 625.0][: exit_step + 1]
    assert calls == [(t, i == exit_step) for _ in range(4) for i, t in enumerate([*steps, 0.0])]
    assert stream.frame == 8 and not any(x.requires_grad for x in stream.cache.frames.keys)
    made.square().sum().backward()
    silent = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.abs().max() > 0]
    assert not silent


def test_leaving_at_the_last_step_is_generation() -> None:
    model = a_model()
    prompts, noise = features(model), latents(model, 2)
    forced = self_forced(Stream(model, prompts), noise, 3, torch.Generator().manual_seed(1), gradient=False)
    generated = Stream(model, prompts).denoise(noise, torch.Generator().manual_seed(1))
    torch.testing.assert_close(forced, generated)


def test_clips_live_on_and_their_prompt_changes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = a_module()
    switched: list[int] = []
    real = Stream.switch

    def switch(self: Stream, prompts: torch.Tensor) -> None:
        switched.append(self.frame)
        real(self, prompts)

    monkeypatch.setattr(Stream, "switch", switch)
    (batch,) = list(RandomPromptData(number=2).train_dataloader())
    before, at = None, []
    for step in range(10):
        module.iteration.fill_(step)
        chunk, counted = module.next_chunk(batch, torch.Generator().manual_seed(step), False)
        first = step % 5 == 0
        assert chunk.shape == (2, 3, 4, 16, 16)
        assert counted.tolist() == [True] * 4 if first else counted.tolist() == [False, False, True, True]
        assert module.stream is not None and module.stream.frame == 4 + 2 * (step % 5)
        if not first:
            assert torch.equal(chunk[:, :, :2], before[:, :, 2:])  # no autoencoder: an image is a frame
        before = chunk
        at.append(module.switch_frame)
    assert switched == [at[0], at[5]] and set(switched) <= {4, 6}
    assert torch.equal(module.stream.prompts, batch["switch_prompt"])


def test_the_papers_prompts_change_where_the_paper_says() -> None:
    module = a_module(chunk_frames=4, new_frames=2)
    module.chunk_frames, module.new_frames, module.max_frames = 21, 18, 240
    batch, seen = {"prompt": torch.zeros(1, 8, 20), "switch_prompt": torch.zeros(1, 8, 20)}, set()
    for seed in range(200):
        module._begin(batch, torch.Generator().manual_seed(seed))
        seen.add(module.switch_frame)
    assert seen == set(range(21, 202, 18))


def test_an_image_is_what_the_autoencoder_makes_of_one_frame() -> None:
    model, vae = a_model(), a_vae()
    x = latents(model, 3)
    assert torch.equal(image_latent(model, x), x[:, :, -1:])
    model.load_parts(vae=vae)
    with torch.no_grad():
        pixels = StreamingDecoder(vae)(x)[:, :, -1:]
        mean, deviation = moments(vae, x)
        expected = (vae.encode(pixels).latent_dist.mean - mean) / deviation
    torch.testing.assert_close(image_latent(model, x), expected)


def test_a_later_chunk_begins_with_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = a_module(chunk_frames=6, new_frames=2, max_frames=8), []

    def image(model: LongLive, x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return torch.full_like(x[:, :, -1:], 7.0)

    monkeypatch.setattr(self_forcing, "image_latent", image)
    (batch,) = list(RandomPromptData(number=1, batch_size=1).train_dataloader())
    first, _ = module.next_chunk(batch, torch.Generator(), False)
    second, counted = module.next_chunk(batch, torch.Generator(), True)
    assert torch.equal(given[0], first[:, :, :3])
    assert (second[:, :, 0] == 7).all() and torch.equal(second[:, :, 1:4], first[:, :, 3:])
    assert counted.tolist() == [False] * 4 + [True] * 2 and second.requires_grad


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def test_the_generator_follows_every_fifth_step(tmp_path: Path) -> None:
    module = a_module()
    start = [parameters(model) for model in (module.generator, module.fake, module.real)]
    losses = trained(module, 1, tmp_path)
    first = [parameters(model) for model in (module.generator, module.fake, module.real)]
    changed = [[not torch.equal(a[name], b[name]) for name in a] for a, b in zip(start, first, strict=True)]
    assert all(changed[0]) and all(changed[1]) and not any(changed[2])
    assert math.isfinite(losses[0])
    (batch,) = list(RandomPromptData(number=1, batch_size=1).train_dataloader())
    assert module.critic_loss(torch.randn(1, 3, 4, 16, 16), torch.Generator().manual_seed(0)).requires_grad
    chunk, counted = module.next_chunk(batch, torch.Generator().manual_seed(0), True)
    loss = module.generator_loss(chunk, counted, batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(one.grad is None for one in module.real.parameters())


def test_the_scores_are_guided_in_x0(monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = a_module(guidance=3.0), {}
    texts = {"prompt": torch.zeros(1, 8, 20), "switch_prompt": torch.zeros(1, 8, 20), "negative_prompt": torch.ones(1, 8, 20)}  # fmt: skip  # noqa: E501

    def flow(model: Any, x_t: torch.Tensor, timestep: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        level = 5.0 if model is module.fake else 3.0 if prompts.abs().sum() else 2.0
        return (x_t - level) / module.schedule.sigma(timestep, x_t)  # whose x0 is the level

    def gradient(x: torch.Tensor, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        given.update(fake=fake, real=real)
        return fake - real

    monkeypatch.setattr(self_forcing, "score", flow)
    monkeypatch.setattr(self_forcing, "matching_gradient", gradient)
    chunk, counted = module.next_chunk(texts, torch.Generator(), False)
    module.generator_loss(chunk, counted, texts, torch.Generator())
    torch.testing.assert_close(given["fake"], torch.full_like(chunk, 5.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(given["real"], torch.full_like(chunk, 2.0 + 3.0 * (2.0 - 3.0)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_run_has_the_losses_of_the_unbroken_one(cut: int, tmp_path: Path) -> None:
    whole = trained(a_module(), 7, tmp_path / "whole")
    first = trained(a_module(), cut, tmp_path / "cut")
    rest = trained(a_module(), 7, tmp_path / "rest", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert first + rest == whole and len(set(whole)) == 7


def test_an_average_follows_and_is_exported(tmp_path: Path) -> None:
    module = a_module(ema=0.9, ema_from=1, generator_every=1)
    seen: list[dict[str, torch.Tensor]] = []
    real = module._average

    def average() -> None:
        real()
        seen.append(parameters(module.generator))

    module._average = average
    trained(module, 3, tmp_path)
    expected = {name: 0.9 * (0.9 * x + 0.1 * seen[1][name]) + 0.1 * seen[2][name] for name, x in seen[0].items()}
    module.export(tmp_path / "out")
    kept = LongLive.from_pretrained(tmp_path / "out").state_dict()
    for name, x in expected.items():
        torch.testing.assert_close(kept[name], x, atol=1e-6, rtol=1e-4)
    with pytest.raises(InputError, match="ema or lora"):
        a_module(ema=0.9, lora={"r": 2})


def test_lora_trains_blocks_alone_and_is_merged(tmp_path: Path) -> None:
    module = a_module(lora={"r": 2, "lora_alpha": 2}, lr=1e-2, generator_every=1)
    names = {name for name, one in module.named_parameters() if one.requires_grad}
    assert all(name.split(".")[0] in ("generator", "fake") and ".blocks." in name and "lora_" in name for name in names)
    layers = 2 * 2 * (8 + 2)  # models x blocks x (attention, feed-forward)
    assert len(names) == 2 * layers
    trained(module, 2, tmp_path)
    prompts, x = features(module.generator), latents(module.generator, 2)
    with torch.no_grad():
        before = module.generator(x, torch.zeros(1), prompts).sample
        module.export(tmp_path / "out")
        after = LongLive.from_pretrained(tmp_path / "out").eval()(x, torch.zeros(1), prompts).sample
        plain = a_module().generator(x, torch.zeros(1), prompts).sample
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, plain, atol=1e-4)
    with pytest.raises(InputError, match="lora: .*rank"):
        a_module(lora={"rank": 2})


def test_a_teacher_with_a_place_is_not_saved(tmp_path: Path) -> None:
    WanTransformer3DModel(**WAN).save_pretrained(tmp_path / "wan" / "transformer")
    options: dict[str, Any] = {"weights": None, "chunk_frames": 4, "new_frames": 2, "max_frames": 8}
    module = SelfForcing("longlive-tiny", str(tmp_path / "wan"), WAN, **options)
    trained(module, 1, tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("real.") for name in state) and any(name.startswith("fake.") for name in state)
    trained(SelfForcing("longlive-tiny", str(tmp_path / "wan"), WAN, **options), 2, tmp_path, ckpt_path=tmp_path / "last.ckpt")  # fmt: skip  # noqa: E501
    with pytest.raises(CheckpointError, match="No Wan"):
        SelfForcing("longlive-tiny", str(tmp_path / "nothing"), WAN, **options)
    with pytest.raises(InputError, match="whole blocks of 2"):
        a_module(new_frames=3)


def test_prompts_are_lines_of_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\na dog\nthe sea\n")
    (tmp_path / "b.txt").write_text("it runs\nit sleeps\nit storms\n")
    data = PromptData(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), batch_size=3)
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    pairs = dict(zip(batch["prompt"], batch["switch_prompt"], strict=True))
    assert pairs == {"a cat": "it runs", "a dog": "it sleeps", "the sea": "it storms"}
    (tmp_path / "b.txt").write_text("it runs\n")
    with pytest.raises(DatasetError, match="3 lines"):
        data.setup("fit")
    (tmp_path / "b.txt").write_text("it runs\n\nit storms\n")
    with pytest.raises(DatasetError, match="empty lines"):
        data.setup("fit")
    with pytest.raises(DatasetError, match="cannot be read"):
        PromptData(str(tmp_path / "c.txt")).setup("fit")


def test_the_tiny_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmzoo"])
    cli.main(["fit", "--config", "longlive-tiny", "--trainer.max_steps=3", "--export=out", "--trainer.logger=CSVLogger",
              "--trainer.logger.save_dir=."])  # fmt: skip
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert {"generator_loss", "critic_loss"} <= set(metrics.read_text().splitlines()[0].split(","))
    assert LongLive.from_pretrained("out").config.window == 6


@pytest.mark.parametrize("name", ["longlive-1.3b-init", "longlive-1.3b"])
def test_the_papers_recipes_are_read_by_the_command_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["mmzoo"])
    monkeypatch.setattr(cli.RecipeCLI, "instantiate_classes", lambda self: seen.append(self.config))
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    cli.main(["fit", "--config", name])
    options = seen[0].fit.model.init_args
    assert options.betas == (0.0, 0.999) and options.generator_every == 5 and options.guidance == 3.0


SHARDED = """
import sys, lightning, torch
from lightning.pytorch.strategies import ModelParallelStrategy
from mmzoo_training.self_forcing import RandomPromptData, SelfForcing
import yaml
from mmzoo_training import cli
wan = yaml.safe_load(open(cli.recipe("longlive-tiny")).read())["model"]["init_args"]["real_score"]
torch.set_num_threads(1)
lightning.seed_everything(0)
module = SelfForcing("longlive-tiny", wan, wan, weights=None, chunk_frames=4, new_frames=2, max_frames=8, ema=0.9)
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, limit_train_batches=3, logger=False,
    enable_progress_bar=False, enable_checkpointing=False,
)
trainer.fit(module, RandomPromptData(batch_size=1))
module.export("out")
"""


@pytest.mark.slow
def test_it_trains_in_shards(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SHARDED)
    root = Path(__file__).resolve().parent.parent
    paths = os.pathsep.join(str(root / name) for name in (".", "kernels", "training", "eval"))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    assert all(torch.isfinite(x).all() for x in LongLive.from_pretrained(tmp_path / "out").state_dict().values())
