"""The papers' claims rerun small: what is asked, what the controls are, and that an interrupted command goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli import failure, run

from mmzoo.attention import allowed
from mmzoo.errors import InputError
from mmzoo.layout import image, lay_out, text, video
from mmzoo.world import COLOURS, SHAPES
from mmzoo_training import claim_ccam, claim_cells, claim_qformer, claim_video, reproduce
from mmzoo_training.claims import Batch, Claim, accuracy

WAYS = claim_cells.WAYS


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Claim]]:
    """The claims, with runs of 2 steps and small tests."""
    monkeypatch.setattr(claim_ccam, "TEST_CLIPS", 6)
    monkeypatch.setattr(claim_ccam, "PROBE_CLIPS", 4)
    monkeypatch.setattr(claim_ccam, "BATCH", 3)
    monkeypatch.setattr(claim_cells, "TEST_ROWS", 40)
    monkeypatch.setattr(claim_cells, "PROBE_ROWS", 8)
    monkeypatch.setattr(claim_cells, "BATCH", 8)
    for name, value in (("TEST_FILMS", 4), ("PROBE_FILMS", 2), ("BATCH", 2)):
        monkeypatch.setattr(claim_qformer, name, value)
    for name, value in (("TEST_CLIPS", 2), ("PROBE_CLIPS", 1), ("BATCH", 2), ("FRAMES", 29)):
        monkeypatch.setattr(claim_video, name, value)
    claim_video.test_clips.cache_clear()
    found = {name: replace(claim, steps=2) for name, claim in reproduce.CLAIMS.items()}
    monkeypatch.setattr(reproduce, "CLAIMS", found)
    yield found
    claim_video.test_clips.cache_clear()


# What is asked.


@given(frames=st.integers(1, 3), side=st.integers(2, 4), seed=st.integers(0, 99))
def test_the_answer_is_the_colour_beside(frames: int, side: int, seed: int) -> None:
    number = min(18, frames * side * side)
    batch, cells = claim_cells.ask_neighbours(9, frames, side, number, claim_cells.stream(seed))
    for row, question, answer, kind in zip(cells, batch.question, batch.answer, batch.kinds, strict=True):
        way, colour, shape, mark = (claim_cells.WORDS[i] for i in question)
        assert (way, mark) == (kind, "?")
        (asked,) = (row == claim_cells.LOOKS.index((colour, shape))).nonzero()
        frame, y, x = (int(i) for i in torch.unravel_index(asked[0], (frames, side, side)))
        dy, dx = WAYS[way]
        assert 0 <= y + dy < side and 0 <= x + dx < side
        beside = row.view(frames, side, side)[frame, y + dy, x + dx]
        assert claim_cells.LOOKS[beside][0] == claim_cells.WORDS[answer] in COLOURS
        looks = row[row >= 0].tolist()
        assert len(set(looks)) == len(looks) == number


def test_pixels_show_what_the_cells_hold() -> None:
    batch, cells = claim_cells.ask_neighbours(50, 1, 4, 10, claim_cells.stream(0))
    nearest = torch.cdist(batch.pixels.flatten(0, 1), claim_cells.looks()).argmin(1)
    assert torch.equal(nearest, cells.flatten() % 19)
    shown = claim_cells.looks()
    assert len(shown) == len(COLOURS) * len(SHAPES) + 1
    assert torch.cdist(shown, shown).fill_diagonal_(9).min() > 1


@given(side=st.integers(3, 10), seed=st.integers(0, 99))
def test_colours_are_there_or_not(side: int, seed: int) -> None:
    batch = claim_cells.ask_colours(8, side, 4, claim_cells.stream(seed), shapes=True)
    seen = torch.cdist(batch.pixels, claim_cells.looks()).argmin(2)
    for cells, question, answer, kind in zip(seen, batch.question, batch.answer, batch.kinds, strict=True):
        asked, colour, _ = (claim_cells.WORDS[i] for i in question)
        shapes = {claim_cells.LOOKS[i][0]: claim_cells.LOOKS[i][1] for i in cells[cells < 18]}
        assert len(shapes) == 4
        if asked == "shape":
            assert kind == "shape"
            assert shapes[colour] == claim_cells.WORDS[answer]
        else:
            assert claim_cells.WORDS[answer] == ("yes" if colour in shapes else "no")
            assert kind == f"presence, {claim_cells.WORDS[answer]}"
    assert [batch.kinds.count(kind) for kind in ("shape", "presence, yes", "presence, no")] == [4, 2, 2]
    only = claim_cells.ask_colours(8, side, 4, claim_cells.stream(seed), shapes=False)
    assert [only.kinds.count(kind) for kind in ("shape", "presence, yes", "presence, no")] == [0, 4, 4]


@given(seed=st.integers(0, 99))
def test_films_ask_what_is_seen_about_a_tone(seed: int) -> None:
    with patch.object(claim_qformer, "NOISE", 0.0):
        batch = claim_qformer.films(4, claim_cells.stream(seed))
    cells, bands = batch.pixels.split((2 * claim_cells.looks().shape[1], 12), -1)
    seen = torch.cdist(cells.unflatten(-1, (2, -1)), claim_cells.looks()).argmin(-1).amin(-1)
    loud = bands.unflatten(-1, (2, 3, 2)).mean((2, 4)) > 0.5
    answers = batch.answer.view(4, -1).tolist()
    for looks, tones, said in zip(seen, loud, answers, strict=True):
        colours = ["none", *(claim_cells.LOOKS[look][0] for look in looks), "none"]
        assert len(set(colours)) == 7
        assert tones.sum(0).tolist() == [1, 1, 1]
        when = dict(zip(claim_qformer.TONES, tones.int().argmax(0).tolist(), strict=True))
        for (kind, subject), answer in zip(claim_qformer.ASKED, said, strict=True):
            shift = {"before": 0, "with": 1, "after": 2}.get(kind)
            number = claim_qformer.TIMES.index(subject) if kind == "sight" else when[subject]
            right = (
                claim_qformer.TIMES[number] if kind == "sound" else colours[number + (1 if shift is None else shift)]
            )
            assert claim_qformer.WORDS[answer] == right
    assert list(batch.kinds) == [kind for kind, _ in claim_qformer.ASKED] * 4


def test_clips_ask_for_the_first_and_the_last() -> None:
    clips = claim_ccam.test_clips(20)
    batch = claim_ccam.order_questions(list(clips))
    assert batch.pixels.shape == (20, 8, 32, 32, 3)
    for i, clip in enumerate(clips):
        things = sorted(clip.objects, key=lambda thing: thing.appear)
        first, last = (claim_ccam.WORDS[answer] for answer in batch.answer[2 * i : 2 * i + 2])
        assert (first, last) == (things[0].colour, things[-1].colour)
        assert first != last
    assert [claim_ccam.WORDS[i] for i in batch.question[:2, 0]] == ["first", "last"] == list(batch.kinds[:2])


def test_a_run_sees_other_clips_than_the_test_and_the_next_seed() -> None:
    batches = [next(claim_ccam.training(seed)).pixels for seed in (0, 0, 1)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    test = claim_ccam.order_questions(list(claim_ccam.test_clips(32))).pixels
    assert not torch.equal(batches[0], test)
    make = partial(claim_cells.ask_colours, side=6, number=4, shapes=True)

    def pixels(seed: int) -> torch.Tensor:
        return next(claim_cells.endless(lambda rows, generator: make(rows, generator=generator), seed)).pixels

    assert torch.equal(pixels(0), pixels(0))
    assert not torch.equal(pixels(0), pixels(1))


# What a guess is worth, by counting.


def test_levels_of_order() -> None:
    levels = claim_ccam.levels()
    clips = claim_ccam.test_clips(claim_ccam.TEST_CLIPS)
    guess = sum(1 / len(clip.objects) for clip in clips) / len(clips)
    assert levels["knows which objects there are"]["order"] == pytest.approx(guess)
    assert 0.38 < guess < 0.46
    assert levels["sees all but which way time runs"]["order"] == 0.5


def test_levels_of_neighbours() -> None:
    blind, knowing = claim_cells.MMA.levels().values()
    assert 1 / 6 < blind["accuracy"] < 0.19
    # A guesser who names the most frequent colour of the objects that are there, beside the count of the same.
    batches = claim_cells.fixed(lambda n, g: claim_cells.ask_neighbours(n, 1, 4, 10, g), claim_cells.TEST_ROWS)
    right, expected = 0, 0.0
    for batch, cells in batches:
        for row, question, answer in zip(cells, batch.question, batch.answer, strict=True):
            asked = question[1] * 3 + question[2] - claim_cells.word("square")
            others = row[(row >= 0) & (row != asked)] // 3
            counts = others.bincount()
            right += int(counts.argmax() == answer)
            expected += counts.max().item() / 9
    assert expected / claim_cells.TEST_ROWS == pytest.approx(knowing["accuracy"])
    assert right / claim_cells.TEST_ROWS == pytest.approx(knowing["accuracy"], abs=0.03)
    assert knowing["accuracy"] > blind["accuracy"] + 0.05


def test_levels_of_frames() -> None:
    blind, knowing, framed = (level["accuracy"] for level in claim_cells.FRAME_BLOCK.levels().values())
    batches = claim_cells.fixed(lambda n, g: claim_cells.ask_neighbours(n, 3, 2, 12, g), claim_cells.TEST_ROWS)
    expected = 0.0
    for batch, cells in batches:
        for row, question in zip(cells.view(-1, 3, 4), batch.question, strict=True):
            asked = question[1] * 3 + question[2] - claim_cells.word("square")
            (frame,) = row[(row == asked).any(1)]
            expected += (frame[frame != asked] // 3).bincount().max().item() / 3
    assert expected / claim_cells.TEST_ROWS == pytest.approx(framed)
    assert blind < knowing < framed < 0.5


def test_presence_is_asked_yes_and_no_equally_often() -> None:
    (levels,) = claim_cells.CCA.levels().values()
    assert levels["presence"] == levels["presence, 10 x 10"] == 0.5
    assert 1 / 3 < levels["shape"] < 0.4


# The controls.


@pytest.mark.parametrize("sees_time", [True, False])
def test_scores_of_one_who_knows_the_answers(sees_time: bool) -> None:
    clips = claim_ccam.test_clips(9)
    both = claim_ccam.order_questions([*clips, *(clip.reversed() for clip in clips)])
    answers = {frames.numpy().tobytes(): both.answer[2 * i : 2 * i + 2] for i, frames in enumerate(both.pixels)}

    class Oracle(torch.nn.Module):
        def forward(self, frames: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
            given = [frame.numpy().tobytes() for frame in frames]
            known = [key if sees_time else min(key, frames[i].flip(0).numpy().tobytes()) for i, key in enumerate(given)]
            return torch.eye(8)[torch.cat([answers[key] for key in known])]

    scores = claim_ccam.scores(Oracle(), clips)
    right, old, changes = list(scores.values())[3:]
    if sees_time:
        assert (scores["order"], right, old, changes) == (1, 1, 0, 1)
    else:
        assert (changes, old + right) == (0, 1)
        assert scores["order"] == pytest.approx(old)
        assert abs(old - right) > 0.1


@given(seed=st.integers(0, 20))
def test_plain_cross_attention_does_not_know_the_order_of_frames(seed: int) -> None:
    torch.manual_seed(seed)
    order = torch.randperm(8)
    batch = claim_ccam.order_questions(list(claim_ccam.test_clips(3)))
    moved = {}
    for variant, options in claim_ccam.OPTIONS.items():
        model = claim_ccam.ClipReader(**options).double().eval()
        with torch.no_grad():
            there, here = (model(frames, batch.question) for frames in (batch.pixels, batch.pixels[:, order]))
        moved[variant] = (there - here).abs().max().item()
    assert moved.pop("naive") < 1e-12
    assert torch.equal(order, torch.arange(8)) or min(moved.values()) > 1e-9


def test_variants_differ_in_one_thing_only() -> None:
    def weights(make: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return make().state_dict()

    naive, ccam, large, small = (
        weights(partial(claim_ccam.ClipReader, **options)) for options in claim_ccam.OPTIONS.values()
    )
    assert large.keys() - naive.keys() == small.keys() - naive.keys() == {"frame"}
    assert all(torch.equal(naive[name], other[name]) for name in naive for other in (ccam, large, small))
    torch.testing.assert_close(small["frame"], 0.02 * large["frame"])
    for options in (claim_cells.MMA_OPTIONS, claim_cells.CCA_OPTIONS, claim_cells.FRAME_OPTIONS):
        first, *others = (weights(partial(claim_cells.CellReader, **one)) for one in options.values())
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_what_frames_see_in_each_variant_of_the_causal_qformer() -> None:
    """The same weights, but for what a variant does without; and late streams meet after the connector."""
    layout = lay_out(video(3, 1, grid=False))
    every, earlier = torch.ones(3, 3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool).tril()
    rules = {"unmasked": every, "past": earlier, "future": earlier.T, "past, late fusion": earlier}
    rules["past, late fusion, as many tokens"] = earlier
    batch, weights = claim_qformer.films(3, claim_cells.stream(0)), {}
    louder = batch.pixels.clone()
    louder[..., -12:] += 1
    for name, options in claim_qformer.OPTIONS.items():
        torch.manual_seed(3)
        model = claim_qformer.FilmReader(**options)
        weights[name] = {k: x for k, x in model.state_dict().items() if not k.startswith(("inner", "answer"))}
        if name in rules:
            assert torch.equal(allowed(model.connector.rule, layout)[0], rules[name])
        made: list[torch.Tensor] = []
        model.connector.register_forward_hook(lambda module, given, tokens, kept=made: kept.append(tokens))
        assert not torch.allclose(model(batch.pixels, batch.question), model(louder, batch.question))
        same = [torch.equal(one, other) for one, other in zip(made[: len(made) // 2], made[len(made) // 2 :])]
        assert same == ([True, False] if "late" in name else [False])
        assert sum(one[0].shape[1] for one in made) == (16 if name == "past, late fusion" else 8)
    plain = weights.pop("no frame block")
    for one in weights.values():
        assert {"encoder_causal_attention"} == {name.split(".")[6] for name in one.keys() - plain.keys()}
        assert all(
            torch.equal(one[name], x[:, : one[name].shape[1]] if x.dim() == 3 else x) for name, x in plain.items()
        )


def test_positions_of_the_concentric_variants() -> None:
    layout = lay_out(image(4, 4), text(3))
    found = {}
    for name, options in claim_cells.CCA_OPTIONS.items():
        model = claim_cells.CellReader(**options).reader.model
        found[name] = (model.rule_name, model.scheme(layout)[0].tolist())
    rings = [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2, 3, 4]
    assert found["raster"] == ("causal", list(range(19)))
    assert found["concentric"] == ("concentric-causal", rings)
    assert found["ring positions only"] == ("causal", rings)
    assert found["one position for the image"] == ("causal", [0] * 16 + [1, 2, 3])


@pytest.mark.parametrize(
    ("rule", "sees"),
    [
        ("causal", {"question": False, "later cells": False}),
        ("modality-mutual", {"question": True, "later cells": False}),
        ("full-visual", {"question": False, "later cells": True}),
    ],
)
def test_what_a_cell_may_see(rule: str, sees: dict[str, bool]) -> None:
    model = claim_cells.CellReader(**claim_cells.MMA_OPTIONS[rule]).reader.model
    mask = model.mask(lay_out(image(4, 4), text(4)), 20)[0, 0]
    assert bool(mask[:16, 16:].all()) == sees["question"] == bool(mask[:16, 16:].any())
    assert bool(mask[:16, :16].all()) == sees["later cells"]
    assert mask[19].all()


def test_the_shared_mask_gives_what_layouts_of_rows_give() -> None:
    batch, _ = claim_cells.ask_neighbours(5, 3, 2, 12, claim_cells.stream(0))
    model = claim_cells.CellReader(3, rule="frame-block-causal").eval()
    reader = model.reader.model
    layout = lay_out(claim_cells.video(3, 2, 2), text(4))
    rows = torch.cat([layout.data] * 5)
    embeddings = torch.cat([model.patch(batch.pixels), reader.get_input_embeddings()(batch.question)], 1)
    expected = reader(inputs_embeds=embeddings, layout=rows).logits[:, -1]
    torch.testing.assert_close(model(batch.pixels, batch.question), expected)


def test_accuracy_is_by_kind() -> None:
    class Always(torch.nn.Module):
        def forward(self, pixels: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
            return torch.eye(3)[torch.ones(len(question), dtype=torch.long)]

    batches = [Batch(torch.zeros(2), torch.zeros(2, 1), torch.tensor([1, 2]), ["a", "b"])] * 2
    assert accuracy(Always(), batches) == {"all": 0.5, "a": 1.0, "b": 0.0}


# Running and going on.


def test_every_claim_runs(short: dict[str, Claim], tmp_path: Path) -> None:
    for name, claim in short.items():
        steps: list[int] = []
        found = reproduce.reproduce(claim, 1, tmp_path, advance=steps.append)
        assert sum(steps) == 2 * len(claim.variants)
        assert [run["variant"] for run in found["runs"]] == list(claim.variants)
        for run_ in found["runs"]:
            assert all(0 <= score <= 1 for score in run_["scores"].values())
            assert [step for step, _ in run_["curve"]] == [0, 1, 2]
            assert run_["cpu_seconds"] > 0
        for head, body in reproduce.tables(claim, found):
            assert {len(row) for row in body} == {len(head)}
            assert len(body) == len(claim.variants) + len(found["levels"])
        assert claim.paper in reproduce.markdown(claim, found)
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100
        assert json.loads((tmp_path / f"{name}.json").read_text())["claim"] == name


def test_a_video_run_is_a_function_of_variant_and_seed(short: dict[str, Claim]) -> None:
    one, other = (reproduce.run("causal-video", "causal", 0, 2, lambda: None) for _ in range(2))
    assert (one["scores"], one["curve"]) == (other["scores"], other["curve"])


def test_a_run_is_a_function_of_variant_and_seed(short: dict[str, Claim]) -> None:
    def made(variant: str, seed: int) -> Any:
        found = reproduce.run("mma", variant, seed, 2, lambda: None)
        return found["scores"], found["curve"]

    state = torch.random.get_rng_state()
    first = made("causal", 0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert made("causal", 0) == first
    assert made("causal", 1) != first


@pytest.fixture
def counted(short: dict[str, Claim], monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A claim whose runs are counted, and stop at the one named in `stop`."""
    seen = SimpleNamespace(runs=[], stop=None)

    def train(variant: str, seed: int, steps: int, advance: Any) -> Any:
        if (variant, seed) == seen.stop:
            raise KeyboardInterrupt
        seen.runs.append((variant, seed))
        for _ in range(steps):
            advance()
        return {"accuracy": 0.5 + 0.1 * seed, "left": 0.25}, [(0, 0.1), (steps, 0.5)]

    seen.claim = replace(short["mma"], train=train)
    monkeypatch.setitem(reproduce.CLAIMS, "mma", seen.claim)
    yield seen


