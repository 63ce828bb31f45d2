"""The runner: the same file for any number of shards and after a kill; counted states, likelihoods, statistics."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import mmzoo
from mmzoo.cli import app
from mmzoo.errors import DatasetError, EvaluationError, InputError, UnknownModel
from mmzoo.language import MultimodalLM
from mmzoo.media import read_video, write_video
from mmzoo_eval import runner
from mmzoo_eval.asking import Media, by_likelihood, likelihoods, put, responses
from mmzoo_eval.benchmark import Benchmark, Frames, Item, Judged, Prompt, Protocol, Verdict, by_name, mean, scores
from mmzoo_eval.benchmarks import MODULES, benchmark
from mmzoo_eval.file_scorers import FILE_SCORERS
from mmzoo_eval.judges import RecordedJudge, find_judge
from mmzoo_eval.report import write
from mmzoo_eval.runner import Run, run
from mmzoo_eval.scoring import label, read_results, scored
from mmzoo_eval.statistics import bootstrap, interval, paired, standard_error, wilson
from mmzoo_eval.subtitles import each_once, subtitled

WORDS = ("red", "green")


def judge(item: Item, response: str) -> Verdict:
    return Verdict(float(response == item.options[item.answer]), response or None)


def total(rows: Any) -> dict[str, float]:
    return {"accuracy": mean(scores(rows), 100)}


CHOICE = Protocol("plain", "these tests", judge, total, "accuracy", lambda item: Prompt(item.question), Frames("all"))


def toy(count: int = 12, media: str = "") -> Benchmark:
    items = [
        Item(f"q{i}", f"what colour is {i}", i % 2, WORDS, media and f"{media}{i // 2}.mp4", cluster=f"clip{i // 2}")
        for i in range(count)
    ]
    return Benchmark("toy", "Toy", lambda path: items, by_name(CHOICE))


@pytest.fixture(scope="module")
def tiny() -> MultimodalLM:
    return mmzoo.create("aki-tiny")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Batches that were asked; the answer depends on the item and on its company, as it might in a batch."""
    asked: list[list[str]] = []

    def respond(model: Any, protocol: Any, items: list[Item], prompts: Any, media: Any) -> list[str]:
        asked.append([item.id for item in items])
        return [WORDS[(len(items) + int(item.id[1:])) % 2] for item in items]

    monkeypatch.setattr(runner, "responses", respond)
    return asked


def plan(model: MultimodalLM, folder: Path, found: Benchmark | None = None, **options: Any) -> Run:
    found = found or toy()
    protocol = options.pop("protocol", found.protocol())
    items = options.pop("items", found.read(folder))
    media = Media(found, options.pop("media", folder), protocol.frames)
    return Run(model, found, protocol, items, media, folder, **{"batch_size": 5, **options})


def files(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "results.jsonl").read_bytes(), (folder / "scores.json").read_bytes()


def test_any_number_of_shards_gives_the_same_file(tiny: MultimodalLM, tmp_path: Path, told: Any) -> None:
    run(plan(tiny, tmp_path / "one"))
    for shards in (2, 4):
        folder = tmp_path / str(shards)
        done = [run(plan(tiny, folder, shard=shard, shards=shards)) for shard in reversed(range(shards))]
        assert done[:-1] == [None] * (shards - 1) and done[-1] is not None
        assert files(folder) == files(tmp_path / "one")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_was_written_before_a_kill_the_file_is_the_same(
    tiny: MultimodalLM, tmp_path_factory: pytest.TempPathFactory, told: Any, data: Any
) -> None:
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    run(plan(tiny, whole))
    written = (whole / "responses" / "0-of-1.jsonl").read_bytes()
    kept = written[: data.draw(st.integers(0, len(written)))]
    (cut / "responses").mkdir()
    (cut / "responses" / "0-of-1.jsonl").write_bytes(kept)
    told.clear()
    shards = data.draw(st.sampled_from([1, 2, 3]))
    for shard in range(shards):
        run(plan(tiny, cut, shard=shard, shards=shards))
    assert files(cut) == files(whole)
    finished = kept.count(b'"note": ""}\n')
    assert len(told) == 3 - finished // 5 - (finished == 12), "only batches with an item left are asked"


