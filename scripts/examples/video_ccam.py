"""Video-CCAM in small, with random weights, so that the words it says mean nothing.

    python scripts/examples/video_ccam.py [FOLDER]

Draws the mask of its projector, puts clips of different lengths into one batch, and asks two questions about clips
that are encoded once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BatchFeature

import mmzoo
from mmzoo.attention import draw
from mmzoo.language import MultimodalLM
from mmzoo.layout import TokenLayout, lay_out, video
from mmzoo.masks.ccam import query_layout
from mmzoo.world import make_clip


def asked(model: MultimodalLM, question: str, clips: list[np.ndarray]) -> BatchFeature:
    """A batch in which the question is put about each clip."""
    return model.processor(
        [model.processor.prompt(question, "<video>") for _ in clips], videos=[[clip] for clip in clips]
    )


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = mmzoo.load("video-ccam-tiny", weights=None)
    queries = query_layout(model.processor.num_query, 4)
    print("the mask:", draw(model.connector_rule, queries, folder / "ccam.png", lay_out(video(4, 3))))

    clips = [make_clip(seed, num_frames=frames).frames for seed, frames in ((1, 3), (2, 16), (3, 5))]
    model.processor.num_frames = 16  # the most that are taken; shorter clips give all they have
    print("frames of the clips:", [len(clip) for clip in clips])

    first = asked(model, "which colour appears first", clips)
    print("frames of each item:", first["num_frames"].tolist())
    print("tokens of each item:", TokenLayout(first["layout"]).visual.sum(1).tolist())
    with torch.no_grad():
        tokens = model.encode_media(first["layout"], first["pixel_values"], first["num_frames"])
    print("visual tokens:", tuple(tokens.shape))

    for question in ("which colour appears first", "how many objects are there"):
        batch = asked(model, question, clips)
        batch = {name: tensor for name, tensor in batch.items() if name not in model.media_inputs}
        said = model.generate(**batch, visual_embeds=tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)
        words = model.processor.tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :])
        print(f"{question}:", words)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
