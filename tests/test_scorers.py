"""Captions, staged questions, and what scores files: what the parity cases do not hold."""

from __future__ import annotations

import importlib
import json
import shutil
from math import isnan, log2
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmzoo.errors import DatasetError, InputError
from mmzoo_eval.benchmark import Item, Judged, judged
from mmzoo_eval.benchmarks import benchmark, chair, next_gqa, vbench, vidore, vlind_bench
from mmzoo_eval.file_scorers import FILE_SCORERS

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "data" / "parity" / "eval"


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# Recorded numbers are really compared


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("exact_match_videoqa", ["aggregate", "vqa_norm_acc"]),
        ("exact_match_videoqa", ["aggregate", "by_question_word", "where", "strict"]),
        ("exact_match_videoqa", ["aggregate", "activitynet_official", "acc_by_type", "8"]),
        ("exact_match_videoqa", ["aggregate", "activitynet_official", "free_as_upstream"]),
        ("gpt_assisted_videoqa", ["per_item", -1, "lmms_eval_parse", 1]),
        ("gpt_assisted_videoqa", ["aggregate", "videochatgpt_on_parsed", "average_score"]),
        ("nextqa_open", ["published_nltk3.5", "per_item", 1, "wups0"]),
        ("nextqa_open", ["nltk3.10.4", "per_item", -3, "wups9"]),
        ("nextqa_open", ["nltk3.10.4", "per_item", 1, "wups9_lmms_eval_bug"]),
        ("nextqa_open", ["nltk3.10.4", "single_reference", "DO"]),
        ("nextgqa", ["per_item", "10001799542_8", "IoP"]),
        ("nextgqa", ["aggregate", "Acc@QA"]),
        ("vlind_bench", ["cartoon", "total", "d_micro"]),
        ("vlind_bench", ["all", "by_concept", "habitat", "d_pass_ratio_macro"]),
        ("ndcg_vidore", ["per_query", "q13", "map_cut_10"]),
        ("ndcg_vidore", ["mean", "precision_at_10"]),
        ("vbench_final_score", [-1, "total"]),
        ("vbench_final_score", [0, "normalised_weighted", "overall consistency"]),
    ],
)
def test_one_wrong_recorded_number_fails(
    case: str, place: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    cases, runner = (importlib.import_module(name) for name in ("parity_cases", "parity_open"))
    folder = Path(shutil.copytree(CASES / case, tmp_path / "eval" / case))
    expected = json.loads((folder / "expected.json").read_text())
    holder = expected
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] += 0.25
    write(folder / "expected.json", expected)
    run = runner.RUNNERS["eval", "scoring", case]
    assert sum(not one.passed for one in run(cases.Case(folder))) == 1


def test_chair_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    cases, runner = (importlib.import_module(name) for name in ("parity_cases", "parity_open"))
    assert not (CASES / "chair" / "synonyms.txt").exists()  # it has no licence
    with pytest.raises(cases.Skipped, match="no licence"):
        list(runner.captions(cases.Case(CASES / "chair")))


# CHAIR, over a table of our own

TABLE = "fruit, apple, pears\nboat, ship,  raft\nhot dog\ncup, wine glass\ntoilet\nchair, seat\nbird, gull\n"


def coco(folder: Path) -> Path:
    instances = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 5}],
        "categories": [{"id": 5, "name": "ship"}, {"id": 6, "name": "unlisted"}],
    }
    captions = {
        "images": instances["images"],
        "annotations": [{"image_id": 1, "caption": "Two hot dogs."}, {"image_id": 2, "caption": "Apples"}],
    }
    write(folder / "annotations" / "instances_val2014.json", instances)
    write(folder / "annotations" / "captions_val2014.json", captions)
    write(folder / "synonyms.txt", TABLE)
    return folder


