"""A small synthetic world: seeded clips of coloured shapes with questions that have no shortcut.

In half of the clips one to three objects appear one after another, move, and disappear in the order in which they came.
In the other half one object runs into another and stops, the other moves on, and a third stands by on the same line.
The world is symmetric under time reversal: a scene and its reversal are equally likely. So whoever does not know which
way time runs answers a temporal question at 1/2 at best, and the reversed clip, in which each of these answers is
another one, is the control for every result.

A scene is continuous in space and time and is rendered at any size: `clip.render(256)` to look at, 32 to 48 pixels to
learn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import permutations
from math import hypot
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test", "unseen"]

COLOURS = {
    "red": (230, 50, 50),
    "green": (50, 190, 70),
    "blue": (60, 100, 250),
    "yellow": (240, 215, 50),
    "purple": (190, 70, 230),
    "white": (240, 240, 240),
}
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUMBERS = ("one", "two", "three")
HELD_OUT = frozenset({("red", "square"), ("green", "circle"), ("blue", "triangle")})
"""Combinations that occur in the split "unseen" only, in each of its clips."""

SPLITS: tuple[Split, ...] = ("train", "val", "test", "unseen")

_ASK: dict[str, tuple[str, tuple[str, ...]]] = {
    "colour": ("what colour is the {}", tuple(COLOURS)),
    "shape": ("what shape is the {} object", SHAPES),
    "presence": ("is there a {}", ("yes", "no")),
    "count": ("how many objects are there", NUMBERS),
    "direction": ("which way does the {} object move", tuple(DIRECTIONS)),
    "first": ("which colour appears first", tuple(COLOURS)),
    "last": ("which colour appears last", tuple(COLOURS)),
    "hitter": ("which colour hits another object", tuple(COLOURS)),
    "hit": ("which colour is hit by another object", tuple(COLOURS)),
}
QUESTION_KINDS = tuple(_ASK)
TEMPORAL_KINDS = ("direction", "first", "last", "hitter", "hit")
"""Kinds whose answer is another one in the reversed clip; the answers of the other kinds stay."""

VOCABULARY = tuple(
    dict.fromkeys(
        word
        for template, options in _ASK.values()
        for word in (*template.replace("{}", "").split(), *options, *COLOURS, *SHAPES)
    )
)
"""Every word of every question and answer."""

BEATS = 8
"""Things appear and disappear on an eighth of the clip, so that 8 frames catch every event."""


@dataclass(frozen=True)
class Object:
    """One coloured shape. Space and time run from 0 to 1, x to the right and y down.

    Attributes:
        colour: a key of `COLOURS`.
        shape: one of `SHAPES`.
        radius: half its size.
        appear: when it is first seen.
        disappear: when it is gone.
        path: knots `(time, x, y)`, joined by straight lines. Who takes part in a collision has a knot at its moment.
    """

    colour: str
    shape: str
    radius: float
    appear: float
    disappear: float
    path: tuple[tuple[float, float, float], ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def direction(self) -> str | None:
        """The way it moves, a key of `DIRECTIONS`; None at rest."""
        (_, x0, y0), (_, x1, y1) = self.path[0], self.path[-1]
        if (x0, y0) == (x1, y1):
            return None
        return max(DIRECTIONS, key=lambda way: (x1 - x0) * DIRECTIONS[way][0] + (y1 - y0) * DIRECTIONS[way][1])

    @property
    def collides(self) -> bool:
        return len(self.path) == 3

    @property
    def hits(self) -> bool:
        """Whether it runs into another object: it moves first and rests after the contact."""
        return self.collides and self.path[0][1:] != self.path[1][1:]

    def at(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where its centre is: x and y, float64, in the shape of `times`."""
        t, x, y = zip(*self.path)
        return np.interp(times, t, x), np.interp(times, t, y)

    def reversed(self) -> Object:
        path = tuple((1 - t, x, y) for t, x, y in self.path[::-1])
        return replace(self, appear=1 - self.disappear, disappear=1 - self.appear, path=path)


