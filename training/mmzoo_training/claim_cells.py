"""Claims about pictures of cells: modality-mutual attention, concentric attention, frame-wise block attention.

A picture is a grid of cells, each empty or with one coloured shape of the synthetic world; a cell is a visual token.

Sources: AKI (arXiv 2503.02597), CCA-LLaVA (arXiv 2410.15926), TC-LLaVA (arXiv 2409.03206).

Shape legend: R rows, T frames, S side of a frame in cells, N = T * S * S cells, X looks (18), P values of a cell's
pixels, Q tokens of a question, W words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mmzoo.layout import image, lay_out, text, video
from mmzoo.world import COLOURS, SHAPES, Clip, Object
from mmzoo_training.claims import Advance, Batch, Claim, Curve, Reader, Scores, accuracy, train

LOOKS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
WAYS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
WORDS = (*COLOURS, *SHAPES, *WAYS, "presence", "shape", "yes", "no", "?")
PIXELS, BACKGROUND, NOISE = 6, 35, 0.2
BATCH, TEST_ROWS, PROBE_ROWS, LR = 128, 2000, 250, 2e-3


def word(name: str) -> int:
    return WORDS.index(name)


@cache
def looks() -> Tensor:
    """float32 [X + 1, P]: what a cell with each look shows, from -1 to 1; the last one is empty."""
    nothing = Clip("appear", (), (), BACKGROUND, np.zeros((1, PIXELS, PIXELS, 3), np.uint8))
    shown = [nothing.render(PIXELS)]
    for colour, shape in LOOKS:
        thing = Object(colour, shape, 0.45, 0, 1, ((0, 0.5, 0.5), (1, 0.5, 0.5)))
        shown.append(Clip("appear", (thing,), (), BACKGROUND, nothing.frames).render(PIXELS))
    return torch.from_numpy(np.concatenate([*shown[1:], shown[0]])).flatten(1).float() / 127.5 - 1


def pixels_of(cells: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [R, N, P]: noisy cells; `cells` int64 [R, N] are looks, -1 where empty."""
    clean = looks()[cells]
    return clean + NOISE * torch.randn(clean.shape, generator=generator)


def fill(things: Tensor, cells: int, generator: torch.Generator) -> Tensor:
    """int64 [R, N]: looks [R, n] in cells drawn at random; -1 where empty."""
    rows, number = things.shape
    places = torch.rand(rows, cells, generator=generator).argsort(1)[:, :number]
    return torch.full((rows, cells), -1).scatter(1, places, things)


def unique_looks(rows: int, number: int, generator: torch.Generator) -> Tensor:
    """int64 [R, n]: looks, no two of a row alike."""
    return torch.rand(rows, len(LOOKS), generator=generator).argsort(1)[:, :number]


def neighbours(cells: Tensor, frames: int, side: int) -> Tensor:
    """int64 [R, 4, N]: what lies to each of the `WAYS` of a cell, inside its frame; -1 where nothing does."""
    grid = nn.functional.pad(cells.unflatten(1, (frames, side, side)), (1, 1, 1, 1), value=-1)
    shifted = [grid[:, :, 1 + y : 1 + y + side, 1 + x : 1 + x + side].flatten(1) for y, x in WAYS.values()]
    return torch.stack(shifted, 1)