def test_ground_truth_is_categories_and_reference_captions(tmp_path: Path) -> None:
    one, other = benchmark("chair").read(coco(tmp_path))
    assert (one.id, one.media, one.details["ground_truth"]) == ("1", "val2014/a.jpg", ["boat", "hot dog"])
    assert (other.media, other.details["ground_truth"]) == ("val2014/b.jpg", ["fruit"])
    write(tmp_path / "images.txt", "2\n")
    assert [item.id for item in benchmark("chair").read(tmp_path)] == ["2"]
    write(tmp_path / "images.txt", "3\n")
    with pytest.raises(DatasetError, match="image 3"):
        benchmark("chair").read(tmp_path)
    write(tmp_path / "images.txt", "a\n")
    with pytest.raises(DatasetError, match="'a' is no image number"):
        benchmark("chair").read(tmp_path)


def test_bad_coco_files_and_the_missing_table_are_named(tmp_path: Path) -> None:
    coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2014.json"
    content = json.loads(path.read_text())
    write(path, {**content, "annotations": [{"image_id": 1, "category_id": 9}]})
    with pytest.raises(DatasetError, match="instances_val2014.json: no category 9"):
        benchmark("chair").read(tmp_path)
    write(path, {**content, "annotations": [{"image_id": 1}]})
    with pytest.raises(DatasetError, match="annotations: entry 0: field 'category_id' is missing"):
        benchmark("chair").read(tmp_path)
    path.unlink()
    with pytest.raises(DatasetError, match="instances_val2014.json is missing"):
        benchmark("chair").read(tmp_path)
    (tmp_path / "synonyms.txt").unlink()
    with pytest.raises(DatasetError, match="LisaAnne/Hallucination, which has no licence"):
        benchmark("chair").read(tmp_path)


def table(folder: Path) -> dict[str, str]:
    return chair.read_table(write(folder / "synonyms.txt", TABLE))


def test_words_keep_their_spaces_and_take_the_last_lines_name(tmp_path: Path) -> None:
    known = table(tmp_path)
    assert known["apple"] == "fruit"
    assert known[" raft"] == "boat"
    assert "raft" not in known
    assert chair.read_table(write(tmp_path / "twice.txt", "a, x\nb, x"))["x"] == "b"


def test_objects_of_a_caption(tmp_path: Path) -> None:
    known = table(tmp_path)

    def found(caption: str) -> chair.Found:
        return chair.objects(chair.singulars(caption), known)

    assert found("Hot dogs and ships.") == (["hot dog", "and", "ship", "."], [0, 3], ["hot dog", "boat"])
    assert found("a seat").objects == ["chair"]
    assert found("A seat by the toilet").objects == ["toilet"]
    assert found("the toilet seat").words == ["the", "toilet"]
    assert found("a wine glass, wine glasses").objects == ["cup", "cup"]
    assert found("baby birds, an adult bird").words == ["bird", ",", "an", "bird"]
    assert found("a passenger train").words == ["a", "train"]
    assert found("bow tie").words == ["tie"]
    assert found("hot hot dog dog").words == ["hot", "hot dog", "dog"]


def test_rates_by_hand_and_without_any_object() -> None:
    pairs = [(["a", "b", "b"], ["a", "c"]), ([], ["a"]), (["a", "a"], ["a"])]
    assert chair.rates(pairs) == (1 / 3, 2 / 5, 2 / 4)
    assert [isnan(value) for value in chair.rates([([], [])])] == [False, True, True]
    assert isnan(chair.rates([])[0])