@dataclass(frozen=True)
class Question:
    """One question on one clip.

    Attributes:
        kind: one of `QUESTION_KINDS`.
        text: words of `VOCABULARY`, lower case, joined by blanks.
        answer: one word, one of `options`.
        options: all words that can answer this kind.
        about: the words of the text that name an object ("" where it names none).
    """

    kind: str
    text: str
    answer: str
    options: tuple[str, ...]
    about: str = ""


@dataclass(frozen=True)
class Clip:
    """A scene, its frames, and its questions.

    Attributes:
        kind: "appear" or "collision".
        objects: in no particular order.
        questions: every question that this clip can answer, in no particular order.
        background: its grey level, 0 to 255.
        frames: uint8 [num_frames, size, size, 3], RGB.
    """

    kind: Literal["appear", "collision"]
    objects: tuple[Object, ...]
    questions: tuple[Question, ...]
    background: int
    frames: np.ndarray = field(repr=False, compare=False)

    def render(self, size: int, num_frames: int | None = None) -> np.ndarray:
        """The same scene at another size: uint8 [num_frames, size, size, 3]; as many frames as `frames` by default."""
        return _render(self.objects, self.background, size, num_frames or len(self.frames))

    def reversed(self) -> Clip:
        """The clip played backwards, with the same questions and the answers that are then right."""
        objects = tuple(thing.reversed() for thing in self.objects)
        questions = tuple(_ask(question.kind, objects, question.about) for question in self.questions)
        return replace(self, objects=objects, questions=questions, frames=self.frames[::-1].copy())


def make_clip(
    seed: int,
    *,
    split: Split = "train",
    size: int = 32,
    num_frames: int = 8,
    contacts: tuple[float, float] = (0.35, 0.65),
) -> Clip:
    """Makes one clip. The same arguments give the same clip, and each split draws from a stream of its own.

    Args:
        seed: any integer.
        split: "train", "val" and "test" are alike. In "unseen" at least one object of each clip is of a combination in
            `HELD_OUT`, and the questions that name an object name such a one.
        size: height and width of the frames.
        num_frames: frames of the clip. With fewer than 8, events can fall between two frames.
        contacts: between which moments, from 0 to 1, objects run into each other.

    Raises:
        ValueError: an unknown split, or a size or number of frames below 1.
    """
    if split not in SPLITS or size < 1 or num_frames < 1:
        raise ValueError(f"No clip with split={split!r} (of {SPLITS}), size={size}, num_frames={num_frames}.")
    rng = Random(f"mmzoo.world/{split}/{seed}")
    kind: Literal["appear", "collision"] = rng.choice(("appear", "collision"))
    looks = _looks(rng, 3 if kind == "collision" else rng.randint(1, 3), split == "unseen")
    objects = _collision(rng, looks, contacts) if kind == "collision" else _appearances(rng, looks)
    questions = list(_questions(rng, kind, objects, split == "unseen"))
    rng.shuffle(questions)
    background = rng.randint(10, 60)
    return Clip(kind, objects, tuple(questions), background, _render(objects, background, size, num_frames))


def make_bouncing_clip(seed: int, *, split: Split = "train", size: int = 32, num_frames: int = 64) -> Clip:
    """Makes a clip of any length in which one or two objects go to and fro for good; nothing is asked about it.

    They move along one axis, each on a line of its own, at a steady speed, and turn at the edges. So who saw a few
    frames knows all that come.

    Args:
        seed: any integer.
        split: as in `make_clip`.
        size: height and width of the frames.
        num_frames: frames of the clip; a longer one of the same seed begins as a shorter one does.

    Raises:
        ValueError: an unknown split, or a size or number of frames below 1.
    """
    if split not in SPLITS or size < 1 or num_frames < 1:
        raise ValueError(f"No clip with split={split!r} (of {SPLITS}), size={size}, num_frames={num_frames}.")
    rng = Random(f"mmzoo.world/bouncing/{split}/{seed}")
    looks = _looks(rng, 1 if split == "unseen" else rng.randint(1, 2), split == "unseen")
    radius, upright = rng.uniform(0.10, 0.125), rng.random() < 0.5
    lanes = [rng.uniform(radius, 1 - radius)]
    while len(lanes) < len(looks):
        lane = rng.uniform(radius, 1 - radius)
        lanes += [lane] if abs(lane - lanes[0]) > 2.4 * radius else []
    objects = []
    for (colour, shape), lane in zip(looks, lanes):
        knots = _to_and_fro(rng.uniform(0, 2), rng.uniform(0.03, 0.06), radius, num_frames)
        path = tuple((time, lane, along) if upright else (time, along, lane) for time, along in knots)
        objects.append(Object(colour, shape, radius, 0, 1, path))
    background = rng.randint(10, 60)
    return Clip("appear", tuple(objects), (), background, _render(tuple(objects), background, size, num_frames))


