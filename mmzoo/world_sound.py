"""The world with sound: what is heard when shapes appear or run into each other, and questions about both.

The clips are those of `mmzoo.world`. Each object that appears makes a tone of its own pitch, but some appear in
silence, some tones come when nothing appears, and the click of a collision is heard at its moment or at another one. So
what is asked about sight and sound together can be told from neither alone.

Shape legend: S samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

from mmzoo.world import BEATS, COLOURS, VOCABULARY, Clip, Object, Question, Split, make_clip

SAMPLE_RATE = 16000
SECONDS = 4.0
"""How long a clip lasts, at two frames a second as FAVOR sees it."""
TONES = {"low": 300.0, "middle": 900.0, "high": 2700.0}
"""Hertz."""
LENGTH = 0.4
CONTACTS = (0.15, 0.85)
"""Between which moments, from 0 to 1, objects run into each other: far enough apart to see that a click is false."""
SOUND_NUMBERS = ("none", "one", "two", "three")

_ASK: dict[str, tuple[str, tuple[str, ...]]] = {
    "sounds": ("how many sounds are there", SOUND_NUMBERS),
    "first sound": ("which sound comes first", tuple(TONES)),
    "count": ("how many objects are there", SOUND_NUMBERS[1:]),
    "first": ("which colour appears first", tuple(COLOURS)),
    "colour of sound": ("which colour appears with the {} sound", tuple(COLOURS)),
    "sound of colour": ("which sound comes with the {} object", (*TONES, "none")),
    "together": ("does the {} sound come with an object", ("yes", "no")),
    "contact": ("is the hit heard", ("yes", "no")),
}
SOUND_KINDS = tuple(_ASK)
NEEDS = {
    "sounds": "sound",
    "first sound": "sound",
    "count": "sight",
    "first": "sight",
    "colour of sound": "both",
    "sound of colour": "both",
    "together": "both",
    "contact": "both",
}
"""What a kind of question can be answered from."""
SOUND_VOCABULARY = tuple(
    dict.fromkeys(
        (
            *VOCABULARY,
            *(word for text, options in _ASK.values() for word in (*text.replace("{}", "").split(), *options)),
            *TONES,
        )
    )
)


@dataclass(frozen=True)
class Sound:
    """One sound.

    Attributes:
        name: a key of `TONES`, or "click".
        time: when it begins, from 0 to 1 as in the clip.
        source: the colour of the object that appears with it; "" for none, and for a click.
        true: whether something that is seen makes it.
    """

    name: str
    time: float
    source: str
    true: bool


@dataclass(frozen=True)
class SoundClip:
    """A clip of the world with its sounds.

    Attributes:
        clip: what is seen. Its own questions are those of the world without sound.
        sounds: in the order of their beginnings.
        questions: on sight, sound or both; `NEEDS` says which.
        waveform: float32 [S] at `SAMPLE_RATE`, as long as the clip.
    """

    clip: Clip
    sounds: tuple[Sound, ...]
    questions: tuple[Question, ...]
    waveform: np.ndarray = field(repr=False, compare=False)


def make_sound_clip(seed: int, *, split: Split = "train", size: int = 32, num_frames: int = 8) -> SoundClip:
    """The clip that `make_clip` makes of the same arguments and `CONTACTS`, with sounds and questions of its own."""
    clip = make_clip(seed, split=split, size=size, num_frames=num_frames, contacts=CONTACTS)
    rng = Random(f"mmzoo.world_sound/{split}/{seed}")
    sounds = tuple(sorted((_tones if clip.kind == "appear" else _click)(rng, clip), key=lambda sound: sound.time))
    return SoundClip(clip, sounds, tuple(_questions(rng, clip, sounds)), _synthesised(rng, sounds))


def write_sound_clip(clip: SoundClip, path: str | Path, *, size: int = 128, silent: bool = False) -> None:
    """Writes a clip as an H.264 film with its sound, at the pace at which it is heard."""
    from mmzoo.media import write_video

    frames = clip.clip.render(size)
    audio = None if silent else clip.waveform
    write_video(frames, path, fps=len(frames) / SECONDS, audio=audio, sample_rate=SAMPLE_RATE)


def prior_accuracy(clips: Iterable[SoundClip]) -> dict[str, float]:
    """For each kind, the share of its most frequent answer: the level of one who neither sees nor hears."""
    answers: dict[str, list[str]] = {}
    for question in (question for clip in clips for question in clip.questions):
        answers.setdefault(question.kind, []).append(question.answer)
    found = {kind: answers[kind] for kind in SOUND_KINDS if kind in answers}
    return {kind: max(map(said.count, said)) / len(said) for kind, said in found.items()}


def _tones(rng: Random, clip: Clip) -> list[Sound]:
    """A pitch of its own for most objects, and a pitch that is left over when nothing appears, half of the time."""
    objects, pitches = list(clip.objects), rng.sample(tuple(TONES), 3)
    silent = rng.random() < 0.1
    sounds = []
    for thing, pitch in zip(objects, pitches, strict=False):
        if not silent and rng.random() < 0.75:
            sounds.append(Sound(pitch, thing.appear, thing.colour, True))
    taken = {sound.name for sound in sounds}
    left = [pitch for pitch in TONES if pitch not in taken]
    if not silent and left and rng.random() < 0.6:
        # Drawn as the moments of the objects are, or the tone's own would tell.
        moments = {thing.appear for thing in objects}
        last = BEATS - round(BEATS * (objects[0].disappear - objects[0].appear))
        free = [i / BEATS for i in range(last + 1) if i / BEATS not in moments]
        sounds.append(Sound(rng.choice(left), rng.choice(free), "", False))
    return sounds


def _click(rng: Random, clip: Clip) -> list[Sound]:
    """A click at the collision, at another moment, or none."""
    moment = next(thing.path[1][0] for thing in clip.objects if thing.collides)
    chance = rng.random()
    if chance < 0.45:
        return [Sound("click", moment, "", True)]
    if chance < 0.9:
        # Half of their range away: false clicks come when collisions happen, as often at each moment as they do.
        first, last = CONTACTS
        away = first + (moment - first + (last - first) / 2) % (last - first)
        return [Sound("click", away, "", False)]
    return []


def _questions(rng: Random, clip: Clip, sounds: tuple[Sound, ...]) -> list[Question]:
    if clip.kind == "collision":
        heard = [_ask("contact", "yes" if sound.true else "no") for sound in sounds]
        return [_ask("sounds", SOUND_NUMBERS[len(sounds)]), *heard]
    objects = sorted(clip.objects, key=lambda thing: thing.appear)
    asked = [_ask("sounds", SOUND_NUMBERS[len(sounds)]), _ask("count", SOUND_NUMBERS[len(objects)])]
    asked += [_ask("first sound", sounds[0].name)] if len(sounds) > 1 else []
    if len(objects) > 1:
        asked.append(_ask("first", objects[0].colour))
        asked += [_ask("colour of sound", sound.source, sound.name) for sound in sounds if sound.true]
    asked += [_ask("sound of colour", _sound_of(thing, sounds), thing.colour) for thing in objects]
    # Any of the true ones, since the last of them would be known by coming late.
    one_of_each = {sound.true: sound for sound in rng.sample(sounds, len(sounds))}
    if len(one_of_each) == 2:  # else the number of sounds would tell
        asked += [_ask("together", "yes" if true else "no", sound.name) for true, sound in one_of_each.items()]
    return asked


def _sound_of(thing: Object, sounds: tuple[Sound, ...]) -> str:
    return next((sound.name for sound in sounds if sound.source == thing.colour), "none")


def _ask(kind: str, answer: str, about: str = "") -> Question:
    text, options = _ASK[kind]
    return Question(kind, text.format(about), answer, options, about)


def _synthesised(rng: Random, sounds: tuple[Sound, ...]) -> np.ndarray:
    """Tones that fade out, clicks of noise, and a little noise under all."""
    noise = np.random.default_rng(rng.getrandbits(32))
    waveform = 0.002 * noise.standard_normal(round(SECONDS * SAMPLE_RATE)).astype(np.float32)
    for sound in sounds:
        first = round(sound.time * len(waveform))
        length = min(round((0.06 if sound.name == "click" else LENGTH) * SAMPLE_RATE), len(waveform) - first)
        time = np.arange(length, dtype=np.float32) / SAMPLE_RATE
        if sound.name == "click":
            made = noise.uniform(-0.7, 0.7, length).astype(np.float32)
        else:
            made = (0.4 * np.sin(2 * np.pi * TONES[sound.name] * time) * np.minimum(1, time / 0.01)).astype(np.float32)
        waveform[first : first + length] += made * (1 - time / (length / SAMPLE_RATE + 1e-6)) ** 0.5
    return waveform.clip(-1, 1)


def without_sound(clip: SoundClip) -> SoundClip:
    """The same clip, silent; its questions keep the answers that the sound gave."""
    return replace(clip, waveform=np.zeros_like(clip.waveform))