def test_an_interrupted_command_goes_on(counted: SimpleNamespace, tmp_path: Path) -> None:
    counted.stop = ("modality-mutual", 1)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(counted.claim, 2, tmp_path)
    done = [(variant, 0) for variant in counted.claim.variants] + [("causal", 1)]
    assert counted.runs == done
    assert {(run["variant"], run["seed"]) for run in reproduce.results(counted.claim, tmp_path)["runs"]} == set(done)
    counted.stop = None
    counted.runs.clear()
    found = reproduce.reproduce(counted.claim, 2, tmp_path)
    assert counted.runs == [("modality-mutual", 1), ("full-visual", 1)]
    assert len(found["runs"]) == 6
    counted.runs.clear()
    assert reproduce.reproduce(counted.claim, 2, tmp_path)["runs"] == found["runs"]
    assert not counted.runs
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["mma.json", "mma.png"]


def test_several_processes_report_as_one_does(counted: SimpleNamespace) -> None:
    todo = reproduce.missing(counted.claim, 2, {"runs": []})
    told: list[int] = []

    class Steps:
        value = 0

        def get_lock(self) -> Any:
            return self

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    steps = Steps()
    with ThreadPoolExecutor(1, initializer=reproduce._count_in, initargs=(steps,)) as pool:
        made = list(reproduce._as_they_come(pool, counted.claim, todo, steps, told.append))
    assert {(run["variant"], run["seed"]) for run in made} == set(todo) == set(counted.runs)
    assert sum(told) == steps.value == 2 * len(todo)


