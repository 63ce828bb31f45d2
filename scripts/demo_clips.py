"""Render the clips of `make demo` into mmzoo/assets/demo, with their questions and right answers.

They are the first clip of the test split in which three objects appear, and the first with a collision.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from mmzoo.files import replacing
from mmzoo.world import Clip, make_clip, write_clip

FOLDER = Path(__file__).parent.parent / "mmzoo" / "assets" / "demo"
SIDE, FRAMES, FPS = 256, 32, 8


def first(kind: str) -> Clip:
    """The first test clip of a kind with three objects."""
    clips = (make_clip(seed, split="test") for seed in count())
    return next(clip for clip in clips if clip.kind == kind and len(clip.objects) == 3)


def described(clip: Clip) -> str:
    """What a person sees in it."""
    names = [thing.name for thing in sorted(clip.objects, key=lambda thing: thing.appear)]
    if clip.kind == "collision":
        return f"{', '.join(names)}; one of them hits another"
    return f"{', then '.join(names)}"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    shown = []
    for kind in ("appear", "collision"):
        clip, name = first(kind), f"{kind}.mp4"
        write_clip(clip, FOLDER / name, size=SIDE, num_frames=FRAMES, fps=FPS)
        questions = sorted((question.kind, question.text, question.answer) for question in clip.questions)
        shown.append(
            {"video": name, "shows": described(clip), "questions": [[text, answer] for _, text, answer in questions]}
        )
    with replacing(FOLDER / "questions.json") as temporary:
        temporary.write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
