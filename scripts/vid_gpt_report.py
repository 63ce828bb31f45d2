"""Measure vid-gpt-nano, and write the prose of its card and a picture of its clips.

    python scripts/vid_gpt_report.py FOLDER BIDIRECTIONAL --took "..." [--clips 100]

FOLDER is the export of `mmzoo fit --config vid-gpt-nano --export FOLDER`; BIDIRECTIONAL that of the same recipe with
`--model.init_args.config '{rule: bidirectional}'`, which extends a clip by computing its last frames again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmzoo.files import replacing
from mmzoo.models.vid_gpt import ViDGPT
from mmzoo.world import Clip, make_bouncing_clip
from mmzoo_training.rollouts import continued, report

ROOT = Path(__file__).parent.parent
CARD, PICTURE = ROOT / "mmzoo" / "assets" / "cards" / "vid-gpt-nano.md", ROOT / "docs" / "images" / "vid-gpt-nano.png"
FRAMES, AHEAD = 64, (1, 2, 4, 8, 16, 32, 59)
PROSE = """\
Trained by `mmzoo fit --config vid-gpt-nano` (seed 0; clips made on the fly; {took})
and shipped with the package. ViD-GPT's own blocks on pixels: {size} x {size}, patches of {patch}, {layers} blocks of
width {width}, {parameters:,} parameters, {chunk} frames at a time after {window} clean ones, {steps} DDIM steps. It knows one kind
of clip: one or two coloured shapes that go to and fro on lines of their own, and turn at the edges. It has no text.

## What it can do

{clips} clips of the test split, {given} frames given, {made} more made with the cache. *Kept*: the object's colour covers
between half and twice the pixels that it should. *Off*: how far the middle of a kept object is from where it should be,
in pixels; {lost:.1f} is the mean distance of an object from where it is at another time. *Both ways*: the same recipe with
bidirectional attention over frames, which extends the clip by computing the last {given} frames again in every step.
*Still*: the last given frame, again and again.

| frames after the given ones | kept, % | off | both ways: kept, % | off | still: off |
|---|---|---|---|---|---|
{rows}

The {clips} clips took {ours:.0f} CPU-seconds with the cache, and {theirs:.0f} both ways; one seed each.

{said}
"""


def measured(model: ViDGPT, clips: list[Clip], given: int) -> tuple[dict[int, tuple[float, float]], float, np.ndarray]:
    """The table of a model, the CPU seconds of its rollouts, and its clips uint8 [B, F, H, W, 3]."""
    begun = torch.from_numpy(np.stack([clip.frames[:given] for clip in clips]))
    start = time.process_time()
    made = continued(model, begun, FRAMES, perturb=model.config.prefix_perturb).numpy()
    return report(clips, list(made), given, AHEAD), time.process_time() - start, made


def picture(clips: list[Clip], made: np.ndarray, alone: np.ndarray) -> Image.Image:
    """Every third frame: of four clips how they should go on and how they do, and of four that go on from one frame."""
    rows = [frames[::3] for i in range(4) for frames in (clips[i].frames, made[i])] + [one[::3] for one in alone]
    lines = [np.pad(np.concatenate(list(row), 1), ((0, 1), (0, 0), (0, 0))) for row in rows]
    whole = np.concatenate(lines)
    return Image.fromarray(whole).resize((whole.shape[1] * 3, whole.shape[0] * 3), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, metavar="FOLDER")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--took", required=True, help="what training took, in words")
    parser.add_argument("--said", default="", help="what it cannot do, in words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = (ViDGPT.from_pretrained(folder).eval() for folder in options.folders)
    size, given = ours.config.sample_size[0], ours.config.window
    clips = [make_bouncing_clip(seed, split="test", size=size, num_frames=FRAMES) for seed in range(options.clips)]
    table, seconds, made = measured(ours, clips, given)
    rival, rival_seconds, _ = measured(theirs, clips, given)
    still = report(clips, [np.repeat(clip.frames[given - 1 : given], FRAMES, 0) for clip in clips], given, AHEAD)
    other = report(clips, [np.roll(clip.frames, 29, 0) for clip in clips], given, AHEAD)
    rows = "\n".join(
        f"| {step} | {100 * table[step][0]:.0f} | {table[step][1]:.1f} | {100 * rival[step][0]:.0f} | "
        f"{rival[step][1]:.1f} | {still[step][1]:.1f} |"
        for step in AHEAD
    )
    prose = PROSE.format(
        took=options.took, size=size, patch=ours.config.patch_size, layers=ours.config.num_layers,
        width=ours.config.hidden_size, parameters=ours.num_parameters(), chunk=ours.config.chunk_frames,
        window=given, given=given, steps=ours.config.num_steps, clips=len(clips), made=FRAMES - given, rows=rows,
        ours=seconds, theirs=rival_seconds, lost=np.nanmean([off for _, off in other.values()]), said=options.said,
    )  # fmt: skip
    with replacing(CARD) as temporary:
        temporary.write_text(prose.strip() + "\n")
    alone = continued(ours, torch.from_numpy(np.stack([clip.frames[:1] for clip in clips[4:8]])), FRAMES).numpy()
    with replacing(PICTURE) as temporary:
        picture(clips, made, alone).save(temporary, format="png")
    print(prose)


if __name__ == "__main__":
    main()