@pytest.mark.slow
def test_two_processes_give_the_same_runs(tmp_path: Path) -> None:
    claim = replace(reproduce.CLAIMS["frame-block"], steps=2, variants={"causal": "", "full-visual": ""})
    alone = reproduce.reproduce(claim, 1, tmp_path / "alone")
    together = reproduce.reproduce(claim, 1, tmp_path / "together", jobs=2)
    for found in (alone, together):
        for one in found["runs"]:
            del one["cpu_seconds"]
    assert alone == together


STRANGE = '{"steps": 2, "runs": [{"variant": "x", "seed": 0, "scores": {}}]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "does not hold results"),
        ("[]", "does not hold results"),
        ('{"steps": 7, "runs": []}', "7 steps"),
        (STRANGE, "does not have: x"),
    ],
)
def test_other_results_are_not_gone_on_with(
    short: dict[str, Claim], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "mma.json").write_text(content)
    with pytest.raises(InputError, match=message):
        reproduce.reproduce(short["mma"], 1, tmp_path)
    assert (tmp_path / "mma.json").read_text() == content


def test_seeds_and_jobs_are_positive(short: dict[str, Claim], tmp_path: Path) -> None:
    for options in ({"seeds": 0}, {"seeds": 1, "jobs": 0}):
        with pytest.raises(InputError, match="at least one seed"):
            reproduce.reproduce(short["mma"], folder=tmp_path, **options)


