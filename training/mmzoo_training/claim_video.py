"""ViD-GPT's claim: causal attention over frames goes on with a clip as well as attention both ways, at a lower cost.

Source: "ViD-GPT: Introducing GPT-style Autoregressive Generation in Video Diffusion Models", arXiv 2406.10981. The
rival is a bidirectional model that extends clip by clip: the last frames are given to it again with every new chunk.

Shape legend: B clips, F frames.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from timm.optim import Muon

from mmzoo.models.vid_gpt import CONFIGS, ViDGPT
from mmzoo.world import Clip, make_bouncing_clip
from mmzoo_training.claims import Advance, Claim, Curve, Scores
from mmzoo_training.rollouts import Fate, continued, fates
from mmzoo_training.video_diffusion import Chain, ClipBatches, ClipData, drawn_loss, open_gates

SIZE, GIVEN, FRAMES = 16, 5, 64
NEAR = 1.75
"""Pixels: an object is where it should be if its middle is no farther off than its radius, which is 1.6 to 2."""
BATCH, TEST_CLIPS, PROBE_CLIPS, LR = 20, 48, 16, 2e-3
PERTURB = 100
VARIANTS = {
    "bidirectional": "attention over frames both ways; every chunk computes the 5 frames before it again in each step",
    "causal": "a frame sees itself and earlier ones; keys and values of earlier frames are kept",
}
RULES = {"bidirectional": "bidirectional", "causal": "causal-temporal"}


def small_model(variant: str) -> ViDGPT:
    """vid-gpt-nano, or its bidirectional twin."""
    fields = {**CONFIGS["vid-gpt-nano"], "rule": RULES[variant], "num_steps": 8}
    model = ViDGPT(**fields)
    open_gates(model)
    return model


def run(variant: str, seed: int, steps: int, advance: Advance) -> tuple[Scores, Curve]:
    """Train one variant and let it go on with the test clips."""
    torch.manual_seed(seed)
    model = small_model(variant).train()
    chain, batches = (
        Chain(model.build_scheduler()),
        ClipBatches(ClipData(SIZE, BATCH, first_seed=10**7 * seed), "train"),
    )
    optimizer = Muon(model.parameters(), LR, weight_decay=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=max(2, steps), pct_start=0.1, cycle_momentum=False
    )
    every, curve = max(1, steps // 8), [(0, followed(model, PROBE_CLIPS))]
    for step in range(1, steps + 1):
        batch = batches.batch(step - 1)
        clean = batch["frames"].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        loss = drawn_loss(model, chain, clean, batch["num_prompt_frames"], PERTURB, 0.0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            curve.append((step, followed(model, PROBE_CLIPS)))
        advance()
    return scores(model), curve


def followed(model: ViDGPT, number: int) -> float:
    """The share of objects that are where they should be, over the first 8 frames."""
    was_training = model.training
    model.eval()
    found = fates_of(model, number, GIVEN + 8)
    model.train(was_training)
    return near(found, slice(GIVEN, GIVEN + 8))


def fates_of(model: ViDGPT, number: int, frames: int) -> list[Fate]:
    """What became of the objects of the first test clips."""
    clips = test_clips(number)
    given = torch.from_numpy(np.stack([clip.frames[:GIVEN] for clip in clips]))
    made = continued(model, given, frames).numpy()
    return [fate for clip, one in zip(clips, made) for fate in fates(clip, one)]


def near(found: list[Fate], frames: slice) -> float:
    """The share of objects and frames in which an object is kept and near its place."""
    return float(np.mean([fate.kept[frames] & (fate.error[frames] < NEAR) for fate in found]))


def scores(model: ViDGPT) -> Scores:
    """Of rollouts over 59 frames from 5 given ones."""
    found = fates_of(model.eval(), TEST_CLIPS, FRAMES)
    last = slice(FRAMES - 8, FRAMES)
    return {
        **_scores(found),
        "kept, last 8 frames": float(np.mean([fate.kept[last] for fate in found])),
    }


def _scores(found: list[Fate]) -> Scores:
    return {
        "followed, 8 frames": near(found, slice(GIVEN, GIVEN + 8)),
        "followed, 9 to 24": near(found, slice(GIVEN + 8, GIVEN + 24)),
    }


@cache
def test_clips(number: int) -> tuple[Clip, ...]:
    """The first clips of the test, the same for all runs."""
    return tuple(make_bouncing_clip(seed, split="test", size=SIZE, num_frames=FRAMES) for seed in range(number))


def levels() -> dict[str, dict[str, float]]:
    """Who lets the last given frame stand."""
    found = []
    for clip in test_clips(TEST_CLIPS):
        still = np.concatenate([clip.frames[:GIVEN], np.repeat(clip.frames[GIVEN - 1 : GIVEN], FRAMES - GIVEN, 0)])
        found += fates(clip, still)
    return {"the last given frame, again and again": {**_scores(found), "kept, last 8 frames": 1.0}}


CLAIM = Claim(
    name="causal-video",
    paper="ViD-GPT, arXiv 2406.10981",
    says="Causal attention over frames, with clean frames as a prompt and their keys kept, makes long clips as well as "
    "or better than a bidirectional model that extends clip by clip, and faster.",
    task=f"Clips of {SIZE} x {SIZE} pixels in which one or two objects go to and fro. From {GIVEN} given frames, "
    f"{FRAMES - GIVEN} more are made, 4 at a time. An object is followed in a frame if it is there and its middle is "
    f"within {NEAR} pixels of where it should be.",
    variants=VARIANTS,
    comparisons=(("causal", "bidirectional"),),
    metric="followed, 8 frames",
    steps=3600,
    train=run,
    levels=levels,
    caveats=(
        "Both variants train on the same clips with the same noise, for the same number of steps; in the bidirectional "
        "one clean frames see the noisy ones, too.",
        "For 4 new frames the causal model passes 36 frames through its layers (8 steps of 4, and 4 to write), "
        "the bidirectional one 72 (8 steps of 9). The longer the window, the larger the difference.",
        "What is kept is kept in colour and size alone: an object that stands still is kept, but not followed.",
    ),
)