def test_chair_is_asked_and_summed_up(tmp_path: Path) -> None:
    items = benchmark("chair").read(coco(tmp_path))
    official = benchmark("chair").protocol("official")
    lemmas = chair.lmms_eval(tag=lambda words: ["NN"] * len(words))
    for protocol, tokens in ((official, 512), (lemmas, 2048)):
        assert protocol.prompt(items[0]) == ("Please describe this image in detail.", None, "")
        assert protocol.max_new_tokens == tokens
    rows = [judged(items[0], "A ship with apples", official), judged(items[1], "  ", official)]
    assert rows[0].verdict == (1, {"objects": ["boat", "fruit"], "hallucinated": ["fruit"]})
    assert rows[1].state == "unanswered"
    assert official.aggregate(rows) == {"CHAIRs": 1 / 2, "CHAIRi": 1 / 2, "Recall": 1 / 3}
    assert lemmas.aggregate(rows) == {"chair_s": 50, "chair_i": 50, "recall": pytest.approx(100 / 3)}


def test_lemmas_of_a_caption_follow_their_tags() -> None:
    asked = []

    def lemma(word: str, part: str) -> str:
        asked.append((word, part))
        return word.upper()

    tags = {"dogs": "NNS", "ran": "VBD", "red": "JJ", "fast": "RB", "to": "TO"}
    said = chair.lemmas("Dogs ran red fast to", lemma, lambda words: [tags[word] for word in words])
    assert said == ["DOGS", "RAN", "RED", "FAST", "TO"]
    assert asked == [("dogs", "n"), ("ran", "v"), ("red", "a"), ("fast", "r"), ("to", "n")]
    assert chair.lemmas("", lemma, lambda words: []) == []


@given(st.text())
def test_no_caption_makes_chair_raise(caption: str) -> None:
    item = Item("0", "", details={"ground_truth": ["boat"], "table": {"boat": "boat"}})
    verdict = chair.OFFICIAL.judge(item, caption)
    assert verdict.score in (0, 1)
    assert (verdict.parsed is None) == (not caption.strip())


# VLind-Bench

CONTEXT = {
    "concept": "food",
    "context_id": 3,
    "context": "Cats bark",
    "factual_context": "Cats meow",
    "true_statement": "A cat barks.",
    "false_statement": "A cat meows.",
    "existent_noun": "a cat",
    "non-existent_noun": "a cup",
    "best_img_id": 4,
    "aggregated_human_label_good_images": {"0": 3, "1": 1, "4": 2, "11": 2},
}


def staged_items(tmp_path: Path, **changes: object) -> list[Item]:
    return benchmark("vlind_bench").read(write(tmp_path / "data.json", [{**CONTEXT, **changes}]))


def test_every_stage_is_asked_word_by_word(tmp_path: Path) -> None:
    items = {item.id: item for item in staged_items(tmp_path)}
    official, other = (benchmark("vlind_bench").protocol(name) for name in ("official", "instructblip"))
    prompts = {key: official.prompt(item).user for key, item in items.items()}
    only = "Only respond in True or False."
    assert prompts == {
        **{
            f"food/3/a{i}": f"Statement: {s}\nBased on the common sense, is the given statement true or false? {only}"
            for i, s in ((1, "A cat meows."), (2, "A cat barks."))
        },
        **{
            f"food/3/b{i}": f"Statement: {s}\nBased on the image, is the given statement true or false? {only}"
            for i, s in ((1, "There is a cat in the given image."), (2, "There is a cup in the given image."))
        },
        **{
            f"food/3/c{i}": f"Context: Cats bark\nStatement: {s}\nBased on the context, is the given statement true or "
            "false? Forget real-world common sense and just follow the information provided in the context. " + only
            for i, s in ((1, "A cat barks."), (2, "A cat meows."))
        },
        **{
            f"food/3/d{i}/{image}": f"Statement: {s}\nBased on the image, is the given statement true or false? Forget "
            f"real-world common sense and just follow the information provided in the image. {only}"
            for image in (0, 4, 11)
            for i, s in ((1, "A cat barks."), (2, "A cat meows."))
        },
    }
    assert other.prompt(items["food/3/c2"]).user == (
        f"{only} Context: Cats bark\nStatement: A cat meows.\nBased on the context, is the given statement true or "
        "false?"
    )
    media = {key: item.media for key, item in items.items()}
    assert media["food/3/a1"] == "food/3_Cats meow/0.jpg"
    assert media["food/3/b2"] == media["food/3/c1"] == "food/3_Cats bark/4.jpg"
    assert media["food/3/d2/11"] == "food/3_Cats bark/11.jpg"
    assert all(item.answer is (item.details["statement"] == 1) for item in items.values())


