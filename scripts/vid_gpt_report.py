"""Measure vid-gpt-nano, and write the prose of its card and a picture of its clips.

    python scripts/vid_gpt_report.py FOLDER --took "..." --said "..." [--clips 100]

FOLDER is the export of `mmzoo fit --config vid-gpt-nano --export FOLDER`.
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
width {width}, {parameters:,} parameters; {chunk} frames at a time after {window} clean ones, in {steps} steps. It
knows one kind of clip: one or two coloured shapes that go to and fro on lines of their own, and turn at the edges. It
has no text.

## What it can do

{clips} clips of the test split; {given} frames are given and {made} more are made, with the cache. *Kept*: the object's
colour covers between half and twice the pixels that it should. *Off*: how far the middle of a kept object is from where
it should be, in pixels. *Still*: the last given frame, again and again. *From one frame*: where one frame is given in
place of {given}, from which no motion can be told.

| frames after the given ones | kept, % | off | still: off | from one frame: kept, % | off |
|---|---|---|---|---|---|
{rows}

{said}
"""


def measured(model: ViDGPT, clips: list[Clip], given: int) -> tuple[dict[int, tuple[float, float]], np.ndarray, float]:
    """The table of a model, its clips uint8 [B, F, H, W, 3], and the CPU seconds they took."""
    begun = torch.from_numpy(np.stack([clip.frames[:given] for clip in clips]))
    start = time.process_time()
    made = continued(model, begun, FRAMES, perturb=model.config.prefix_perturb).numpy()
    return report(clips, list(made), given, AHEAD), made, time.process_time() - start


def picture(clips: list[Clip], made: np.ndarray, alone: np.ndarray) -> Image.Image:
    """Every third frame: of four clips how they should go on and how they do, and of four that go on from one frame."""
    rows = [frames[::3] for i in range(4) for frames in (clips[i].frames, made[i])] + [one[::3] for one in alone]
    lines = [np.pad(np.concatenate(list(row), 1), ((0, 1), (0, 0), (0, 0))) for row in rows]
    whole = np.concatenate(lines)
    return Image.fromarray(whole).resize((whole.shape[1] * 3, whole.shape[0] * 3), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--took", required=True, help="what training took, in words")
    parser.add_argument("--said", required=True, help="what it cannot do, and what it was compared with, in words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ViDGPT.from_pretrained(options.folder).eval()
    size, given = model.config.sample_size[0], model.config.window
    clips = [make_bouncing_clip(seed, split="test", size=size, num_frames=FRAMES) for seed in range(options.clips)]
    (table, made, seconds), (lone, alone, _) = measured(model, clips, given), measured(model, clips, 1)
    still = report(clips, [np.repeat(clip.frames[given - 1 : given], FRAMES, 0) for clip in clips], given, AHEAD)
    prose = PROSE.format(
        took=options.took,
        size=size,
        patch=model.config.patch_size,
        layers=model.config.num_layers,
        width=model.config.hidden_size,
        parameters=model.num_parameters(),
        chunk=model.config.chunk_frames,
        window=given,
        steps=model.config.num_steps,
        clips=len(clips),
        given=given,
        made=FRAMES - given,
        rows="\n".join(
            f"| {step} | {100 * table[step][0]:.0f} | {table[step][1]:.1f} | {still[step][1]:.1f} "
            f"| {100 * lone[step][0]:.0f} | {lone[step][1]:.1f} |"
            for step in AHEAD
        ),
        said=options.said,
    )
    with replacing(CARD) as temporary:
        temporary.write_text(prose)
    with replacing(PICTURE) as temporary:
        picture(clips, made, alone[4:8]).save(temporary, format="png")
    print(prose, f"{len(clips)} clips took {seconds:.0f} CPU-seconds.", sep="\n")


if __name__ == "__main__":
    main()