def _to_and_fro(phase: float, speed: float, radius: float, num_frames: int) -> list[tuple[float, float]]:
    """(time, place) of the turns between `radius` and 1 - `radius`: phase 0 to 1 there, 1 to 2 back; speed a frame."""
    length = 1 - 2 * radius
    phases = phase, phase + speed * num_frames / length
    turns = [float(turn) for turn in range(int(phases[0]) + 1, int(phases[1]) + 1)]
    return [
        ((p - phases[0]) / (phases[1] - phases[0]), radius + length * (1 - abs(p % 2 - 1)))
        for p in (phases[0], *(turn for turn in turns if turn < phases[1]), phases[1])
    ]


def write_clip(clip: Clip, path: str | Path, *, size: int = 128, num_frames: int | None = None, fps: float = 8) -> None:
    """Writes a clip as an H.264 file.

    Args:
        clip: the clip.
        path: of the file; an existing one is replaced.
        size: height and width in pixels, even.
        num_frames: as many as the clip has by default.
        fps: frames a second.
    """
    from mmzoo.media import write_video

    write_video(clip.render(size, num_frames), path, fps=fps)


def chance_accuracy(clips: Iterable[Clip]) -> dict[str, float]:
    """The accuracy of a blind guess among the options, for each kind that the clips ask about."""
    return _mean_by_kind((question.kind, 1 / len(question.options)) for clip in clips for question in clip.questions)


def blind_accuracy(clips: Iterable[Clip]) -> dict[str, float]:
    """The accuracy of the best guess of one who knows which colours and shapes exist, but not what is asked.

    It knows which combinations training never shows, too; in a clip that holds one of them that would mislead it, so
    there it is taken not to know. A result means something above this level (and, for `TEMPORAL_KINDS`, above 1/2,
    which is the level of one who sees the whole clip but not which way time runs).

    Returns:
        accuracy for each kind that the clips ask about.
    """
    clips = list(clips)
    levels = _mean_by_kind((q.kind, _blind_guess(clip, q)) for clip in clips for q in clip.questions)
    if "presence" in levels:  # "no" if the colour or the shape is missing; else the more frequent answer.
        asked = [(q.answer, _could_be(clip, q)) for clip in clips for q in clip.questions if q.kind == "presence"]
        open_answers = [answer for answer, possible in asked if possible]
        right = len(asked) - len(open_answers) + max(open_answers.count("yes"), open_answers.count("no"))
        levels["presence"] = right / len(asked)
    return levels


