"""The world with sound: clips as they were, sounds where they belong, and questions that need what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmzoo.media import read_audio
from mmzoo.world import make_clip
from mmzoo.world_sound import (
    CONTACTS,
    NEEDS,
    SAMPLE_RATE,
    SOUND_KINDS,
    SOUND_VOCABULARY,
    TONES,
    SoundClip,
    make_sound_clip,
    prior_accuracy,
    without_sound,
    write_sound_clip,
)
from mmzoo_training.world_sound import EVENTS, SOUNDS, heard, hits, pairs


@pytest.fixture(scope="module")
def clips() -> list[SoundClip]:
    return [make_sound_clip(i, split="test") for i in range(500)]


def test_the_clips_are_those_of_the_world(clips: list[SoundClip]) -> None:
    for i, one in enumerate(clips[:20]):
        silent = make_clip(i, split="test", contacts=CONTACTS)
        assert one.clip == silent
        assert np.array_equal(one.clip.frames, silent.frames)


def test_the_same_arguments_give_the_same_sound(clips: list[SoundClip]) -> None:
    again = make_sound_clip(3, split="test")
    assert (again.sounds, again.questions) == (clips[3].sounds, clips[3].questions)
    assert np.array_equal(again.waveform, clips[3].waveform)
    assert not np.array_equal(make_sound_clip(3, split="val").waveform, again.waveform)


def loudest(clip: SoundClip, time: float) -> float:
    """Hertz of what is heard from a moment on."""
    first = round(time * len(clip.waveform))
    part = clip.waveform[first : first + SAMPLE_RATE // 4]
    spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part))))
    return float(spectrum.argmax() * SAMPLE_RATE / len(part))


def test_every_sound_is_heard_at_its_time(clips: list[SoundClip]) -> None:
    for one in clips[:60]:
        for sound in one.sounds:
            first = round(sound.time * len(one.waveform))
            assert np.abs(one.waveform[first : first + 800]).max() > 0.2
            if sound.name in TONES and len(one.sounds) == 1:
                assert loudest(one, sound.time) == pytest.approx(TONES[sound.name], abs=20)
        if not one.sounds:
            assert np.abs(one.waveform).max() < 0.05


def test_answers_are_what_the_scene_says(clips: list[SoundClip]) -> None:
    for one in clips:
        appear = {thing.colour: thing.appear for thing in one.clip.objects}
        by_name = {sound.name: sound for sound in one.sounds}
        for question in one.questions:
            assert question.answer in question.options
            if question.kind == "colour of sound":
                assert by_name[question.about].time == appear[question.answer]
            if question.kind == "sound of colour":
                at_once = [name for name, sound in by_name.items() if sound.time == appear[question.about]]
                assert question.answer == (at_once[0] if at_once else "none")
            if question.kind == "together":
                assert (question.answer == "yes") == (by_name[question.about].time in appear.values())
            if question.kind == "contact":
                moment = next(thing.path[1][0] for thing in one.clip.objects if thing.collides)
                assert (question.answer == "yes") == (abs(one.sounds[0].time - moment) < 1e-9)


def test_no_answer_is_much_more_frequent_than_the_others(clips: list[SoundClip]) -> None:
    priors = prior_accuracy(clips)
    assert list(priors) == list(SOUND_KINDS) == list(NEEDS)
    assert all(level < 0.6 for level in priors.values())
    assert priors["together"] == pytest.approx(0.5)


def test_the_pitch_alone_does_not_tell_whether_an_object_comes_with_it(clips: list[SoundClip]) -> None:
    said = Counter((q.about, q.answer) for one in clips for q in one.questions if q.kind == "together")
    for tone in TONES:
        assert said[tone, "yes"] == pytest.approx(said[tone, "no"], rel=0.35)


def test_the_moments_of_sounds_do_not_tell_whether_something_is_seen_then() -> None:
    """True and false sounds come as early as each other, alone and among the others of their clip.

    The bounds are about four standard errors of 400 questions a side.
    """
    clips = [make_sound_clip(i, split="test", size=2) for i in range(2000)]
    for kind in ("together", "contact"):
        moments: dict[str, list[float]] = {"yes": [], "no": []}
        places: dict[str, list[float]] = {"yes": [], "no": []}
        for one in clips:
            heard_at = [sound.time for sound in one.sounds]
            for question in (question for question in one.questions if question.kind == kind):
                moment = next(sound.time for sound in one.sounds if question.about in ("", sound.name))
                moments[question.answer].append(moment)
                places[question.answer].append(sum(time < moment for time in heard_at))
        assert min(map(len, moments.values())) > 300
        assert np.mean(moments["yes"]) == pytest.approx(np.mean(moments["no"]), abs=0.05)
        assert np.std(moments["yes"]) == pytest.approx(np.std(moments["no"]), abs=0.04)
        assert np.mean(places["yes"]) == pytest.approx(np.mean(places["no"]), abs=0.2)


def test_every_word_is_known(clips: list[SoundClip]) -> None:
    for question in (question for one in clips for question in one.questions):
        assert set(question.text.split()) | {question.answer} <= set(SOUND_VOCABULARY)


def test_some_clips_are_silent_and_some_sounds_mislead(clips: list[SoundClip]) -> None:
    assert 0.05 < sum(not one.sounds for one in clips) / len(clips) < 0.25
    assert 0.1 < sum(not sound.true for one in clips for sound in one.sounds) / len(clips) < 0.6


def test_a_film_has_its_sound(clips: list[SoundClip], tmp_path: Path) -> None:
    one = next(one for one in clips if len(one.sounds) == 1)
    write_sound_clip(one, tmp_path / "a.mp4")
    read = read_audio(tmp_path / "a.mp4").waveform
    assert np.abs(np.flatnonzero(np.abs(read) > 0.15)[0] - one.sounds[0].time * len(one.waveform)) < 0.05 * SAMPLE_RATE
    assert not without_sound(one).waveform.any()


def test_pairs_are_what_is_seen_and_heard_in_one_frame(clips: list[SoundClip]) -> None:
    """The sounds that a training clip's frames are described by are in the same frames as what makes them."""
    some = clips[:60]
    sounds, collisions, found = heard(some, 8), hits(some, 8), pairs(some, 8)
    assert found.shape == (60, 8, len(EVENTS), len(SOUNDS) - 1)
    assert found.sum() == sum(sound.true for clip in some for sound in clip.sounds) > 0
    for i, frame, event, sound in found.nonzero().tolist():
        assert SOUNDS[sounds[i, frame]] == SOUNDS[sound + 1]
        if EVENTS[event] == "hit":
            assert SOUNDS[sound + 1] == "click" and collisions[i, frame] == 1
        else:
            appear = next(thing.appear for thing in some[i].clip.objects if thing.colour == EVENTS[event])
            assert int(appear * 8) == frame
    assert collisions.sum() == sum(clip.clip.kind == "collision" for clip in some) > 0