def test_the_key_knows_weights_media_prompt_and_frames(tmp_path: Path, told: list[list[str]]) -> None:
    model, found = mmzoo.create("aki-tiny"), toy(4, "v")
    for i in range(2):
        write_video(np.full((4, 32, 32, 3), 80 * i, np.uint8), tmp_path / f"v{i}.mp4", fps=4)
    again = lambda **options: run(plan(model, tmp_path, found, **options))  # noqa: E731
    again()
    assert sum(map(len, told)) == 4
    again()
    assert sum(map(len, told)) == 4, "nothing is asked twice"
    write_video(np.full((4, 32, 32, 3), 200, np.uint8), tmp_path / "v1.mp4", fps=4)
    again(batch_size=1)
    assert sum(map(len, told)) == 6, "the two items of the changed clip"
    again(protocol=replace(CHOICE, frames=Frames("linspace", 2)))
    assert sum(map(len, told)) == 10
    again(protocol=replace(CHOICE, prompt=lambda item: Prompt(item.question, start="it is")))
    assert sum(map(len, told)) == 14
    with torch.no_grad():
        next(model.parameters()).add_(1)
    again()
    assert sum(map(len, told)) == 18


def test_unanswered_unreadable_and_failed_are_three_counts(
    tiny: MultimodalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(np.zeros((4, 32, 32, 3), np.uint8), tmp_path / "v0.mp4", fps=4)
    write_video(np.zeros((4, 32, 32, 3), np.uint8), tmp_path / "v1.mp4", fps=4)
    (tmp_path / "v2.mp4").write_text("no video")

    def respond(model: Any, protocol: Any, items: list[Item], prompts: Any, media: Any) -> list[str]:
        if any(item.id == "q3" for item in items):
            raise RuntimeError("a kernel gave up")
        return ["" if item.id == "q1" else WORDS[item.answer] for item in items]

    monkeypatch.setattr(runner, "responses", respond)
    found = run(plan(tiny, tmp_path, toy(6, "v")))
    assert found is not None
    assert found["counts"] == {"answered": 2, "unanswered": 1, "unreadable media": 2, "model error": 1}
    assert found["scores"]["accuracy"]["value"] == pytest.approx(200 / 3)
    assert found["text"].endswith(", 1 unanswered, 2 unreadable media, 1 model error")
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert (rows["q3"]["score"], rows["q3"]["response"]) == (None, None)
    assert "a kernel gave up" in rows["q3"]["note"]
    assert "v2.mp4" in rows["q4"]["note"] and rows["q4"]["response"] is None
    assert rows["q0"]["decoder"].split()[0] in ("decord", "pyav") and found["decoders"][0] in found["label"]


def test_a_model_error_is_asked_again_the_next_time(
    tiny: MultimodalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = [True]

    def respond(model: Any, protocol: Any, items: list[Item], prompts: Any, media: Any) -> list[str]:
        if fails[0] and any(item.id == "q3" for item in items):
            raise RuntimeError("once")
        return [WORDS[item.answer] for item in items]

    monkeypatch.setattr(runner, "responses", respond)
    assert run(plan(tiny, tmp_path))["counts"]["model error"] == 1  # type: ignore[index]
    fails[0] = False
    assert run(plan(tiny, tmp_path))["counts"]["answered"] == 12  # type: ignore[index]


def test_errors_in_a_row_and_full_memory_stop_the_run(
    tiny: MultimodalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> list[str]:
        raise ValueError("always")

    monkeypatch.setattr(runner, "responses", broken)
    with pytest.raises(EvaluationError, match="always"):
        run(plan(tiny, tmp_path / "a", toy(60)))

    def full(*_: Any) -> list[str]:
        raise torch.OutOfMemoryError("9 GiB")

    monkeypatch.setattr(runner, "responses", full)
    with pytest.raises(EvaluationError, match="batch of 5"):
        run(plan(tiny, tmp_path / "b"))


def test_plans_that_cannot_be_run(tiny: MultimodalLM, tmp_path: Path) -> None:
    items = toy().read(tmp_path)
    for wrong in (
        {"protocol": replace(CHOICE, prompt=None)},
        {"items": [items[0], items[0]]},
        {"shard": 2, "shards": 2},
        {"batch_size": 0},
        {"protocol": by_likelihood(CHOICE, "letters"), "items": [replace(items[0], options=())]},
    ):
        with pytest.raises(InputError):
            plan(tiny, tmp_path, **wrong)


@pytest.mark.parametrize("name", mmzoo.list_models("*-tiny", library="transformers"))
def test_a_likelihood_is_the_loss_of_the_continuation(name: str) -> None:
    torch.manual_seed(0)
    model = mmzoo.create(name)
    words = sorted(word for word in model.processor.tokenizer.get_vocab() if word.isalpha())[:6]
    clip = read_video(np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8), sampling="all")
    text = put(model, Prompt(" ".join(words[:3])), clip)
    gap = model.processor.before_answer
    told = [gap + words[3], gap + " ".join(words[4:])]
    found = likelihoods(model, text, clip, told)
    for one, value in zip(told, found, strict=True):
        batch = model.processor(text + one, videos=[clip], padding_side="right")
        count = len(model.processor.sample(text, [], [clip])[0])
        labels = batch["input_ids"].clone()
        labels[:, :count] = -100
        shown = {key: batch[key] for key in batch if key != "attention_mask"}
        with torch.no_grad():
            assert value == pytest.approx(-float(model(**shown, labels=labels).loss), abs=1e-4)


@pytest.mark.parametrize("name", mmzoo.list_models("*-tiny", library="transformers"))
def test_a_system_text_and_a_beginning_have_their_places(name: str) -> None:
    model = mmzoo.create(name)
    text = put(model, Prompt("what is it", "Look well.\n", "Best option:("), None)
    assert text.count("Look well.") == 1 and text.endswith("Best option:(")
    assert text.index("Look well.") < text.index("what is it") < text.index("Best option:(")


def test_options_and_letters_are_chosen_by_likelihood(tmp_path: Path) -> None:
    model, found = mmzoo.load("aki-nano"), benchmark("world")
    items = found.read(tmp_path)[:12]
    media = Media(found, tmp_path, found.protocol().frames)
    shown, prompts = [media.read(item, model.processor) for item in items], [Prompt(item.question) for item in items]
    right = ["ABCDEF"[item.answer] for item in items]
    said = responses(model, by_likelihood(found.protocol(), "options"), items, prompts, shown)
    assert sum(one == other for one, other in zip(said, right, strict=True)) >= 11


def test_the_label_names_the_protocol(tiny: MultimodalLM) -> None:
    protocol = replace(CHOICE, name="official", frames=Frames("mvbench", 16))
    system = [Prompt("why", "Look.")]
    assert label(toy(), protocol, protocol.frames, ["decord 0.6.0"], tiny.processor, system) == (
        "Toy (official, 16 frames, decord 0.6.0)"
    )
    no_place = mmzoo.create("video-ccam-tiny").processor
    assert "system text in the question" in label(toy(), protocol, protocol.frames, [], no_place, system)
    rated = Frames("ccam_fps", None, 1.0)
    assert label(toy(), protocol, rated, [], tiny.processor) == "Toy (official, 1 frames/s)"
    assert label(toy(), protocol, Frames(), [], tiny.processor) == f"Toy (official, {tiny.processor.num_frames} frames)"


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), min_size=2, max_size=40))
def test_standard_errors_as_their_formulas(rows: list[tuple[int, int]]) -> None:
    values, clusters = [float(score) for score, _ in rows], [cluster for _, cluster in rows]
    n, m = len(values), sum(values) / len(values)
    plain = sum((v - m) ** 2 for v in values) / (n - 1) / n
    assert standard_error(values) == pytest.approx(plain**0.5)
    extra = sum(
        sum(v - m for v, c in zip(values, clusters) if c == one) ** 2
        - sum((v - m) ** 2 for v, c in zip(values, clusters) if c == one)
        for one in set(clusters)
    )
    assert standard_error(values, clusters) == pytest.approx(max(plain + extra / n**2, 0) ** 0.5, abs=1e-9)
    assert standard_error(values, range(n)) == pytest.approx(plain**0.5)


