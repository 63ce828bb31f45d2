"""The small world: the same clip for the same seed, honest questions, and nothing that gives an answer away."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from mmzoo.world import (
    COLOURS,
    HELD_OUT,
    QUESTION_KINDS,
    SPLITS,
    TEMPORAL_KINDS,
    VOCABULARY,
    Clip,
    blind_accuracy,
    chance_accuracy,
    make_clip,
    write_clip,
)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(seed) for seed in range(3000)]


def area_mean(frames: np.ndarray, size: int) -> np.ndarray:
    """[T, H, W, 3] -> float [T, size, size, 3]."""
    num_frames, height = frames.shape[:2]
    return frames.reshape(num_frames, size, height // size, size, height // size, 3).mean((2, 4))


def test_a_seed_gives_one_clip():
    for split in SPLITS:
        one, again = make_clip(7, split=split), make_clip(7, split=split)
        assert one == again and np.array_equal(one.frames, again.frames)
        assert one.frames.dtype == np.uint8 and one.frames.shape == (8, 32, 32, 3)


def test_the_splits_share_no_clip():
    scenes = [make_clip(seed, split=split).objects for split in SPLITS for seed in range(200)]
    assert len(set(scenes)) == len(scenes)


@pytest.mark.parametrize("wrong", [{"split": "dev"}, {"size": 0}, {"num_frames": 0}])
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_clip(0, **wrong)


def test_reversal_changes_every_temporal_answer_and_no_other(clips):
    seen = Counter()
    for clip in clips:
        back = clip.reversed()
        assert np.array_equal(back.frames, clip.frames[::-1])
        for question, turned in zip(clip.questions, back.questions):
            assert question.text == turned.text
            assert (question.answer != turned.answer) == (question.kind in TEMPORAL_KINDS)
            seen[question.kind] += 1
    assert set(seen) == set(QUESTION_KINDS)


def test_the_reversed_scene_is_the_reversed_video():
    for seed in range(40):
        back = make_clip(seed).reversed()
        assert np.abs(back.render(32).astype(int) - back.frames).max() <= 1
        assert [question.answer for question in back.reversed().questions] == [
            question.answer for question in make_clip(seed).questions
        ]


def test_answers_say_what_the_frames_show(clips):
    """From the pixels: in the frame in which the answer to "first" is seen first, the answer to "last" is not seen."""
    for clip in clips[:300]:
        answers = {question.kind: question.answer for question in clip.questions}
        if "first" not in answers:
            continue
        seen = {}
        for name in (answers["first"], answers["last"]):
            match = np.abs(clip.render(64).astype(int) - COLOURS[name]).max(-1) == 0
            seen[name] = np.flatnonzero(match.any((1, 2)))
        first, last = seen[answers["first"]], seen[answers["last"]]
        assert first[0] < last[0] and first[-1] < last[-1]


def test_every_word_is_in_the_vocabulary(clips):
    used = {word for clip in clips for q in clip.questions for word in (*q.text.split(), *q.options, q.answer)}
    assert used == set(VOCABULARY) and len(set(VOCABULARY)) == len(VOCABULARY)
    assert all(q.answer in q.options for clip in clips for q in clip.questions)


def test_objects_of_a_clip_differ_and_stay_in_the_picture(clips):
    for clip in clips:
        assert len({thing.colour for thing in clip.objects}) == len({thing.shape for thing in clip.objects})
        assert len({thing.colour for thing in clip.objects}) == len(clip.objects)
        for thing in clip.objects:
            for _, x, y in thing.path:
                assert thing.radius <= min(x, y) + 1e-9 and max(x, y) <= 1 - thing.radius + 1e-9


def test_answers_are_balanced(clips):
    counts = {kind: Counter() for kind in QUESTION_KINDS}
    options = {}
    for clip in clips:
        for question in clip.questions:
            counts[question.kind][question.answer] += 1
            options[question.kind] = question.options
    for kind, count in counts.items():
        expected = sum(count.values()) / len(options[kind])
        assert sum((count[answer] - expected) ** 2 for answer in options[kind]) / expected < 20, (kind, count)


def test_the_text_of_a_question_does_not_tell_the_answer(clips):
    """A majority vote per question text, learned on one half. What is left is what the held-out combinations imply."""
    votes: dict[str, Counter] = {}
    for clip in clips[:1500]:
        for question in clip.questions:
            votes.setdefault(question.text, Counter())[question.answer] += 1
    right: dict[str, list[bool]] = {}
    for clip in clips[1500:]:
        for question in clip.questions:
            guess = votes[question.text].most_common(1)[0][0]
            right.setdefault(question.kind, []).append(guess == question.answer)
    chance = chance_accuracy(clips)
    implied = {"colour": 0.08, "shape": 0.09}
    for kind, hits in right.items():
        assert np.mean(hits) < chance[kind] + implied.get(kind, 0) + 0.06, kind


def test_no_property_of_an_object_tells_who_was_first_or_who_hit(clips):
    """Whatever does not depend on the order of the frames is as often larger for the answer as for its opposite."""
    properties = {
        "place in the list": lambda clip, thing: clip.objects.index(thing),
        "colour": lambda clip, thing: list(COLOURS).index(thing.colour),
        "brightness": lambda clip, thing: sum(COLOURS[thing.colour]),
        "shape": lambda clip, thing: thing.shape,
        "time seen": lambda clip, thing: round(thing.disappear - thing.appear, 6),
        "length of the path": lambda clip, thing: np.ptp(np.array(thing.path)[:, 1:], axis=0).sum(),
        "x": lambda clip, thing: thing.path[0][1] + thing.path[-1][1],
        "y": lambda clip, thing: thing.path[0][2] + thing.path[-1][2],
        "from the middle": lambda clip, thing: abs(np.array(thing.path)[:, 1:].mean(0) - 0.5).sum(),
    }
    for one, other in (("first", "last"), ("hitter", "hit")):
        larger: dict[str, list[int]] = {name: [] for name in properties}
        for clip in clips:
            answers = {question.kind: question.answer for question in clip.questions}
            if one not in answers:
                continue
            pair = [next(t for t in clip.objects if t.colour == answers[kind]) for kind in (one, other)]
            for name, value in properties.items():
                a, b = (value(clip, thing) for thing in pair)
                larger[name] += [a > b] if a != b else []
        for name, results in larger.items():
            if results:
                assert abs(np.mean(results) - 0.5) < 2 / np.sqrt(len(results)) + 0.005, (one, name)


def test_the_mean_frame_does_not_tell_the_direction_of_time(clips):
    """A linear reader of the mean frame finds the line of the collision, but not from which end it was run."""
    features, targets = [], []
    for clip in clips:
        pair = [thing for thing in clip.objects if thing.collides]
        if not pair:
            continue
        x, y = (np.array(pair[0].path) - np.array(pair[1].path))[0, 1:]
        targets.append(np.sign(x + y) * (1 if pair[0].hits else -1))
        features.append(np.append(area_mean(clip.frames.mean(0, keepdims=True), 8).reshape(-1) / 255, 1))
    x, y, half = np.array(features), np.array(targets), len(targets) // 2
    weights = np.linalg.solve(x[:half].T @ x[:half] + np.eye(x.shape[1]), x[:half].T @ y[:half])
    assert abs((np.sign(x[half:] @ weights) == y[half:]).mean() - 0.5) < 0.06


def test_held_out_combinations_occur_in_their_split_only(clips):
    for clip in clips + [make_clip(seed, split="test") for seed in range(300)]:
        assert HELD_OUT.isdisjoint((thing.colour, thing.shape) for thing in clip.objects)
        asked = {tuple(question.about.split()) for question in clip.questions if question.kind == "presence"}
        assert HELD_OUT.isdisjoint(asked)
    for seed in range(300):
        clip = make_clip(seed, split="unseen")
        new = [thing for thing in clip.objects if (thing.colour, thing.shape) in HELD_OUT]
        assert new
        named = {question.about for question in clip.questions if question.kind in ("colour", "shape", "direction")}
        assert named <= {word for thing in new for word in (thing.colour, thing.shape)}


def test_absent_combinations_are_mostly_of_words_that_are_there(clips):
    hard = []
    for clip in clips:
        for question in clip.questions:
            if question.answer == "no":
                colour, shape = question.about.split()
                hard.append(
                    any(thing.colour == colour for thing in clip.objects)
                    and any(thing.shape == shape for thing in clip.objects)
                )
    assert 0.65 < np.mean(hard) < 0.85


def test_blind_levels(clips):
    blind, chance = blind_accuracy(clips), chance_accuracy(clips)
    assert list(blind) == list(chance) == list(QUESTION_KINDS)
    assert all(blind[kind] >= chance[kind] - 1e-9 for kind in QUESTION_KINDS)
    assert blind["count"] == pytest.approx(1 / 3) and blind["direction"] == pytest.approx(1 / 4)
    assert blind["hitter"] == pytest.approx(1 / 3) and 0.39 < blind["first"] < 0.45
    assert 0.5 < blind["colour"] < 0.6 and 0.5 < blind["shape"] < 0.6 and 0.55 < blind["presence"] < 0.7
    assert blind_accuracy([]) == {}


def test_a_scene_is_the_same_at_any_size(clips):
    for clip in clips[:60]:
        difference = np.abs(area_mean(clip.render(128), 32) - clip.frames)
        assert difference.mean() < 0.5 and difference.max() < 100  # Most at the tip of a triangle.
        assert clip.render(48, 24).shape == (24, 48, 48, 3)
        assert np.array_equal(clip.render(32), clip.frames)


def test_a_written_clip_is_read_back(tmp_path, clips):
    from mmzoo.media import read_video

    for clip in clips[:3]:
        path = tmp_path / "clip.mp4"
        write_clip(clip, path)
        frames = read_video(path, sampling="all").frames
        assert frames.shape == (8, 128, 128, 3)
        assert np.abs(area_mean(frames, 32) - clip.frames).mean() < 3


def test_the_world_needs_neither_torch_nor_transformers():
    code = "import sys, mmzoo.world; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'av')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