def staged_score(items: list[Item], wrong: str = "") -> dict[str, float]:
    protocol = benchmark("vlind_bench").protocol()
    answers = [(item, str(item.answer if item.id != wrong else not item.answer)) for item in items]
    return protocol.aggregate([judged(item, said, protocol) for item, said in answers])


def test_a_stage_counts_where_the_ones_before_passed(tmp_path: Path) -> None:
    items = staged_items(tmp_path)
    names = ("a_pass_ratio", "b_pass_ratio", "c_pass_ratio", "d_pass_ratio_macro", "c_ratio", "d_ratio_macro")

    def ratios(wrong: str, style: str = "all") -> list[float]:
        found = staged_score(items, wrong)
        return [found[f"{style}/{name}"] for name in names]

    assert ratios("") == [100] * 6
    assert ratios("food/3/a1") == [0, 100, 0, 0, 100, 100]
    assert ratios("food/3/b2") == [100, 0, 100, 0, 100, 100]
    assert ratios("food/3/c2") == [100, 100, 0, 0, 0, 100]
    assert ratios("food/3/d1/4") == pytest.approx([100, 100, 100, 200 / 3, 100, 200 / 3])
    assert ratios("food/3/d1/4", "illustration") == [100, 100, 100, 0, 100, 0]
    assert ratios("food/3/d1/4", "cartoon") == [100] * 6
    assert staged_score(items)["all/n"] == 1


def test_a_statement_without_a_verdict_was_not_passed(tmp_path: Path) -> None:
    items = staged_items(tmp_path)
    protocol = benchmark("vlind_bench").protocol()
    rows = [judged(item, str(item.answer), protocol) for item in items]
    lost = [Judged(row.item, None, None, "model error") if row.item.id == "food/3/b1" else row for row in rows]
    for some in (lost, [row for row in rows if row.item.id != "food/3/b1"]):
        assert protocol.aggregate(some)["all/b_pass_ratio"] == 0
    twice = vlind_bench.contexts([*lost, *lost])
    assert twice == vlind_bench.contexts(lost) * 2


def test_contexts_without_a_good_image_are_left_out(tmp_path: Path) -> None:
    assert staged_items(tmp_path, aggregated_human_label_good_images={"0": 1}) == []
    items = staged_items(tmp_path, aggregated_human_label_good_images={"0": 2})
    assert staged_score(items)["cartoon/n"] == 0
    assert staged_score(items)["photorealistic/n"] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"true_statement": 1}, "field 'true_statement' is int, not str"),
        ({"aggregated_human_label_good_images": {"0": "2"}}, "aggregated_human_label_good_images': '0': '2'"),
        ({"aggregated_human_label_good_images": {"x": 2}}, "'x': 2"),
        ({"best_img_id": None}, "field 'best_img_id' is NoneType"),
    ],
)
def test_bad_contexts_are_named(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        staged_items(tmp_path, **changes)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("True", True),
        ("FALSE.", False),
        ("It is, true, not false", True),
        ("untrue", None),
        ("", None),
        ("a\ntrue", True),
    ],
)
def test_the_first_word_that_is_true_or_false(said: str, meant: bool | None) -> None:
    assert vlind_bench.parse(said) is meant


@given(st.text() | st.text("truefals .,\n"))
def test_no_response_makes_vlind_bench_raise(said: str) -> None:
    verdict = vlind_bench.judge(Item("0", "s", True), said)
    assert verdict.score == (verdict.parsed is True)


# Files


