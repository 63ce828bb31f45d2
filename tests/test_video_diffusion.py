"""Training of ViD-GPT: where the loss is, that runs are exact, and what is measured of a rollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.models.vid_gpt import CONFIGS, ViDGPT
from mmzoo.world import make_bouncing_clip
from mmzoo_training import claim_video
from mmzoo_training.callbacks import ExactResume, LossTrace
from mmzoo_training.rollouts import continued, fates, report
from mmzoo_training.video_diffusion import Chain, ClipBatches, ClipData, VideoDiffusion, drawn_loss, losses

SMALL: dict[str, Any] = {"sample_size": (8, 8), "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}


def build(name: str = "vid-gpt-nano", **fields: Any) -> ViDGPT:
    torch.manual_seed(0)
    model = ViDGPT.build({**CONFIGS[name], **SMALL, **fields}, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


# The clips.


@given(st.integers(0, 10**6), st.integers(2, 80))
def test_bouncing_objects_go_on_for_good(seed: int, num_frames: int) -> None:
    clip = make_bouncing_clip(seed, size=16, num_frames=num_frames)
    times = (np.arange(num_frames) + 0.5) / num_frames
    assert 1 <= len(clip.objects) <= 2 and clip.frames.shape == (num_frames, 16, 16, 3)
    for thing in clip.objects:
        x, y = thing.at(times)
        assert (np.stack([x, y]) >= thing.radius - 1e-9).all() and (np.stack([x, y]) <= 1 - thing.radius + 1e-9).all()
        moved = np.abs(np.diff(x)) + np.abs(np.diff(y))
        assert np.ptp(x) == 0 or np.ptp(y) == 0
        assert moved.max() < 0.06 + 1e-9
        legs = [
            np.hypot(x1 - x0, y1 - y0) / (t1 - t0) for (t0, x0, y0), (t1, x1, y1) in zip(thing.path, thing.path[1:])
        ]
        assert np.allclose(legs, legs[0]) and 0.03 <= legs[0] / num_frames <= 0.06 + 1e-9
    if len(clip.objects) == 2:
        (x0, y0), (x1, y1) = (thing.at(times) for thing in clip.objects)
        lines = np.abs(y0 - y1) if np.ptp(y0) == np.ptp(y1) == 0 else np.abs(x0 - x1)
        assert (lines > 2.4 * clip.objects[0].radius - 1e-9).all()


@given(st.integers(0, 99))
def test_a_longer_clip_begins_as_the_shorter_one(seed: int) -> None:
    short, long = (make_bouncing_clip(seed, num_frames=n).frames for n in (5, 40))
    assert np.abs(short.astype(int) - long[:5]).max() <= 1
    assert not np.array_equal(short, make_bouncing_clip(seed, num_frames=5, split="val").frames)


@pytest.mark.parametrize("wrong", [{"split": "none"}, {"size": 0}, {"num_frames": 0}])
def test_no_such_clip(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="No clip"):
        make_bouncing_clip(0, **wrong)


def test_batches_are_a_function_of_their_number() -> None:
    data = ClipData(size=8, batch_size=2, chunk_frames=3, prompt_frames=(1, 4))
    endless = ClipBatches(data, "train")
    first = [batch for batch, _ in zip(endless, range(4))]
    assert [batch["num_prompt_frames"] for batch in first] == [1, 4, 1, 4]
    assert [batch["frames"].shape[1] for batch in first] == [4, 7, 4, 7]
    again = ClipBatches(data, "train")
    again.load_state_dict({"batches": 2})
    assert torch.equal(next(iter(again))["frames"], first[2]["frames"])
    assert again.state_dict() == {"batches": 3}
    assert not torch.equal(first[0]["frames"], first[2]["frames"])


# The loss.


def test_later_batches_are_learned_behind_the_models_own_frames() -> None:
    """Every second batch is longer, by what the model makes; what it shall say stays the clip's own last chunk."""
    module = VideoDiffusion("vid-gpt-tiny")
    chunk, window = module.model.config.chunk_frames, module.model.config.window
    data = ClipData(size=8, batch_size=2, chunk_frames=chunk, prompt_frames=(window, 1), rolled_from=4, rolled_chunks=2)
    batches = [ClipBatches(data, "train").batch(number) for number in range(20)]
    rolled = [batch["rolled"] for batch in batches]
    assert not any(rolled[:4] + rolled[5::2]) and set(rolled[4::2]) == {1, 2}
    assert ClipBatches(data, "val").batch(4)["rolled"] == 0
    for batch, number in zip(batches, rolled, strict=True):
        assert batch["frames"].shape[1] == batch["num_prompt_frames"] + (number + 1) * chunk
        assert number == 0 or batch["num_prompt_frames"] == window
    frames = torch.randint(256, (2, window + 3 * chunk, 8, 8, 3), dtype=torch.uint8)
    made = module.own(frames, window)
    assert made.shape[1] == window + chunk and module.model.training
    assert torch.equal(made[:, window:], frames[:, -chunk:])
    assert not torch.equal(made[:, :window], frames[:, -chunk - window : -chunk])