def _mean_by_kind(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {}
    for kind, value in values:
        by_kind.setdefault(kind, []).append(value)
    return {kind: sum(by_kind[kind]) / len(by_kind[kind]) for kind in QUESTION_KINDS if kind in by_kind}


def _could_be(clip: Clip, question: Question) -> bool:
    colour, shape = question.about.split()
    return any(thing.colour == colour for thing in clip.objects) and any(thing.shape == shape for thing in clip.objects)


def _blind_guess(clip: Clip, question: Question) -> float:
    """How likely the best guess is right, for every kind but presence."""
    if question.kind in ("count", "direction"):
        return 1 / len(question.options)
    if question.kind not in ("colour", "shape"):
        return 1 / len(clip.objects)
    colours, shapes = [thing.colour for thing in clip.objects], [thing.shape for thing in clip.objects]
    pairings = [tuple(zip(colours, order)) for order in permutations(shapes)]
    if HELD_OUT.isdisjoint(zip(colours, shapes)):
        pairings = [pairs for pairs in pairings if HELD_OUT.isdisjoint(pairs)]
    guesses = [pair for pairs in pairings for pair in pairs if question.about in pair]
    return max(map(guesses.count, guesses)) / len(pairings)


def _looks(rng: Random, number: int, unseen: bool) -> list[tuple[str, str]]:
    """Colours and shapes, all different. Colours first, then the shapes, so that both stay balanced."""
    while True:
        colours = rng.sample(tuple(COLOURS), number)
        pairings = [list(zip(colours, shapes)) for shapes in permutations(SHAPES, number)]
        pairings = [pairs for pairs in pairings if HELD_OUT.isdisjoint(pairs) != unseen]
        if pairings:
            return rng.choice(pairings)


def _appearances(rng: Random, looks: list[tuple[str, str]]) -> tuple[Object, ...]:
    """Objects that come and go in the same order, each seen equally long, on paths that never touch."""
    number, radius = len(looks), rng.uniform(0.10, 0.125)
    beats = rng.choice((3, 4))
    # All sets of different starts are equally likely, so the law is the same for the reversed clip.
    starts = sorted(rng.sample(range(BEATS - beats + 1), number))
    rng.shuffle(starts)
    while True:
        objects = []
        for (colour, shape), start in zip(looks, starts):
            appear, disappear = start / BEATS, (start + beats) / BEATS
            way, travel = rng.choice(tuple(DIRECTIONS.values())), rng.uniform(0.3, 0.45)
            x, y = (rng.uniform(radius + max(0, -d * travel), 1 - radius - max(0, d * travel)) for d in way)
            path = ((appear, x, y), (disappear, x + way[0] * travel, y + way[1] * travel))
            objects.append(Object(colour, shape, radius, appear, disappear, path))
        if _apart(objects):
            return tuple(objects)


def _apart(objects: list[Object]) -> bool:
    """Whether objects that are seen together never come closer than the corners of two squares need."""
    times = (np.arange(2 * BEATS) + 0.5) / (2 * BEATS)
    for i, one in enumerate(objects):
        for other in objects[:i]:
            together = times[(times > max(one.appear, other.appear)) & (times < min(one.disappear, other.disappear))]
            (x0, y0), (x1, y1) = one.at(together), other.at(together)
            if (np.hypot(x0 - x1, y0 - y1) < 2.4 * one.radius).any():
                return False
    return True


def _collision(rng: Random, looks: list[tuple[str, str]], contacts: tuple[float, float]) -> tuple[Object, ...]:
    """One object runs into another, which moves on; a third one is on their line and, half of the time, leaves or
    comes to it sideways, so that who moves first is not yet who hits."""
    radius, moment = rng.uniform(0.09, 0.10), rng.uniform(*contacts)
    spare = rng.uniform(0.01, 0.05)
    travel = 1 - 6 * radius - 3 * spare
    # Along the line: the first one goes from start to contact, the second one from beside contact to end, and the
    # bystander is before them (then they are shifted) or after them.
    start = radius + spare
    contact, end = start + moment * travel, start + 2 * radius + travel
    shift = (2 * radius + spare) * rng.randint(0, 1)
    beyond = start if shift else end + 2 * radius + spare
    line = rng.uniform(radius, 1 - radius)
    aside = line + (1 if line < 0.5 else -1) * rng.uniform(0.2, 0.35)
    sideways = rng.choice(([line, line], [line, aside], [line, line], [aside, line]))
    flip, turn = rng.random() < 0.5, rng.random() < 0.5

    def knot(time: float, along: float, across: float = line) -> tuple[float, float, float]:
        along = 1 - along if flip else along
        return (time, across, along) if turn else (time, along, across)

    paths = [
        (knot(0, start + shift), knot(moment, contact + shift), knot(1, contact + shift)),
        (knot(0, contact + shift + 2 * radius), knot(moment, contact + shift + 2 * radius), knot(1, end + shift)),
        (knot(0, beyond, sideways[0]), knot(1, beyond, sideways[1])),
    ]
    rng.shuffle(paths)
    return tuple(Object(colour, shape, radius, 0, 1, path) for (colour, shape), path in zip(looks, paths))


def _questions(rng: Random, kind: str, objects: tuple[Object, ...], unseen: bool) -> Iterator[Question]:
    named = [thing for thing in objects if not unseen or (thing.colour, thing.shape) in HELD_OUT]
    yield from (_ask("direction", objects, thing.colour) for thing in named if thing.direction)
    if kind == "appear":  # In a collision there are always three.
        yield _ask("count", objects)
    if len(objects) > 1:  # Alone, it is the only answer.
        yield from (_ask("colour", objects, thing.shape) for thing in named)
        yield from (_ask("shape", objects, thing.colour) for thing in named)
        yield _ask("presence", objects, rng.choice(named).name)
        yield _ask("presence", objects, _absent(rng, rng.choice(named), objects))
        yield from (_ask(each, objects) for each in (("first", "last") if kind == "appear" else ("hitter", "hit")))


def _absent(rng: Random, thing: Object, objects: tuple[Object, ...]) -> str:
    """A combination that is not there, seldom of a colour that is not there either.

    Never a held-out one: it would always be absent in training. The colour is drawn before the shape, as in `_looks`,
    so that each question is answered yes and no equally often.
    """
    colour = thing.colour
    if rng.random() < 1 / 6:
        colour = rng.choice([other for other in COLOURS if other not in [each.colour for each in objects]])
    there = HELD_OUT | {(each.colour, each.shape) for each in objects}
    return f"{colour} {rng.choice([shape for shape in SHAPES if (colour, shape) not in there])}"


def _ask(kind: str, objects: tuple[Object, ...], about: str = "") -> Question:
    template, options = _ASK[kind]
    if kind == "presence":
        answer = "yes" if about in [thing.name for thing in objects] else "no"
    elif kind == "count":
        answer = NUMBERS[len(objects) - 1]
    else:
        answer = _find(kind, objects, about)
    return Question(kind, template.format(about), answer, options, about)


def _find(kind: str, objects: tuple[Object, ...], about: str) -> str:
    """The answer of a kind that asks for a property of one object."""
    if kind == "colour":
        return next(thing.colour for thing in objects if thing.shape == about)
    if kind == "shape":
        return next(thing.shape for thing in objects if thing.colour == about)
    if kind == "direction":
        return next(thing.direction for thing in objects if thing.colour == about and thing.direction)
    if kind in ("hitter", "hit"):
        return next(thing.colour for thing in objects if thing.collides and thing.hits == (kind == "hitter"))
    return (min if kind == "first" else max)(objects, key=lambda thing: thing.appear).colour


def _render(objects: tuple[Object, ...], background: int, size: int, num_frames: int) -> np.ndarray:
    """Paints each object over the frames, with edges one pixel wide."""
    times = (np.arange(num_frames) + 0.5) / num_frames
    pixels = ((np.arange(size) + 0.5) / size).astype(np.float32)
    frames = np.full((num_frames, size, size, 3), background, np.float32)
    for thing in objects:
        seen = np.flatnonzero((times > thing.appear) & (times < thing.disappear))
        centre_x, centre_y = (centre.astype(np.float32)[:, None] for centre in thing.at(times[seen]))
        x, y = (pixels - centre_x)[:, None, :], (pixels - centre_y)[:, :, None]
        covered = np.clip(0.5 - size * _outside(thing.shape, x, y, thing.radius), 0, 1)[..., None]
        frames[seen] += covered * (np.asarray(COLOURS[thing.colour], np.float32) - frames[seen])
    return np.rint(frames).astype(np.uint8)


def _outside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance from the edge, positive outside. x [T, 1, W] and y [T, H, 1] from the centre -> [T, H, W]."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.9 * radius)
    slope = np.float32(hypot(1, 2))  # An upright triangle as high as it is wide.
    return np.maximum(y - np.float32(radius), (2 * np.abs(x) - y - np.float32(radius)) / slope)