def test_scorers_of_files() -> None:
    assert set(FILE_SCORERS) == {"next_gqa", "vidore", "vbench"}
    for name, scorer in FILE_SCORERS.items():
        assert scorer.name == name
        with pytest.raises(InputError, match=f"takes {len(scorer.files)} files, not 0"):
            scorer.score([])
        with pytest.raises(InputError, match=f"It has: {scorer.protocols[0]}"):
            scorer.score([], "other")
        with pytest.raises(DatasetError, match="no-such-file"):
            scorer.score(["no-such-file"] * len(scorer.files))


def test_overlaps_by_hand() -> None:
    assert next_gqa.overlap((2, 4), [(3, 7)]) == (1 / 5, 1 / 2)
    assert next_gqa.overlap((2, 4), [(3, 7), (2, 20)]) == (1 / 5, 1)  # each measure has its own best segment
    assert next_gqa.overlap((2, 4), [(4, 7), (8, 9)]) == (0, 0)
    assert next_gqa.overlap((3, 3), [(3, 7)]) == (0, 1)
    assert next_gqa.overlap((2, 2), [(3, 7)]) == (0, 0)
    assert next_gqa.in_seconds((0.1234, 0.5), 10) == (1.2, 5.0)


spans = st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda pair: (float(min(pair)), float(max(pair))))


@given(spans, st.lists(spans, min_size=1, max_size=3))
def test_overlaps_are_shares(predicted: next_gqa.Span, segments: list[next_gqa.Span]) -> None:
    found = next_gqa.overlap(predicted, segments)
    assert 0 <= found.iou <= found.iop <= 1
    assert (found.iou == 1) == (predicted in segments and predicted[0] < predicted[1])


GROUND = {"v": {"duration": 10, "fps": 30, "location": {"1": [[2, 4]], "2": [[5, 9]]}}}


def gqa(folder: Path, spans: object, answers: object | None = None, ground: object = GROUND) -> list[Path]:
    right = {"answer": 1, "prediction": 1}
    answers = {"v_1": right, "v_2": {"answer": 1, "prediction": 2}} if answers is None else answers
    given_files = {"ground.json": ground, "spans.json": spans, "answers.json": answers}
    return [write(folder / name, content) for name, content in given_files.items()]