def test_all_but_the_last_chunk_of_a_rolled_batch_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clip is still shorter than the window."""
    module, told = VideoDiffusion("vid-gpt-tiny"), list[tuple[int, int]]()
    chunk = module.model.config.chunk_frames

    def said(model: object, chain: object, clean: Tensor, given: int, *rest: float) -> Tensor:
        told.append((clean.shape[2], given))
        return clean.sum()

    monkeypatch.setattr("mmzoo_training.video_diffusion.drawn_loss", said)
    for first in (1, module.model.config.window):
        frames = torch.zeros(1, first + 2 * chunk, 8, 8, 3, dtype=torch.uint8)
        module.loss({"frames": frames, "num_prompt_frames": first, "rolled": 1})
    assert all(frames - given == chunk for frames, given in told) and len(told) == 2


def loss_of(model: ViDGPT, clean: Tensor, noise: Tensor, t: int, **options: Any) -> tuple[Tensor, Tensor]:
    chain = Chain(model.build_scheduler())
    return losses(model, chain, clean, 2, torch.full((len(clean),), t), noise, **options)


@pytest.mark.parametrize("name", ["vid-gpt-tiny", "vid-gpt-nano"])
def test_the_loss_is_on_noisy_frames_alone(name: str) -> None:
    model = build(name, caption_channels=0)
    clean, noise = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    mse, bound = loss_of(model, clean, noise, 300)
    assert mse.shape == bound.shape == (2,) and bool((bound == 0).all()) == (name == "vid-gpt-nano")
    noise[:, :, :2] += 1  # of clean frames, which have none
    for one, other in zip(loss_of(model, clean, noise, 300), (mse, bound)):
        assert torch.equal(one, other)
    shown = clean[:, :, :2] + 1
    assert not torch.equal(loss_of(model, clean, noise, 300, prompt=shown)[0], mse)
    noise[:, :, 3] += 1
    assert not torch.equal(loss_of(model, clean, noise, 300)[0], mse)


def test_the_bound_is_smallest_at_the_true_variance_and_leaves_the_mean_alone() -> None:
    chain = Chain(build("vid-gpt-tiny").build_scheduler())
    clean, noise, t = torch.randn(1, 3, 1, 2, 2), torch.randn(1, 3, 1, 2, 2), torch.tensor([2])
    noisy = chain.noised(clean, noise, t)

    def bound(logits: float) -> Tensor:
        said = torch.cat([noise, torch.full_like(noise, logits)], 1).requires_grad_()
        value = chain.variance_bound(said, clean, noisy, t).mean()
        value.backward()
        assert said.grad is not None and not said.grad[:, :3].any()
        return value.detach()

    # The true mean is known, so the posterior's own variance, the shorter one, is right: no bits are left.
    assert abs(bound(-1.0)) < 1e-6 < bound(-0.9) < bound(0.5)
    at_zero = chain.variance_bound(torch.cat([noise, noise], 1), clean.clamp(-1, 1), clean, torch.tensor([0]))
    assert bool((at_zero >= 0).all())


def test_a_chain_learns_eps_or_the_sample_and_nothing_else() -> None:
    model = build(scheduler={**CONFIGS["vid-gpt-nano"]["scheduler"], "prediction_type": "v_prediction"})
    with pytest.raises(InputError, match="v_prediction"):
        loss_of(model, torch.randn(1, 3, 4, 8, 8), torch.randn(1, 3, 4, 8, 8), 10)


@given(st.sampled_from([1.0, 2.0]))
def test_noisy_frames_never_have_the_timestep_of_clean_ones(late: float) -> None:
    model, seen = build(), []
    model.time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].view(-1, 4)))
    chain = Chain(model.build_scheduler())
    for _ in range(4):
        drawn_loss(model, chain, torch.zeros(16, 3, 4, 8, 8), 2, 100, 0.0, late)
    times = torch.cat(seen)
    assert (times[:, :2] == 0).all() and (times[:, 2:] >= 1).all() and (times[:, 2:] <= 999).all()
    assert 350 < times[:, 2:].float().mean() < 800


# Lightning.


def fit(folder: Path, steps: int, trace: Path, resume: Path | None = None) -> lightning.Trainer:
    lightning.seed_everything(0)
    module = VideoDiffusion("vid-gpt-nano", {**SMALL, "chunk_frames": 3, "window": 4, "max_frames": 7}, lr=1e-3)
    data = ClipData(size=8, batch_size=2, chunk_frames=3, prompt_frames=(1, 4), validation_batches=2, rolled_from=1)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), LossTrace(str(trace)), saving],
    )
    trainer.fit(module, data, ckpt_path=resume)
    return trainer


def test_a_resumed_run_is_the_unbroken_one_and_exports(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 4, tmp_path / "whole.txt")
    (begun,) = (tmp_path / "whole").glob("*step=2.ckpt")
    resumed = fit(tmp_path / "resumed", 4, tmp_path / "resumed.txt", begun)
    assert (tmp_path / "resumed.txt").read_text().splitlines() == (tmp_path / "whole.txt").read_text().splitlines()[2:]
    one, other = (trainer.lightning_module.model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert float(whole.callback_metrics["val_loss"]) == float(resumed.callback_metrics["val_loss"])
    folder = whole.lightning_module.export(tmp_path / "export")
    again = ViDGPT.from_pretrained(folder)
    assert all(torch.equal(one[name], again.state_dict()[name]) for name in one)


# What is measured.


def test_the_clip_itself_is_followed_and_what_is_shifted_or_gone_is_not() -> None:
    clip = make_bouncing_clip(3, num_frames=12)
    (fate, *_) = fates(clip, clip.frames)
    assert fate.kept.all() and (fate.error == 0).all()
    shifted = np.roll(clip.frames, 2, 1)
    moved = fates(clip, shifted)
    assert all(np.nanmedian(one.error) == pytest.approx(2, abs=1e-6) for one in moved)
    gone = clip.frames.copy()
    gone[6:] = clip.background
    for one in fates(clip, gone):
        assert one.kept[:6].all() and not one.kept[6:].any() and np.isnan(one.error[6:]).all()
    table = report([clip], [gone], 4, (1, 2, 4))
    assert table[1] == (1.0, 0.0) and table[4][0] == 0.0


@pytest.mark.parametrize("rule", ["causal-temporal", "bidirectional"])
def test_many_clips_at_once_are_each_its_own_rollout(rule: str) -> None:
    model = build(rule=rule, window=4, chunk_frames=3, max_frames=7, num_steps=2).eval()
    given = torch.from_numpy(np.stack([make_bouncing_clip(i, size=8, num_frames=4).frames for i in range(2)]))
    made = continued(model, given, 9, perturb=0)
    assert made.shape == (2, 9, 8, 8, 3) and made.dtype == torch.uint8
    assert torch.equal(made[:, :4], given)
    alone = continued(model, given[:1], 9, perturb=0)
    assert alone.shape == (1, 9, 8, 8, 3) and torch.equal(alone[0, :4], given[0])


# The claim.


def test_the_levels_of_a_still_picture() -> None:
    (level,) = claim_video.levels().values()
    assert 0.05 < level["followed, 9 to 24"] < level["followed, 8 frames"] < 0.6


def test_variants_differ_in_their_rule_alone() -> None:
    models = []
    for variant in claim_video.VARIANTS:
        torch.manual_seed(0)
        models.append(claim_video.small_model(variant))
    one, other = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [model.rule.name for model in models] == ["bidirectional", "causal-temporal"]