# What is concluded.


def found_with(claim: Claim, **scores: list[float]) -> dict[str, Any]:
    runs = [
        {"variant": variant.replace("_", "-"), "seed": seed, "scores": {"accuracy": score}}
        for variant, values in scores.items()
        for seed, score in enumerate(values)
    ]
    return {"runs": runs, "levels": {"blind": {"accuracy": 0.2}}}


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([0.9, 0.92, 0.91], [0.5, 0.51, 0.52], "The effect shows"),
        ([0.5, 0.51, 0.52], [0.9, 0.92, 0.91], "The opposite shows: causal is better"),
        ([0.9, 0.6, 0.52], [0.5, 0.51, 0.5], "the interval holds 0"),
        ([0.5, 0.6, 0.5], [0.55, 0.5, 0.52], "+0.21. No effect shows."),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "both have solved the task"),
        ([0.21, 0.2, 0.21], [0.1, 0.1, 0.1], "Neither has got beyond a good guess"),
        ([0.9], [0.5], "One seed says nothing"),
        ([], [0.5], "no pair of runs"),
    ],
)
def test_conclusions(ours: list[float], theirs: list[float], verdict: str) -> None:
    claim = claim_cells.MMA
    said = reproduce.conclusions(claim, found_with(claim, modality_mutual=ours, causal=theirs))
    assert verdict in said[0]


def test_intervals_are_students() -> None:
    mean, low, high = reproduce.interval([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert low == 4 - high
    mean, _, high = reproduce.interval([-1.0, 1.0] * 8)  # 15 degrees of freedom
    assert high == pytest.approx(2.131 * (16 / 15) ** 0.5 / 4, abs=0.003)


# The command.


def test_the_command_prints_the_table(counted: SimpleNamespace, tmp_path: Path) -> None:
    shown = run("reproduce", "mma", "--seeds", "2", "--jobs", "1", "--output", str(tmp_path))
    for part in ("modality-mutual against causal", "0.55", "knows which objects there are", "mma.png", "plateau"):
        assert part in " ".join(shown.split())
    counted.runs.clear()
    run("reproduce", "mma", "--seeds", "2", "--jobs", "1", "--output", str(tmp_path))
    assert not counted.runs


def test_an_unknown_claim_names_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ccam, causal-qformer, frame-block, cca, mma, causal-video, and all" in failure(
        monkeypatch, capsys, "reproduce", "alchemy"
    ).replace("\n", " ")
    names = ["ccam", "causal-qformer", "frame-block", "cca", "mma", "causal-video"]
    assert [claim.name for claim in reproduce.claims("all")] == names