def test_intervals_and_comparison() -> None:
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert interval([1.0] * 10, range(10)) == pytest.approx((0.7225, 1.0), abs=1e-3)
    low, high = interval([1, 0, 0, 1] * 9, [i // 4 for i in range(36)])
    assert high - low == pytest.approx(2 * 1.96 * standard_error([1, 0, 0, 1] * 9, [i // 4 for i in range(36)]))
    found = paired([1, 1, 0, 1], [0, 1, 0, 0])
    assert (found.n, found.difference, found.better, found.worse) == (4, 0.5, 2, 0)
    assert (found.t, found.p) == (pytest.approx(3**0.5), pytest.approx(0.1817, abs=1e-4))
    assert paired([1, 0], [1, 0]).p == 1.0 and paired([1, 1], [0, 0]).p == 0.0
    with pytest.raises(InputError, match="two items"):
        paired([1.0], [1.0])


def test_a_comparison_knows_which_items_share_a_video() -> None:
    first, second = [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    clusters = [i // 2 for i in range(12)]
    plain, found = paired(first, second), paired(first, second, clusters)
    stderr = standard_error(np.subtract(first, second), clusters)
    assert stderr > 1.2 * standard_error(np.subtract(first, second)), "both items of a video go one way"
    assert (found.low, found.high) == pytest.approx(
        (found.difference - 1.96 * stderr, found.difference + 1.96 * stderr), abs=1e-4
    )
    assert found.p == pytest.approx(math.erfc(found.difference / stderr / 2**0.5)) and found.p > plain.p
    assert found.t == pytest.approx(found.difference / stderr) and (found.clusters, plain.clusters) == (6, 12)
    assert paired(first, second, range(12)) == plain, "clusters of one item each are none"
    one = paired(first, second, ["clip"] * 12)
    assert one.difference == plain.difference and np.isnan([one.low, one.high, one.p, one.stderr_clustered]).all()


def test_the_comparison_leads_with_the_clustered_interval(tmp_path: Path) -> None:
    def told(clusters: list[str]) -> str:
        for name, judged in (("[one]", [1, 1, 1, 1, 0, 0]), ("other", [0, 0, 1, 1, 0, 0])):
            rows = zip(clusters, judged, strict=True)
            lines = [{"id": i, "response": "x", "score": s, "cluster": c} for i, (c, s) in enumerate(rows)]
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths = [str(tmp_path / name) for name in ("[one]", "other")]
        return " ".join(CliRunner().invoke(app, ["eval", "compare", *paths], catch_exceptions=False).output.split())

    known = told(list("aabbcc"))
    assert "[one] is +33.3 points" in known and "clustered over 3 clusters" in known
    stderr = standard_error([1, 1, 0, 0, 0, 0], list("aabbcc"))
    assert f"{100 * (1 / 3 - 1.96 * stderr):+.1f} to {100 * (1 / 3 + 1.96 * stderr):+.1f}" in known
    assert "t-test" not in known and "(paired t-test)" in told([""] * 6)
    assert "no interval, as all items share one cluster" in told(["a"] * 6)


def test_no_interval_of_a_share_passes_its_limits() -> None:
    values, clusters = [1.0] * 49 + [0.0], [i // 5 for i in range(50)]
    margin = 1.96 * standard_error(values, clusters)
    assert 0.98 + margin > 1 and interval(values, clusters) == (pytest.approx(0.98 - margin), 1.0)
    assert interval([1, 1, 0, 0], ["a", "a", "b", "b"]) == (0.0, 1.0)
    assert interval([1 - value for value in values], clusters) == (0.0, pytest.approx(0.02 + margin))
    assert interval(values, clusters, (-np.inf, np.inf)) == pytest.approx((0.98 - margin, 0.98 + margin))
    assert np.isnan(interval([0.5], ["a"])).all(), "of one item nothing is known"
    rows = [
        Judged(Item(f"i{i}", "", cluster=f"clip{clusters[i]}"), "x", Verdict(value, "x"), "answered")
        for i, value in enumerate(values)
    ]
    found = scored(toy(), CHOICE, rows)
    assert found["scores"]["accuracy"]["high"] == 100.0
    assert found["scores"]["accuracy"]["stderr"] == pytest.approx(100 * margin / 1.96), "that of the whole interval"
    assert found["text"].startswith(f"98.0 ({98 - 100 * margin:.1f} to 100.0)")
    half = [replace(row, verdict=Verdict(i % 2, "x")) for i, row in enumerate(rows)]
    assert scored(toy(), CHOICE, half)["text"].startswith("50.0 ± ")
    points = replace(CHOICE, aggregate=lambda rows: {"accuracy": mean(scores(rows))}, unit="points")
    assert scored(toy(), points, rows)["scores"]["accuracy"]["high"] > 1


def test_a_resampled_interval_leaves_out_draws_without_a_value() -> None:
    rows = [scored_row(i, kind) for i, kind in enumerate("aaab")]

    def by_kind(chosen: Any) -> dict[str, float]:
        kinds = [row.item.kind for row in chosen]
        return {"b": sum(row.verdict.score for row in chosen if row.item.kind == "b") / kinds.count("b")}

    assert bootstrap(rows, by_kind)["b"] == bootstrap(rows, by_kind)["b"]
    assert (bootstrap(rows, by_kind)["b"].low, bootstrap(rows, by_kind)["b"].high) == (1.0, 1.0)
    assert scored(toy(), CHOICE, [])["text"] == "no item was scored, 0 unanswered"


def scored_row(number: int, kind: str) -> Any:
    return Judged(Item(f"i{number}", "", kind=kind), "x", Verdict(1.0, "x"), "answered")


def test_the_page_shows_what_was_seen_and_said(tiny: MultimodalLM, tmp_path: Path, told: Any) -> None:
    write_video(np.zeros((4, 32, 32, 3), np.uint8), tmp_path / "v0.mp4", fps=4)
    found = toy(4, "v")
    items = [replace(item, question="is 1 < 2 <script>") for item in found.read(tmp_path)]
    some = plan(tiny, tmp_path, found, items=items)
    run(some)
    page = write(some, tmp_path / "report.html", 3).read_text()
    assert page.count("<article") == 3 and page.count("data:image/jpeg;base64,") == 2
    assert "is 1 &lt; 2 &lt;script&gt;" in page and "<script>\nfunction" in page
    assert "v1.mp4" in page and page.count('class="other"') == 1


def test_every_benchmark_is_found_by_its_name() -> None:
    for name in MODULES:
        found = benchmark(name)
        protocols = {**found.protocols, **(found.judged_by(lambda messages: "", "one") if found.judged_by else {})}
        assert found.name == name and found.data and protocols
        assert all(key == protocol.name and protocol.source for key, protocol in protocols.items())
        assert next(iter(protocols.values())).prompt is not None
    with pytest.raises(InputError, match="mmzoo eval list"):
        benchmark("wrld")
    with pytest.raises(InputError, match="exact word"):
        benchmark("world").protocol("official")


def test_the_command_runs_scores_and_compares(tmp_path: Path) -> None:
    def call(*words: str) -> str:
        done = CliRunner().invoke(app, ["eval", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    one, other = tmp_path / "one", tmp_path / "other"
    common = ["world", "--limit", "12", "--batch-size", "4", "--report", "2", "--dtype", "float32"]
    said = call("run", "aki-nano", *common, "-o", str(one))
    assert "World (exact word, 8 frames):" in said and (one / "report.html").is_file()
    call("run", "aki-nano", *common, "--answers", "options", "--shard", "0/1", "-o", str(other))
    pushed = tmp_path / "pushed"
    mmzoo.push("aki-nano", "someone/aki", eval_results=[one / "scores.json"], dry_run=pushed)
    card = (pushed / "README.md").read_text()
    assert "World (exact word, 8 frames)" in card and "direction" not in card.partition("Measured")[2][:300]
    assert "on 12 items" in call("compare", str(one), str(other))
    assert "World (exact word)" in call("score", "world", str(one / "results.jsonl"))
    assert "exact word" in call("list")
    with pytest.raises(InputError, match="another run"):
        call("run", "cca-nano", *common, "-o", str(one))
    with pytest.raises(InputError, match="0/4"):
        call("run", "aki-nano", *common, "--shard", "first", "-o", str(tmp_path / "x"))
    with pytest.raises(InputError, match="--answers"):
        call("run", "aki-nano", *common, "--answers", "guess", "-o", str(tmp_path / "x"))


def test_the_list_shows_square_brackets_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    bracketed = replace(benchmark("world"), data="rows of [question, answer], [a] folder")
    monkeypatch.setattr("mmzoo_eval.benchmarks.benchmark", lambda name: bracketed)
    monkeypatch.setattr("mmzoo_eval.cli.console", Console(width=400))
    said = CliRunner().invoke(app, ["eval", "list"], catch_exceptions=False).output
    assert bracketed.data in said
    files = [what for scorer in FILE_SCORERS.values() for what in scorer.files.values()]
    assert any("[" in what for what in files) and all(what in said for what in files)


def test_a_run_that_cannot_begin_claims_no_folder(tmp_path: Path) -> None:
    def call(*words: str) -> None:
        CliRunner().invoke(app, ["eval", "run", *words, "-o", str(tmp_path / "run")], catch_exceptions=False)

    with pytest.raises(InputError, match="Give --data"):
        call("aki-nano", "mvbench")
    with pytest.raises(UnknownModel):
        call("aki-nanno", "world", "--limit", "2")
    with pytest.raises(InputError, match="No batch of 0"):
        call("aki-nano", "world", "--limit", "2", "--batch-size", "0")
    for wrong in ("relu", "int8", ""):
        with pytest.raises(InputError, match=f"--dtype is float32, bfloat16, float16, not '{wrong}'"):
            call("aki-nano", "world", "--limit", "2", "--dtype", wrong)
    with pytest.raises(InputError, match="vid-gpt-nano makes clips or pictures and answers no questions"):
        call("vid-gpt-nano", "world", "--limit", "2")
    assert not (tmp_path / "run").exists()


def test_what_a_judge_said_is_not_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def judge(messages: list[dict[str, str]]) -> str:
        asked.append(messages[-1]["content"])
        return "{'pred': 'yes', 'score': 4}"

    first = RecordedJudge(judge, tmp_path / "judged.jsonl")
    message = [{"role": "user", "content": "is it"}]
    assert first(message) == first(message) and len(asked) == 1
    with (tmp_path / "judged.jsonl").open("a") as file:
        file.write('{"asked": "cut o')
    assert RecordedJudge(judge, tmp_path / "judged.jsonl")(message) == first(message) and len(asked) == 1
    found = benchmark("msvd_qa")
    assert found.judged_by is not None
    protocol = next(iter(found.judged_by(first, "me").values()))
    assert protocol.judge(Item("i", "what is it", "dog"), "a dog").score == 1.0 and "(me)" in protocol.name
    assert find_judge("json:dumps") is json.dumps
    for wrong in ("json", "json:nothing", "no.such:thing"):
        with pytest.raises(InputError, match="no judge at"):
            find_judge(wrong)
    with pytest.raises(InputError, match="read by a judge"):
        benchmark("mlvu_generation").protocol()


def test_a_prompt_is_written_for_the_frames_that_are_shown(tiny: MultimodalLM, tmp_path: Path, told: Any) -> None:
    write_video(np.zeros((8, 32, 32, 3), np.uint8), tmp_path / "v0.mp4", fps=4)
    srt = "1\n00:00:00,000 --> 00:00:00,900\nearly\n\n2\n00:00:01,000 --> 00:00:02,000\nlate\n"
    (tmp_path / "v0.srt").write_text(srt)
    item = Item("q0", "what", 0, WORDS, "v0.mp4", details={"subtitles": str(tmp_path / "v0.srt"), "cut_frame": 3})
    prompt = subtitled(lambda item, text: Prompt(f"{text}"), lambda cues, seen: each_once(cues, seen.times))
    protocol = replace(CHOICE, prompt=prompt, frames=Frames("linspace", 2))
    some = plan(tiny, tmp_path, toy(), protocol=protocol, items=[item])
    video = some.media.read(item, tiny.processor)
    assert video.indices == [0, 2] and "first 3 of 8 frames" in video.notes[0]
    assert some.prompt(item, video).user == "early" and some.prompt(item).user == "early\nlate"
    assert run(some) is not None


def test_a_protocol_may_have_copies_of_its_own(tiny: MultimodalLM, tmp_path: Path) -> None:
    moved = replace(CHOICE, own=lambda item: replace(item, media="elsewhere/" + item.media, bound=None))
    some = plan(tiny, tmp_path, toy(2, "v"), protocol=moved)
    assert [item.media for item in some.items] == ["elsewhere/v0.mp4"] * 2
    found = toy(1, "v").read(tmp_path)[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "v0.mp4").write_bytes(b"here")
    sought = replace(found, details={"media_pattern": "*/v0.mp4"})
    media = Media(toy(), tmp_path, Frames("all"))
    assert media.sha256(found) == "missing" != media.sha256(sought)


def test_the_command_scores_files(tmp_path: Path) -> None:
    data = Path(__file__).parent / "data" / "parity" / "eval" / "ndcg_vidore"
    done = CliRunner().invoke(app, ["eval", "score", "vidore", str(data / "qrels.json"), str(data / "run.json")])
    assert done.exit_code == 0 and "ViDoRe" in done.output, done.output
    with pytest.raises(InputError, match="takes 2 files"):
        CliRunner().invoke(app, ["eval", "score", "vidore", str(data / "run.json")], catch_exceptions=False)


def test_files_of_responses_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    path.write_text('{"id": 1, "response": "a"}\n{"id": 2}\nno json\n{"id": "1", "response": "b"}\n')
    with pytest.raises(DatasetError) as caught:
        read_results(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["line 2", "line 3", "line 4"]
    with pytest.raises(DatasetError):
        read_results(tmp_path / "missing.jsonl")


ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "training", ROOT / "eval")))
RUN = "eval run aki-nano world --limit 60 --batch-size 3 --report 0 -o".split()


@pytest.mark.slow
def test_torchrun_shards_a_run(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    main.write_text("from mmzoo.cli import main\n\nmain()\n")
    environment = {**os.environ, "PYTHONPATH": PATHS}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    subprocess.run([*torchrun, str(main), *RUN, str(tmp_path / "two")], check=True, env=environment)
    subprocess.run([sys.executable, str(main), *RUN, str(tmp_path / "one")], check=True, env=environment)
    assert len(list((tmp_path / "two" / "responses").glob("*.jsonl"))) == 2
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 at several points, then the same command again, beside a run that was left alone."""

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-c", "from mmzoo.cli import main; main()", *RUN, str(folder)]

    settings: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": PATHS}, "stdout": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "whole"), check=True, **settings)
    killed, lines = tmp_path / "killed", tmp_path / "killed" / "responses" / "0-of-1.jsonl"
    for wanted in (5, 20, 44):
        process = subprocess.Popen(command(killed), **settings)
        while process.poll() is None and (not lines.is_file() or lines.read_bytes().count(b"}\n") < wanted):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was alive"
        assert not (killed / "results.jsonl").exists()
    subprocess.run(command(killed), check=True, **settings)
    assert files(killed) == files(tmp_path / "whole")
