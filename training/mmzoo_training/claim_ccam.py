"""Video-CCAM's claim: a causal cross-attention mask lets a projector of a whole clip know the order of its frames.

Source: "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and Long
Videos", arXiv 2408.14023.

Shape legend: C clips, T frames, S side in pixels, P patches a frame, N queries of the projector, D width; R rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmzoo.connectors.ccam import CCAMProjector
from mmzoo.layout import lay_out, text, video
from mmzoo.world import COLOURS, Clip, blind_accuracy, make_clip
from mmzoo_training.claims import Advance, Batch, Claim, Curve, Reader, Scores, accuracy, by_kind, said, train

KINDS = ("first", "last")
WORDS = (*COLOURS, *KINDS)
FRAMES, SIDE, QUERIES, WIDTH = 8, 32, 32, 64
BATCH, TEST_CLIPS, PROBE_CLIPS, LR = 32, 600, 128, 2e-3
VARIANTS = {
    "naive": "plain cross-attention: every query sees every frame",
    "ccam": "causal cross-attention: the first queries see the first frames only, the last ones all",
    "naive + frame embedding": "plain cross-attention, with a learned vector for each place in time added to its "
    "frame; at the start it is as large as what it is added to (standard deviation 1)",
    "naive + small frame embedding": "the same, starting at a standard deviation of 0.02, as parameters often do",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "naive": {"rule": "bidirectional"},
    "ccam": {"rule": "ccam"},
    "naive + frame embedding": {"rule": "bidirectional", "frame_embedding": 1.0},
    "naive + small frame embedding": {"rule": "bidirectional", "frame_embedding": 0.02},
}


class ClipReader(nn.Module):
    """Convolutions over single frames, a projector of the whole clip, and a causal language model.

    Args:
        rule: of the projector's cross-attention.
        frame_embedding: standard deviation at the start of a learned vector for each place in time, which is added to
            the patches; 0 for none.
    """

    def __init__(self, rule: str, frame_embedding: float = 0.0):
        super().__init__()
        widths = (3, 32, WIDTH, WIDTH)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.GELU())
                for a, b in zip(widths, widths[1:])
            )
        )
        self.projector = CCAMProjector(WIDTH, WIDTH, QUERIES, WIDTH, 2 * WIDTH, num_heads=4, rule=rule)
        self.reader = Reader(len(WORDS), width=WIDTH)
        self.layout = lay_out(video(1, QUERIES, grid=False), text(1))
        # Made last, so that all variants of a seed start from the same weights.
        self.frame = nn.Parameter(frame_embedding * torch.randn(FRAMES, 1, WIDTH)) if frame_embedding else None

    def forward(self, frames: Tensor, question: Tensor) -> Tensor:
        """Logits [R, W]; frames uint8 [C, T, S, S, 3]; questions int64 [R, 1], R / C about each clip in turn."""
        pixels = frames.flatten(0, 1).movedim(-1, 1).to(self.projector.query.dtype) / 127.5 - 1
        patches = self.encoder(pixels).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])
        if self.frame is not None:
            patches = patches + self.frame
        tokens = self.projector(patches, torch.full((len(frames), 1), frames.shape[1]))[:, 0]
        return self.reader(tokens.repeat_interleave(len(question) // len(frames), 0), question, self.layout)


def ordered_clips(split: Literal["train", "test"], start: int = 0) -> Iterator[Clip]:
    """The clips of the world, from seed `start` on, in which something appears before something else."""
    for seed in count(start):
        clip = make_clip(seed, split=split, size=SIDE, num_frames=FRAMES)
        if any(question.kind in KINDS for question in clip.questions):
            yield clip


def order_questions(clips: list[Clip]) -> Batch:
    """Which colour appears first, and which last, in each clip."""
    answers = [{question.kind: question.answer for question in clip.questions} for clip in clips]
    return Batch(
        torch.from_numpy(np.stack([clip.frames for clip in clips])),
        torch.tensor([[WORDS.index(kind)] for _ in clips for kind in KINDS]),
        torch.tensor([WORDS.index(answer[kind]) for answer in answers for kind in KINDS]),
        [kind for _ in clips for kind in KINDS],
    )


def training(seed: int) -> Iterator[Batch]:
    """Endless batches of new clips; each seed starts elsewhere in the stream."""
    clips = ordered_clips("train", 10**7 * seed)
    while True:
        yield order_questions(list(islice(clips, BATCH)))


@cache
def test_clips(number: int) -> tuple[Clip, ...]:
    """The clips of the test, the same for all runs."""
    return tuple(islice(ordered_clips("test"), number))


def batched(clips: tuple[Clip, ...]) -> list[Batch]:
    return [order_questions(list(clips[i : i + 100])) for i in range(0, len(clips), 100)]


def run(variant: str, seed: int, steps: int, advance: Advance) -> tuple[Scores, Curve]:
    """Train one variant and ask it about the test clips, forwards and backwards."""
    torch.manual_seed(seed)
    model = ClipReader(**OPTIONS[variant])
    probe = batched(test_clips(PROBE_CLIPS))
    curve = train(model, training(seed), steps, LR, lambda: accuracy(model, probe)["all"], advance)
    return scores(model, test_clips(TEST_CLIPS)), curve


def scores(model: nn.Module, clips: tuple[Clip, ...]) -> Scores:
    """Accuracy on the clips, and on the same clips played backwards."""
    forwards, backwards = batched(clips), batched(tuple(clip.reversed() for clip in clips))
    before, after = said(model, forwards), said(model, backwards)
    old, new = (torch.cat([batch.answer for batch in batches]) for batches in (forwards, backwards))
    found = by_kind(before == old, forwards)
    return {
        "order": found["all"],
        "first": found["first"],
        "last": found["last"],
        "reversed clip, its right answers": (after == new).double().mean().item(),
        "reversed clip, the old answers": (after == old).double().mean().item(),
        "answers that reversal changes": (after != before).double().mean().item(),
    }


def levels() -> dict[str, dict[str, float]]:
    """By counting in the test clips: who knows the objects alone, and who sees all but which way time runs."""
    clips = test_clips(TEST_CLIPS)
    blind = {kind: level for kind, level in blind_accuracy(clips).items() if kind in KINDS}
    # Of two or three objects it knows which ones come at the ends, and not which end is the first.
    timeless = 0.5
    mean = sum(blind.values()) / len(blind)
    known = {"order": mean, **blind, "reversed clip, its right answers": mean, "reversed clip, the old answers": mean}
    return {
        "knows which objects there are": known,
        "sees all but which way time runs": dict.fromkeys(("order", *KINDS), timeless),
    }


CLAIM = Claim(
    name="ccam",
    paper="Video-CCAM, arXiv 2408.14023",
    says="A causal cross-attention mask in the projector makes it sensitive to temporal order; plain cross-attention "
    "is not.",
    task="Which colour appears first, and which last, in a clip of 8 frames; "
    f"{QUERIES} queries of the projector for the whole clip, and no other sign of time.",
    variants=VARIANTS,
    comparisons=(
        ("ccam", "naive"),
        ("naive + frame embedding", "naive"),
        ("ccam", "naive + frame embedding"),
        ("naive + small frame embedding", "naive + frame embedding"),
    ),
    metric="order",
    steps=400,
    train=run,
    levels=levels,
    caveats=(
        "Plain cross-attention is blind to order by construction: its output is the same for every order of the "
        "frames. So the fair rival of CCAM is plain cross-attention with a frame embedding.",
        "How soon a frame embedding is used can hang on how large it is at the start, so there are two of them.",
        "Clips of more frames than in training are not asked about. A learned frame embedding has no vector for them; "
        "the mask needs none.",
    ),
)