def test_missing_spans_are_counted_and_strict_takes_them_for_nothing(tmp_path: Path) -> None:
    paths = gqa(tmp_path, {"v_1": [2, 4], "other_1": [0, 1]})
    scorer = FILE_SCORERS["next_gqa"]
    official, strict = scorer.score(paths), scorer.score(paths, "strict")
    assert (official["Acc@GQA"], official["mIoU"], official["missing_spans"]) == (100, 100, 1)
    assert (strict["Acc@GQA"], strict["mIoU"], strict["missing_spans"]) == (50, 50, 1)
    assert official["Acc@QA"] == strict["Acc@QA"] == 50
    fractions = gqa(tmp_path, {"v_1": [0.2, 0.4], "v_2": [0.5, 0.9]})
    for protocol in ("official_fractions", "strict_fractions"):
        assert scorer.score(fractions, protocol)["mIoU"] == 100
        assert scorer.score(fractions, protocol)["Acc@GQA"] == 50
    assert scorer.score(fractions)["mIoU"] == 0
    half = scorer.score(gqa(tmp_path, {"v_1": [0, 4]}))
    assert (half["mIoP"], half["TIoP@0.5"], half["Acc@GQA"]) == (50, 100, 100)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"spans": {"v_1": [4, 2]}}, r"spans.json: v_1: \[4, 2\] is no \[start, end\]"),
        ({"spans": {"v_1": "x"}}, "spans.json: v_1: 'x'"),
        ({"spans": {"v_1": [2, 4]}, "answers": {}}, "answers.json: no answer v_1"),
        ({"spans": {}, "answers": {"v_1": {"answer": 1}}}, "entry v_1: field 'prediction' is missing"),
        ({"spans": {}, "ground": {"v": {"duration": 1, "location": {"1": []}}}}, "video v: location 1"),
        ({"spans": {}, "ground": {"v": {"location": {}}}}, "video v: field 'duration' is missing"),
    ],
)
def test_bad_grounding_files_are_named(tmp_path: Path, files: dict, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        FILE_SCORERS["next_gqa"].score(gqa(tmp_path, **files))


def test_retrieval_by_hand(tmp_path: Path) -> None:
    assert vidore.ranking({"d10": 1.0, "d9": 1.0, "d1": 2.0}) == ["d1", "d9", "d10"]
    found = vidore.per_query({"a": 3, "b": 1, "c": 0}, {"c": 3.0, "b": 2.0, "a": 1.0})
    assert found["ndcg_cut_3"] == (1 / log2(3) + 3 / log2(4)) / (3 + 1 / log2(3))
    assert found["map_cut_3"] == (1 / 2 + 2 / 3) / 2
    assert (found["P_5"], found["recall_1"]) == (2 / 5, 0)
    assert set(vidore.per_query({"a": 0}, {"a": 1.0}).values()) == {0.0}
    qrels, run = write(tmp_path / "qrels.json", {"q": {"a": 1}}), write(tmp_path / "run.json", {"q": {"a": 1}, "x": {}})
    totals = FILE_SCORERS["vidore"].score([qrels, run])
    assert (totals["ndcg_at_5"], totals["skipped_queries"]) == (1, 1)
    for content, said in (
        ({"q": 1}, "query q is no mapping"),
        ({"q": {"a": "x"}}, "document a: 'x'"),
        ({"q": {"a": 1e999}}, "inf"),
        ({"other": {}}, "no query"),
    ):
        with pytest.raises(DatasetError, match=said):
            FILE_SCORERS["vidore"].score([qrels, write(run, content)])


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 3), min_size=1),
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 2).map(float)),
)
def test_retrieval_metrics_are_shares(relevances: dict[str, int], scores: dict[str, float]) -> None:
    assert all(0 <= value <= 1 + 1e-12 for value in vidore.per_query(relevances, scores).values())
    perfect = vidore.per_query(relevances, {document: float(value) for document, value in relevances.items()})
    assert perfect["ndcg_cut_10"] == (1 if any(relevances.values()) else 0)


def test_total_scores_of_generated_video(tmp_path: Path) -> None:
    best = {name: one.most for name, one in (vbench.QUALITY | vbench.SEMANTIC).items()}
    assert vbench.score(best)["total"] == pytest.approx(1)
    still = vbench.score({**best, "dynamic degree": 0})
    assert still["quality"] == pytest.approx(6 / 6.5)
    assert still["total"] == pytest.approx((4 * 6 / 6.5 + 1) / 5)
    none = vbench.score({})
    assert none["missing_dimensions"] == 16
    assert none["subject consistency"] == pytest.approx(-0.1462 / (1 - 0.1462))

    animated = {name: one.most for name, one in (vbench.IMAGE_TO_VIDEO_QUALITY | vbench.IMAGE_TO_VIDEO).items()}
    moved = vbench.score_image_to_video({**animated, "video-text camera motion": 0})
    assert moved["i2v"] == pytest.approx(2 / 2.1)
    assert moved["quality"] == pytest.approx(1)
    assert moved["total"] == pytest.approx((1 + 2 / 2.1) / 2)

    path = write(tmp_path / "r.json", {name.replace(" ", "_"): [value, []] for name, value in animated.items()})
    scorer = FILE_SCORERS["vbench"]
    assert scorer.score([path], "official_i2v")["total"] == pytest.approx(1)
    with pytest.raises(DatasetError, match="'video-text camera motion' is none of subject consistency"):
        scorer.score([path])
    for value in ("x", None, [], True):
        with pytest.raises(DatasetError, match="color"):
            scorer.score([write(path, {"color": value})])