def ask_neighbours(rows: int, frames: int, side: int, number: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """What colour is the object left of, right of, above, or below another: the questions, and the cells [R, N]."""
    cells = fill(unique_looks(rows, number, generator), frames * side * side, generator)
    beside = neighbours(cells, frames, side)
    possible = (beside >= 0) & (cells >= 0)[:, None]
    chosen = (possible * torch.rand(possible.shape, generator=generator)).flatten(1).argmax(1)
    way, cell = chosen // cells.shape[1], chosen % cells.shape[1]
    asked = cells.gather(1, cell[:, None])[:, 0]
    answer = beside.flatten(1).gather(1, chosen[:, None])[:, 0] // len(SHAPES)
    first_way, mark = word("left"), torch.full_like(way, word("?"))
    question = torch.stack([first_way + way, asked // len(SHAPES), word(SHAPES[0]) + asked % len(SHAPES), mark], 1)
    kinds = [list(WAYS)[i] for i in way.tolist()]
    return Batch(pixels_of(cells, generator), question, answer, kinds), cells


def ask_colours(rows: int, side: int, number: int, generator: torch.Generator, shapes: bool) -> Batch:
    """Is there a red object: yes and no equally often. With `shapes`, half of the rows ask which shape it has."""
    colours = torch.rand(rows, len(COLOURS), generator=generator).argsort(1)
    things = colours[:, :number] * len(SHAPES) + torch.randint(len(SHAPES), (rows, number), generator=generator)
    cells = fill(things, side * side, generator)
    about_shape = torch.arange(rows) % 4 < (2 if shapes else 0)
    there = (torch.arange(rows) % 2 == 0) | about_shape
    # Colours and things are in random order, so the first one there, or the first one not there, is any.
    colour = torch.where(there, colours[:, 0], colours[:, number])
    kind = torch.where(about_shape, word("shape"), word("presence"))
    question = torch.stack([kind, colour, torch.full_like(kind, word("?"))], 1)
    answer = torch.where(there, word("yes"), word("no"))
    answer = torch.where(about_shape, word(SHAPES[0]) + things[:, 0] % len(SHAPES), answer)
    kinds = [
        "shape" if one else "presence, yes" if yes else "presence, no"
        for one, yes in zip(about_shape.tolist(), there.tolist())
    ]
    return Batch(pixels_of(cells, generator), question, answer, kinds)


class CellReader(nn.Module):
    """Cells as tokens of a language model: one linear layer over the pixels of each.

    Args:
        frames: 1 is an image, more are a clip.
        **options: rule and scheme, as `Reader` takes them.
    """

    def __init__(self, frames: int = 1, **options: Any):
        super().__init__()
        self.frames = frames
        self.reader = Reader(len(WORDS), **options)
        width = self.reader.model.get_input_embeddings().weight.shape[1]
        self.patch = nn.Linear(looks().shape[1], width)

    def forward(self, pixels: Tensor, question: Tensor) -> Tensor:
        """Logits [R, W] from pixels [R, N, P], of as many cells as there are, and questions int64 [R, Q]."""
        side = round((pixels.shape[1] / self.frames) ** 0.5)
        picture = image(side, side) if self.frames == 1 else video(self.frames, side, side)
        return self.reader(self.patch(pixels), question, lay_out(picture, text(question.shape[1])))


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TEST_STREAM = 2**40
Made = TypeVar("Made")


def endless(make: Callable[[int, torch.Generator], Batch], seed: int) -> Iterator[Batch]:
    generator = stream(seed)
    while True:
        yield make(BATCH, generator)


def fixed(make: Callable[[int, torch.Generator], Made], rows: int) -> list[Made]:
    """The questions of the test, the same for all runs, in batches."""
    generator = stream(TEST_STREAM)
    return [make(min(250, rows - first), generator) for first in range(0, rows, 250)]


def run_neighbours(
    options: dict[str, dict[str, Any]],
    frames: int,
    side: int,
    number: int,
    variant: str,
    seed: int,
    steps: int,
    advance: Advance,
) -> tuple[Scores, Curve]:
    """Train one variant to say what is beside an object."""

    def make(rows: int, generator: torch.Generator) -> Batch:
        return ask_neighbours(rows, frames, side, number, generator)[0]

    torch.manual_seed(seed)
    model = CellReader(frames, **options[variant])
    probe = fixed(make, PROBE_ROWS)
    curve = train(model, endless(make, seed), steps, LR, lambda: accuracy(model, probe)["all"], advance)
    found = accuracy(model, fixed(make, TEST_ROWS))
    return {"accuracy": found["all"], **{way: found[way] for way in WAYS}}, curve


def levels_of_neighbours(frames: int, side: int, number: int) -> dict[str, dict[str, float]]:
    """By counting in the test: who sees nothing, and who knows which objects there are but not where.

    Any other object is equally likely to be the one beside, so the best guess is their most frequent colour. In a clip
    there is one between them, who knows which objects each frame has.
    """
    batches = fixed(lambda rows, generator: ask_neighbours(rows, frames, side, number, generator), TEST_ROWS)
    answers = Counter(answer for batch, _ in batches for answer in batch.answer.tolist())
    guesses: dict[str, list[float]] = {"knows which objects there are": []}
    if frames > 1:
        guesses["knows which objects each frame has"] = []
    for batch, cells in batches:
        for row, (_, colour, shape, _) in zip(cells.tolist(), batch.question.tolist(), strict=True):
            asked = colour * len(SHAPES) + shape - word(SHAPES[0])
            start = row.index(asked) // side**2 * side**2
            known = (row, row[start : start + side**2])
            for guess, looks_known in zip(guesses.values(), known):
                others = Counter(look // len(SHAPES) for look in looks_known if look not in (-1, asked))
                guess.append(max(others.values()) / others.total())
    found = {name: {"accuracy": sum(values) / len(values)} for name, values in guesses.items()}
    return {"sees nothing": {"accuracy": max(answers.values()) / answers.total()}, **found}


CCA_SIDE, CCA_NUMBER, CCA_LARGER = 6, 4, (8, 10)
CCA_OPTIONS: dict[str, dict[str, Any]] = {
    "raster": {},
    "concentric": {"rule": "concentric-causal", "scheme": "concentric"},
    "ring positions only": {"scheme": "concentric"},
    # Its temporal position alone: grows by 1 with every text token and every image.
    "one position for the image": {"scheme": "temporal-dual", "scheme_options": {"alpha": 0.0, "beta": 1.0}},
}


def run_cca(variant: str, seed: int, steps: int, advance: Advance) -> tuple[Scores, Curve]:
    """Train one variant to say whether a colour is there; ask it about larger pictures, too."""

    def make(rows: int, generator: torch.Generator, side: int = CCA_SIDE, shapes: bool = True) -> Batch:
        return ask_colours(rows, side, CCA_NUMBER, generator, shapes)

    torch.manual_seed(seed)
    model = CellReader(**CCA_OPTIONS[variant])
    presence = partial(make, shapes=False)
    probe = fixed(presence, PROBE_ROWS)
    curve = train(model, endless(make, seed), steps, LR, lambda: accuracy(model, probe)["all"], advance)
    scores = {
        "presence": accuracy(model, fixed(presence, TEST_ROWS))["all"],
        "shape": accuracy(model, fixed(make, TEST_ROWS))["shape"],
    }
    for side in CCA_LARGER:
        found = accuracy(model, fixed(partial(presence, side=side), TEST_ROWS))
        scores[f"presence, {side} x {side}"] = found["all"]
        scores[f"found, {side} x {side}"] = found["presence, yes"]
    return scores, curve


def levels_of_cca() -> dict[str, dict[str, float]]:
    """By counting in the test: the most frequent answer."""
    answers: dict[str, Counter[int]] = {"presence": Counter(), "shape": Counter()}
    for batch in fixed(lambda rows, generator: ask_colours(rows, CCA_SIDE, CCA_NUMBER, generator, True), TEST_ROWS):
        for kind, answer in zip(batch.kinds, batch.answer.tolist(), strict=True):
            answers[kind.partition(",")[0]][answer] += 1
    found = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    larger = {f"presence, {side} x {side}": found["presence"] for side in CCA_LARGER}
    return {"sees nothing": {**found, **larger}}


MMA_SIZES = {"frames": 1, "side": 4, "number": 10}
MMA_OPTIONS: dict[str, dict[str, Any]] = {rule: {"rule": rule} for rule in ("causal", "modality-mutual", "full-visual")}
FRAME_SIZES = {"frames": 3, "side": 2, "number": 12}
FRAME_OPTIONS: dict[str, dict[str, Any]] = {
    rule: {"rule": rule} for rule in ("causal", "frame-block-causal", "full-visual")
}

MMA = Claim(
    name="mma",
    paper="AKI, arXiv 2503.02597",
    says="Images should see the question: modality-mutual attention beats plain causal attention.",
    task="A picture of 4 x 4 cells with 10 different objects, and the question after it: what colour is the object "
    "left of, right of, above or below another one.",
    variants={
        "causal": "cells see the cells before them",
        "modality-mutual": "causal, and every cell sees the question",
        "full-visual": "causal, and cells see all cells, but not the question",
    },
    comparisons=(("modality-mutual", "causal"), ("full-visual", "causal"), ("modality-mutual", "full-visual")),
    metric="accuracy",
    steps=2000,
    train=partial(run_neighbours, MMA_OPTIONS, *MMA_SIZES.values()),
    levels=partial(levels_of_neighbours, **MMA_SIZES),
    caveats=(
        "This is how soon two layers leave the plateau of a good guess, which can differ much from seed to seed. "
        "Nothing here shows that causal attention could not catch up with more steps.",
        "`full-visual` tells apart what helps: seeing the question, or seeing cells in both directions.",
    ),
)

CCA = Claim(
    name="cca",
    paper="CCA-LLaVA, arXiv 2410.15926",
    says="Concentric positions and the concentric mask bring image tokens nearer to the question and reduce object "
    "hallucination.",
    task="A picture of 6 x 6 cells with 4 objects, and the question after it: is there an object of a colour (in "
    "training, half of the time: which shape it has). Then the same in larger pictures than any of the training.",
    variants={
        "raster": "sequential positions, causal",
        "concentric": "ring positions and the concentric mask: the paper's",
        "ring positions only": "ring positions, causal",
        "one position for the image": "all cells at one position, causal: as near as can be, and no rings",
    },
    comparisons=(
        ("concentric", "raster"),
        ("ring positions only", "raster"),
        ("one position for the image", "raster"),
        ("concentric", "one position for the image"),
    ),
    metric="presence",
    steps=800,
    train=run_cca,
    levels=levels_of_cca,
    caveats=(
        "The control puts the whole picture at one position: the distance to the question is shortened even more, and "
        "there are no rings. What it does as well as the rings is not the rings' merit but the shorter distance's.",
        "Rings also forget where things are: a question about places is not asked here.",
    ),
)

FRAME_BLOCK = Claim(
    name="frame-block",
    paper="TC-LLaVA, arXiv 2409.03206",
    says="Frame-wise block causal attention, in which the tokens of one frame see each other, beats plain causal "
    "attention.",
    task="3 frames of 2 x 2 cells, 12 different objects, and the question after them: what colour is the object "
    "left of, right of, above or below another one of its frame.",
    variants={
        "causal": "cells see the cells before them",
        "frame-block-causal": "causal, and cells see all cells of their frame",
        "full-visual": "causal, and cells see all cells of all frames",
    },
    comparisons=(
        ("frame-block-causal", "causal"),
        ("full-visual", "causal"),
        ("frame-block-causal", "full-visual"),
    ),
    metric="accuracy",
    steps=2000,
    train=partial(run_neighbours, FRAME_OPTIONS, *FRAME_SIZES.values()),
    levels=partial(levels_of_neighbours, **FRAME_SIZES),
    caveats=(
        "This is how soon the task is learned, not how well it can be: nothing here shows that causal attention could "
        "not catch up.",
        "The size was chosen because the task starts to be learned there; on a plateau that no variant leaves, there "
        "is nothing to compare.",
    ),
)
