"""Multiple choice and yes/no: what the recorded data of the parity cases do not hold."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmzoo.errors import DatasetError, InputError, MissingExtra
from mmzoo.media import SAMPLING_RULES, Video
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, judged
from mmzoo_eval.benchmarks import benchmark, egoschema, mlvu, mme, mvbench, next_qa, pope, video_mme
from mmzoo_eval.parsing import (
    PREFIXES,
    before_bracket,
    by_priority,
    first_capital,
    first_named,
    last_named,
    mvbench_letter,
    stand_alone_capital,
    two_way,
    without_prefixes,
)
from mmzoo_eval.prompts import bracketed, question_block
from mmzoo_eval.subtitles import Cue, Shown, each_once, in_font_tags, one_a_frame, read_srt, shown

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "parity" / "eval"
CASES = {
    "mvbench": "mvbench",
    "video_mme": "videomme",
    "mlvu": "mlvu",
    "next_qa": "nextqa_mc",
    "egoschema": "egoschema",
    "perception_test": "perceptiontest",
    "videovista": "videovista",
    "pope": "pope",
    "mme": "mme",
}
PROTOCOLS = [(name, protocol) for name in CASES for protocol in benchmark(name).protocols]
LETTER = "Answer with the option's letter from the given choices directly."
WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)
SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option."
)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def asked(name: str, protocol: str, item: Item) -> Prompt:
    prompt = benchmark(name).protocol(protocol).prompt
    assert prompt is not None
    return prompt(item)


def verdicts(name: str, protocol: str, items: Sequence[Item], said: Sequence[str]) -> list[Judged]:
    return [judged(item, one, benchmark(name).protocol(protocol)) for item, one in zip(items, said, strict=True)]


# What is asked

ITEM = Item("x", "What?", 1, ("a cat", "no dog "))
SHOWN = Item("x", "What?", 1, ("cat", "dog"), details={"options": ("A. cat", "B. dog"), "subtitles": None})
BLOCK = "Question: What?\nOptions:\n(A) a cat\n(B) no dog"
STAGED = "Best option:("


@pytest.mark.parametrize(
    ("name", "protocol", "item", "prompt"),
    [
        ("mvbench", "official", ITEM, Prompt(f"{WATCH}{BLOCK}\nOnly give the best option.", WATCH, STAGED)),
        ("mvbench", "official_no_prefix", ITEM, Prompt(f"{WATCH}{BLOCK}\nOnly give the best option.", WATCH, STAGED)),
        ("mvbench", "vlmevalkit", ITEM, Prompt(f"{BLOCK}\nOnly give the best option.", WATCH, STAGED)),
        ("mvbench", "vlmevalkit_mp4", ITEM, Prompt(f"{BLOCK}\nOnly give the best option.", WATCH, STAGED)),
        ("mvbench", "video_ccam", ITEM, Prompt(f"{BLOCK}\n{LETTER}")),
        (
            *("mvbench", "lmms_eval", ITEM),
            Prompt("Question:What?\nOption:\n(A) a cat\n(B) no dog \nOnly give the best option.\n"),
        ),
        ("video_mme", "official", SHOWN, Prompt(f"{SELECT}\nWhat?\nA. cat\nB. dog\nThe best answer is:")),
        (
            *("video_mme", "vlmevalkit", SHOWN),
            Prompt(
                f"\nThese are the frames of a video. {SELECT}\nQuestion: What?\nA. cat\nB. dog\nAnswer: ",
            ),
        ),
        (
            *("video_mme", "videomme_v2", SHOWN),
            Prompt(f"\nThese are the frames of a video. {SELECT}\nQuestion: What?\nA. cat\nB. dog\nAnswer: "),
        ),
        (
            *("video_mme", "lmms_eval", SHOWN),
            Prompt(
                "Select the best answer to the following multiple-choice question based on the video and the "
                "subtitles. Respond with only the letter (A, B, C, or D) of the correct option.\n"
                f"What?\nA. cat\nB. dog\n\n{LETTER}"
            ),
        ),
        ("video_mme", "video_ccam", SHOWN, Prompt(f"{SELECT}\nWhat?\nA. cat\nB. dog\n{LETTER}")),
        (
            *("mlvu", "official", ITEM),
            Prompt(
                f"{BLOCK}Only give the best option.",
                "Carefully watch this video and pay attention to every detail. Based on your observations, select the "
                "best option that accurately addresses the question.",
                "Best Option: (",
            ),
        ),
        (
            *("mlvu", "lmms_eval", ITEM),
            Prompt("What?\n(A) a cat\n(B) no dog \nOnly give the best option.\nBest option: ("),
        ),
        ("mlvu", "video_ccam", ITEM, Prompt(f"{BLOCK}\n{LETTER}")),
        ("next_qa", "lmms_eval", ITEM, Prompt("What?\nA. a cat\nB. no dog")),
        ("next_qa", "official", ITEM, Prompt("What?\nA. a cat\nB. no dog")),
        ("egoschema", "lmms_eval", ITEM, Prompt(f"What?\nA. a cat\nB. no dog \n{LETTER}")),
        ("perception_test", "lmms_eval", ITEM, Prompt(f"What?\nA. a cat\nB. no dog \n{LETTER}")),
        ("videovista", "video_ccam", ITEM, Prompt(f"What?\nOptions:\n(A) a cat\n(B) no dog \n\n{LETTER}")),
        ("pope", "official", ITEM, Prompt("What?")),
        ("pope", "lmms_eval", ITEM, Prompt("What?\nAnswer the question using a single word or phrase.")),
        ("pope", "vlmevalkit", ITEM, Prompt("What?")),
        (
            *("mme", "lmms_eval", Item("x", "Is it? Please answer yes or no.")),
            Prompt("Is it?\nAnswer the question using a single word or phrase."),
        ),
    ],
)
def test_prompts_to_the_letter(name: str, protocol: str, item: Item, prompt: Prompt) -> None:
    assert asked(name, protocol, item) == prompt


def test_every_protocol_asks_with_a_known_frame_rule_and_sums_up_its_headline() -> None:
    for name, case in CASES.items():
        known = benchmark(name)
        items = known.read(DATA / case)
        assert known.name == name and len({item.id for item in items}) == len(items)
        for protocol in known.protocols.values():
            assert protocol.prompt is not None
            assert protocol.prompt(shown(items[0], None)).user
            assert protocol.frames.sampling in {None, *SAMPLING_RULES}
            assert protocol.headline in protocol.aggregate([judged(item, "B", protocol) for item in items])
    assert {(name, next(iter(benchmark(name).protocols))) for name in CASES} == {
        *((name, "official") for name in ("mvbench", "video_mme", "mlvu", "pope")),
        *((name, "lmms_eval") for name in ("next_qa", "egoschema", "perception_test", "mme")),
        ("videovista", "video_ccam"),
    }


@pytest.mark.parametrize(
    ("name", "protocol", "sampling", "num_frames", "tokens"),
    [
        ("mvbench", "official", "mvbench", 16, 100),
        ("mvbench", "vlmevalkit", "mvbench", 8, 100),
        ("mvbench", "vlmevalkit_mp4", "vlmevalkit_mp4", 8, 100),
        ("mvbench", "video_ccam", "mvbench", 32, 100),
        ("mvbench", "lmms_eval", None, None, 16),
        ("video_mme", "lmms_eval", None, None, 16),
        ("video_mme", "vlmevalkit", "vlmevalkit_nframe", 8, 16),
        ("video_mme", "video_ccam_subtitles", "ccam_uniform", 96, 100),
        ("mlvu", "video_ccam", "ccam_uniform", 96, 100),
        ("videovista", "video_ccam", "ccam_uniform", 96, 100),
    ],
)
def test_frames_and_budgets(name: str, protocol: str, sampling: str, num_frames: int, tokens: int) -> None:
    one = benchmark(name).protocol(protocol)
    assert (one.frames.sampling, one.frames.num_frames, one.max_new_tokens) == (sampling, num_frames, tokens)


def test_options_get_letters() -> None:
    assert question_block("why?", ["so", "not "]) == "Question: why?\nOptions:\n(A) so\n(B) not"
    assert bracketed(-1, "none") == "(@) none"


# What is read


def test_mvbench_has_a_folder_for_each_task_and_a_bound_for_some(tmp_path: Path) -> None:
    row = {"video": "v.mp4", "question": "?", "candidates": ["x", "y"], "answer": "y", "start": 1, "end": 2.5}
    for task in mvbench.FOLDERS:
        write(tmp_path / "json" / f"{task}.json", [row])
    items = {item.kind: item for item in mvbench.read(tmp_path)}
    assert len(items) == 20 == len(mvbench.read(tmp_path / "json"))
    assert {kind for kind, item in items.items() if item.bound == (1.0, 2.5)} == {
        *("action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning"),
    }
    assert {item.bound for item in items.values()} == {None, (1.0, 2.5)}
    item = items["episodic_reasoning"]
    assert (item.id, item.media, item.answer) == ("episodic_reasoning/0", "tvqa/frames_fps3_hq/v.mp4", 1)
    assert item.details == {"lmms_eval_media": "tvqa/video_fps3_hq_segment/v.mp4", "video_fps": 3.0}
    assert items["character_order"].details == {"lmms_eval_media": "perception/videos/v.mp4"}
    assert items["fine_grained_pose"].details["lmms_eval_media"] == "nturgbd_convert/v.mp4"
    (alone,) = mvbench.read(tmp_path / "json" / "state_change.json")
    assert alone == items["state_change"]


def test_video_mme_keeps_the_published_options_and_finds_subtitles(tmp_path: Path) -> None:
    rows = json.loads((DATA / "videomme" / "questions.json").read_text())[:4]
    rows[0]["options"] = ["A. A. Lincoln", "B.x", "C. C", "D. "]
    write(tmp_path / "questions.json", rows)
    srt = write(tmp_path / "subtitle" / f"{rows[0]['videoID']}.srt", "")
    first, *_, last = video_mme.read(tmp_path)
    assert first.options == ("A. Lincoln", "x", "C", "") and first.details["options"][0] == "A. A. Lincoln"
    assert first.details["subtitles"] == str(srt) and last.details["subtitles"] is None
    assert (first.media, first.kind, first.cluster) == (f"{rows[0]['videoID']}.mp4", "short", rows[0]["videoID"])


def test_tables_of_the_hub_are_read_with_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads((DATA / "mme" / "questions.json").read_text())
    path = write(tmp_path / "data" / "test-00000.parquet", "")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"mmzoo\[datasets\]"):
        benchmark("mme").read(tmp_path)

    def read_table(given: Path, columns: list[str]) -> Any:
        assert given == path
        return SimpleNamespace(to_pylist=lambda: [{name: row[name] for name in columns} for row in rows])

    known = SimpleNamespace(ArrowException=RuntimeError, parquet=SimpleNamespace(read_table=read_table))
    monkeypatch.setitem(sys.modules, "pyarrow", known)
    assert benchmark("mme").read(tmp_path) == benchmark("mme").read(DATA / "mme")
    known.parquet.read_table = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no table"))
    with pytest.raises(DatasetError, match="test-00000.parquet: no table"):
        benchmark("mme").read(path)


def test_perception_test_videos_stop_where_the_mapping_cuts_them(tmp_path: Path) -> None:
    shutil.copy(DATA / "perceptiontest" / "mc_question_valid.json", tmp_path)
    write(tmp_path / "cut_frame_mapping_valid.json", {"video_1": 250})
    cuts = {item.cluster: item.details["cut_frame"] for item in benchmark("perception_test").read(tmp_path)}
    assert cuts["video_1"] == 250 and {cut for name, cut in cuts.items() if name != "video_1"} == {None}
    write(tmp_path / "cut_frame_mapping_valid.json", {"video_1": "soon"})
    with pytest.raises(DatasetError, match="cut_frame_mapping, field 'video_1'"):
        benchmark("perception_test").read(tmp_path)


def test_where_videos_of_the_others_lie() -> None:
    first = {name: benchmark(name).read(DATA / case)[0] for name, case in CASES.items()}
    assert first["videovista"].media == "merged/Howto/0/v0.0.1.mp4"
    assert first["videovista"].details == {"media_pattern": "merged/*/0/v0.0.1.mp4"}
    assert first["mlvu"].media == "1_plotQA/plotQA_0.mp4"
    assert first["next_qa"].media == "4000000000.mp4" and first["next_qa"].cluster == "4000000000"
    assert first["pope"].media == "COCO_val2014_000000310196.jpg"
    assert first["mme"].media == first["mme"].cluster == "existence/0000.png"


def test_pope_tells_its_sets_apart(tmp_path: Path) -> None:
    for kind in ("random", "popular"):
        shutil.copy(DATA / "pope" / "coco_pope_random.json", tmp_path / f"coco_pope_{kind}.json")
    items = benchmark("pope").read(tmp_path)
    assert len(items) == 186
    rows = verdicts("pope", "official", items, ["yes" if "random" in item.id else "no" for item in items])
    sums = benchmark("pope").protocol("official").aggregate(rows)
    assert (sums["coco_pope_random/yes_ratio"], sums["coco_pope_popular/yes_ratio"], sums["yes_ratio"]) == (1, 0, 0.5)
    assert np.isnan(sums["coco_pope_popular/precision"])  # where upstream divides by zero


def broken(rows: Any, change: Callable[[Any], None]) -> Any:
    copied = json.loads(json.dumps(rows))
    change(copied)
    return copied


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("mvbench", "json/action_count.json", lambda x: x[2].update(answer="Sang"), "row 2, field 'answer': 'Sang' is"),
        ("mvbench", "json/action_count.json", lambda x: x[1].pop("candidates"), "row 1, field 'candidates': missing"),
        (
            "mvbench",
            "json/action_count.json",
            lambda x: x[1].update(candidates=[]),
            "row 1, field 'candidates': a list",
        ),
        (
            "mvbench",
            "json/action_count.json",
            lambda x: x[1].update(candidates=[[]]),
            r"field 'candidates\[0\]': a text",
        ),
        ("mvbench", "json/action_sequence.json", lambda x: x[0].update(end="7"), "row 0, field 'end': a number of sec"),
        ("mvbench", "json/action_sequence.json", lambda x: x.insert(0, "text"), "row 0: an object with fields"),
        (
            "video_mme",
            "questions.json",
            lambda x: x[0].update(answer="E"),
            "row 0, field 'answer': 'E' is none of A, B",
        ),
        ("video_mme", "questions.json", lambda x: x[0].update(duration="huge"), "row 0, field 'duration': 'huge' is"),
        ("video_mme", "questions.json", lambda x: x.append(x[0]), "another row has the id '001-1' too"),
        (
            "mlvu",
            "json/2_needle.json",
            lambda x: x[0].update(answer=None),
            "2_needle.json, row 0, field 'answer': miss",
        ),
        ("mlvu", "json/2_needle.json", lambda x: x[0].update(question=True), "field 'question': a text belongs"),
        ("egoschema", "questions.json", lambda x: x[3].pop("option 4"), "row 3, field 'option 4': missing"),
        ("egoschema", "subset_answers.json", lambda x: x.update(dict.fromkeys(x, 5)), "subset_answers.json, field '0"),
        (
            *("perception_test", "mc_question_valid.json"),
            *(
                lambda x: x["video_1"]["mc_question"][0].update(answer_id=3),
                "video video_1, mc_question 0, field 'answer",
            ),
        ),
        ("perception_test", "mc_question_valid.json", lambda x: x.update(v={}), "video v, field 'mc_question': a list"),
        ("videovista", "VideoVista.json", lambda x: x[5].update(Type="Singing"), "row 5, field 'Type': 'Singing' is"),
        ("videovista", "VideoVista.json", lambda x: x[5].update(Answer=-1), "row 5, field 'Answer': a whole number"),
        (
            "videovista",
            "VideoVista.json",
            lambda x: x[5].update(video_name="v"),
            "row 5, field 'video_name': 'v' has no",
        ),
        (
            "mme",
            "questions.json",
            lambda x: x[0].update(answer="Maybe"),
            "row 0, field 'answer': 'Maybe' is none of Yes",
        ),
        ("mme", "questions.json", lambda x: x[0].update(category="taste"), "row 0, field 'category': 'taste' is none"),
        ("mme", "questions.json", lambda x: x.clear(), "no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, file: str, change: Callable[[Any], None], said: str) -> None:
    shutil.copytree(DATA / CASES[name], tmp_path, dirs_exist_ok=True)
    write(tmp_path / file, broken(json.loads((tmp_path / file).read_text()), change))
    with pytest.raises(DatasetError, match=said):
        benchmark(name).read(tmp_path)


def test_all_bad_rows_are_named_at_once(tmp_path: Path) -> None:
    rows = json.loads((DATA / "videovista" / "VideoVista.json").read_text())
    for row in rows[:3]:
        row["Answer"] = 9
    with pytest.raises(DatasetError) as caught:
        benchmark("videovista").read(write(tmp_path / "VideoVista.json", rows))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "file", "content", "said"),
    [
        ("next_qa", "val.csv", "video,question\n1,2\n", "val.csv: line 2: field 'answer' is missing"),
        ("next_qa", "val.csv", "video,question,answer,qid,type,a0,a1,a2,a3,a4\n", "no rows"),
        (
            "next_qa",
            "val.csv",
            "video,question,answer,qid,type,a0,a1,a2,a3,a4\n1,?,5,0,CW,a,b,c,d,e\n",
            "field 'answer'",
        ),
        (
            "next_qa",
            "val.csv",
            "video,question,answer,qid,type,a0,a1,a2,a3,a4\n1,?,0,0,DB,a,b,c,d,e\n",
            "'DB' is none of",
        ),
        ("pope", "coco_pope_random.json", '{"question_id": 1}\n', "line 1, field 'image': missing"),
        ("pope", "coco_pope_random.json", "{}\n\n{", "line 3: "),
        ("pope", "coco_pope_random.json", "[1]\n", "line 1: an object"),
        ("mvbench", "json/singing.json", [], "'singing' is none of action_sequence"),
        ("mvbench", "json/state_change.json", {}, "state_change.json: is dict, not list"),
        ("video_mme", "questions.json", "[", "questions.json: "),
        ("videovista", "VideoVista.json", b"\xff", "VideoVista.json: 'utf-8'"),
        ("egoschema", "questions.json", "[" * 100_000, "questions.json: "),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, file: str, content: Any, said: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        write(tmp_path / file, content)
    with pytest.raises(DatasetError, match=said):
        benchmark(name).read(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_folder_without_annotations_says_what_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="no "):
        benchmark(name).read(tmp_path)
    with pytest.raises(DatasetError):
        benchmark(name).read(tmp_path / "nowhere.json")


def test_of_two_splits_one_has_to_be_named(tmp_path: Path) -> None:
    for split in ("val", "test"):
        shutil.copy(DATA / "nextqa_mc" / "test.csv", tmp_path / f"{split}.csv")
    with pytest.raises(DatasetError, match="several files.*\n.*test.csv\n.*val.csv"):
        benchmark("next_qa").read(tmp_path)
    assert len(benchmark("next_qa").read(tmp_path / "val.csv")) == 72


# What is made of responses

WORDS = st.sampled_from(
    [
        "A",
        "b",
        "(C)",
        "D.",
        "E:",
        "the answer is",
        "Answer:",
        "Yes",
        "no",
        "not",
        "(",
        ")",
        " ",
        "\n",
        "İ",
        "a cat",
        ".",
    ]
)
RESPONSES = st.one_of(st.text(), st.lists(WORDS, max_size=9).map(" ".join), st.lists(WORDS, max_size=9).map("".join))


@pytest.fixture(scope="module")
def first_items() -> dict[str, Item]:
    return {name: benchmark(name).read(DATA / case)[0] for name, case in CASES.items()}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(response=RESPONSES, options=st.lists(st.text(), min_size=5, max_size=5))
def test_no_judge_raises_or_draws_at_random(first_items: dict[str, Item], response: str, options: list[str]) -> None:
    state = random.getstate(), str(np.random.get_state())
    for name, protocol in PROTOCOLS:
        item = first_items[name]
        if item.options:
            item = Item(item.id, item.question, item.answer, tuple(options), details=item.details)
        verdict = benchmark(name).protocol(protocol).judge(item, response)
        assert verdict == benchmark(name).protocol(protocol).judge(item, response)
        assert verdict.score in (0.0, 1.0, None)
        assert verdict.parsed is None or isinstance(verdict.parsed, int | str)
    assert state == (random.getstate(), str(np.random.get_state()))


def test_what_upstream_draws_at_random_is_unanswered_and_wrong() -> None:
    items = [Item(str(i), "?", i, ("run", "sit", "eat", "jump", "sing")) for i in range(5)]
    for name in ("next_qa", "egoschema"):
        rows = verdicts(name, "lmms_eval", items, ["I cannot say what that is"] * 5)
        assert {(row.state, row.verdict.score) for row in rows if row.verdict} == {("unanswered", 0.0)}


def test_what_the_lenient_rules_call_right_counts_as_unanswered_where_nothing_is_named() -> None:
    item = Item("x", "?", 1, ("cat", "dog", "cow"))
    lenient = {"official": ["", "  \n"], "official_no_prefix": ["", "("], "vlmevalkit": [" "], "video_ccam": [")"]}
    for protocol, said in lenient.items():
        for row in verdicts("mvbench", protocol, [item] * len(said), said):
            assert (row.verdict.score, row.state) == (1.0, "unanswered")  # type: ignore[union-attr]
    (row,) = verdicts("mvbench", "vlmevalkit_mp4", [item], ["It is (A), not the dog"])
    assert row.verdict == (1.0, 1)
    (row,) = verdicts("mvbench", "lmms_eval", [item], [""])
    assert row.verdict == (None, None)
    assert verdicts("mvbench", "lmms_eval", [item], [" "])[0].verdict == (0.0, None)
    # An option without text, which makes upstream raise.
    assert two_way("(b)", "(B) ") and not two_way("(a)", "(B) ")


def test_periods_matter_in_one_direction_only() -> None:
    assert two_way("(b.)", "(B) x") and not two_way("x(.b)", "(B) x")
    assert two_way("x(b)", "(B) x") and two_way("(b)...", "(B) x")


def test_a_word_is_quoted_for_a_number() -> None:
    item = Item("x", "?", 1, ("2", "3.", "Dogs. "))
    for right, said, score in ((1, "there are three", 1.0), (1, "there are thirteen", 0.0), (2, "some dogs!", 1.0)):
        (row,) = verdicts("mvbench", "vlmevalkit_mp4", [Item("x", "?", right, item.options)], [said])
        assert row.verdict is not None and row.verdict.score == score, said


def test_an_answer_is_its_first_word() -> None:
    assert without_prefixes("Answer: (B) because", "(B) Tidied up.")
    assert without_prefixes("The answer is b.", "(B) Tidied up.")
    assert not without_prefixes("", "(B) x")
    assert not without_prefixes("Because B", "(B) x")
    assert without_prefixes("Answer is B", "(B) x") and not without_prefixes("Answer is B", "(B) x", PREFIXES[:2])


def test_letters_of_the_other_rules() -> None:
    assert mvbench_letter("b.dog") == "B" and mvbench_letter("so ('b')") == "B"
    assert mvbench_letter("b-x-\ny") is None and mvbench_letter("b-x-y") == "B"
    assert stand_alone_capital("D or A") == "D" and stand_alone_capital("xD d") is None
    assert first_capital("Final Answer: C", video_mme.V2_PHRASES, "ABCDEFGH") == "C"
    assert first_capital("Best option: C", video_mme.OFFICIAL_PHRASES) == "B"
    (row,) = verdicts("video_mme", "videomme_v2", [Item("x", "?", 4, tuple("vwxyz"))], ["E"])
    assert row.verdict == (1.0, 4)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A (B) C) D:", "A"),  # a start wins over an end, and that over all else
        ("so (B) or C", "C"),
        ("so the best answer is Dog or (B), yes", "B"),  # after a phrase, the last first place of a letter
        ("is it (B)? so the answer is Dog yes", "D"),
        ("no (B), yes C. it is", "B"),
        ("no B. yes C: it is", "B"),
        ("no B: yes C) it is", "B"),
        ("no B) yes C it is", "B"),
        ("yes B ok and C it is", "C"),
        ("xAx xBx", "B"),
        ("say (A) or B.\n", "B"),
        ("yes (C) or xB", "C"),
        ("a b c d", None),
        ("答案是C吗", "C"),
        (" \t", None),
    ],
)
def test_priorities(said: str, letter: str | None) -> None:
    assert by_priority(said) == letter


def test_next_qa_takes_the_last_and_egoschema_the_first() -> None:
    options = ("run far away", "sit down", "eat", "jump", "sing")
    assert (last_named("(B) or (D)", options), first_named("(B) or (D)", options)) == ("D", "B")
    assert (last_named("B or (D)", options), first_named("(D) or B", options)) == ("D", "D")
    assert last_named("no D or B yes", options) == "B"
    assert last_named("B xD", options) == last_named("B.x D.x", options) == last_named("B A.;", options) == "B"
    assert (last_named("D. or B.", options), first_named("D. or B", options)) == ("B", "D")  # the last is stripped
    sentence = "they all SIT DOWN before they Jump"
    assert last_named(sentence, options) == "D" and last_named("they sit down jump", options) is None
    assert first_named(sentence, options) is None
    assert first_named("so they all do a. run far away", options) == "A"


def test_yes_and_no() -> None:
    assert [pope.no_among_words(said) for said in ("No, sir", "NO", "", "Sure. No")] == ["no", "yes", "yes", "yes"]
    assert pope.one_of_both("1. " * 40 + "no.") == "no" and pope.one_of_both("no, yes") is None
    assert [mme.yes_or_no(said) for said in ("y.", "N", "x", "n.o.", "I say no", "")] == [
        *("yes", "no", None, "no", None, None)
    ]
    items = benchmark("pope").read(DATA / "pope")[:2]
    rows = verdicts("pope", "official", items, ["", "No"])
    assert [row.state for row in rows] == ["unanswered", "answered"]
    assert benchmark("pope").protocol("official").aggregate(rows)["yes_ratio"] == 0.5


def test_perception_test_sums_up_by_each_tag() -> None:
    items = benchmark("perception_test").read(DATA / "perceptiontest")
    sums = (
        benchmark("perception_test")
        .protocol()
        .aggregate(verdicts("perception_test", "lmms_eval", items, ["ABC"[item.answer] for item in items]))
    )
    tags = {tag for item in items for tag in item.details["tag"]}
    assert len(tags) > 1 and {f"tag/{tag}" for tag in tags} <= {name for name, value in sums.items() if value == 1}


def test_mlvu_takes_what_stands_before_a_bracket() -> None:
    assert [before_bracket(said) for said in ("B) x", ") x", "(C) x (D)", "B", "", "B ")] == [
        "B",
        None,
        "C",
        "B",
        None,
        "B ",
    ]
    item = Item("x", "?", 1, ("cat", "dog"))
    for said, verdict in (
        ("B", (1.0, 1)),
        ("B ", (0.0, None)),
        ("b)", (0.0, None)),
        ("xA)", (0.0, 0)),
        ("C)", (0.0, None)),
    ):
        assert verdicts("mlvu", "official", [item], [said])[0].verdict == verdict


def test_video_mme_drops_what_is_unanswered_only_in_its_own_script() -> None:
    items = video_mme.read(DATA / "videomme")
    said = ["Sorry"] * 27 + [item.details["options"][item.answer] for item in items[27:]]
    sums = {
        name: benchmark("video_mme").protocol(name).aggregate(verdicts("video_mme", name, items, said))
        for name in ("official", "vlmevalkit", "lmms_eval", "video_ccam")
    }
    assert {name: round(one["overall"], 9) for name, one in sums.items()} == {
        **{"official": 100.0, "video_ccam": 100.0},
        **{"vlmevalkit": 10.0, "lmms_eval": 10.0},
    }
    assert (sums["official"]["answered"], sums["official"]["correct"]) == (3, 3)
    kinds = {item.kind for item in items[27:]}
    assert {kind for kind in video_mme.DURATIONS if sums["official"][kind] == 100} == kinds
    assert any(name.startswith("short/task_type/") for name in sums["official"])


def test_mlvu_averages_differ() -> None:
    items = [Item(str(i), "?", 0, ("x", "y"), kind=kind) for i, kind in enumerate(["plotQA"] * 3 + ["needle"])]
    sums = {name: mlvu.BENCHMARKS[0].protocol(name) for name in ("official", "lmms_eval", "video_ccam")}
    values = {
        name: one.aggregate([judged(x, "A", one) for x in items[:3]] + [judged(items[3], "B", one)])
        for name, one in sums.items()
    }
    assert values["official"]["Avg"] == 50 and values["video_ccam"]["Avg_micro_as_upstream"] == 75
    assert values["lmms_eval"]["m_avg"] == pytest.approx(100 / 7)
    said = ["The answer is A", "Answer is A"]
    rows = verdicts("mlvu", "video_ccam", items[:2], said)
    assert [row.verdict for row in rows] == [(1.0, 0), (0.0, None)]


def test_next_qa_counts_before_and_after_together() -> None:
    items = [Item(str(i), "?", 0, tuple("vwxyz"), kind=kind) for i, kind in enumerate(["TN", "TC", "CW"])]
    sums = benchmark("next_qa").protocol("official").aggregate(verdicts("next_qa", "official", items, ["A", "B", "A"]))
    assert (sums["Bef&Aft"], sums["When"], sums["Acc_T"], sums["Acc_C"]) == (100, 0, 50, 100)
    assert np.isnan(sums["Cnt"]) and sums["Acc"] == pytest.approx(200 / 3)
    kinds = {item.kind for item in benchmark("next_qa").read(DATA / "nextqa_mc")}
    assert kinds == set(next_qa.TYPES)


def test_egoschema_scores_what_is_public_and_submits_all(tmp_path: Path) -> None:
    shutil.copy(DATA / "egoschema" / "questions.json", tmp_path)
    answers = json.loads((DATA / "egoschema" / "subset_answers.json").read_text())
    public = dict(list(answers.items())[:10])
    write(tmp_path / "subset_answers.json", public)
    items = egoschema.read(tmp_path)
    assert [item.answer for item in items] == [*public.values(), *[None] * 36]
    rows = verdicts("egoschema", "lmms_eval", items, ["A"] * 45 + [""])
    assert [row.verdict and row.verdict.score for row in rows][10:] == [None] * 36
    assert benchmark("egoschema").protocol().aggregate(rows)["accuracy_random_draws_wrong"] == pytest.approx(
        list(public.values()).count(0) / 10
    )
    unread = Judged(Item("unread", "?"), None, None, "unreadable media")
    egoschema.write_submission([*rows, unread], tmp_path / "out" / "submission.json")
    submitted = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert list(submitted.values()) == [0] * 45 + [-1, -1] and list(submitted)[0] == items[0].id
    (tmp_path / "subset_answers.json").unlink()
    assert {item.answer for item in egoschema.read(tmp_path)} == {None}


def test_mme_counts_an_image_as_often_as_it_was_drawn() -> None:
    items = [
        Item(f"{i}/{word}", "?", word, media=str(i), kind="OCR", cluster=str(i))
        for i in range(2)
        for word in ("yes", "no")
    ]
    rows = verdicts("mme", "lmms_eval", items, ["yes", "no", "yes", "yes"])  # 200 points and 50
    aggregate = benchmark("mme").protocol().aggregate
    assert aggregate(rows)["mme_perception_score"] == 125
    assert aggregate([*rows, *rows[:2]])["OCR"] == 150
    assert aggregate(rows[:1])["OCR"] == 100  # half of an image has no second answer to be right
    assert aggregate(rows)["mme_cognition_score"] == 0


# Subtitles

SRT = """2
00:00:04,250 --> 00:00:05,000
<b>later</b>
second line

1
00:00:01,000 --> 00:00:02,500
first

a block without times
"""


@pytest.mark.parametrize("content", [SRT, SRT.replace("\n", "\r\n"), SRT.replace("\n\n", "\n \n")])
def test_cues_come_in_time_whatever_the_line_ends(content: str) -> None:
    first, later = read_srt(content)
    assert first == Cue(1.0, 2.5, "first")
    assert later == Cue(4.25, 5.0, r"{\b1}later{\b0}\Nsecond line")
    assert read_srt("") == []


def test_subtitles_stand_where_frames_are() -> None:
    cues = [Cue(1, 2, "one"), Cue(3, 6, r"two\Nlines"), Cue(4, 5, "hidden by the one before"), Cue(7, 8, " ")]
    assert one_a_frame(cues, [0, 1]) == ""  # a cue that begins at the frame has not begun
    assert one_a_frame(cues, [1.5, 2, 2.5, 3.5]) == "one\none\ntwo lines"
    assert one_a_frame(cues, [4.5, 6.5, 7.5, 9]) == "two lines"
    assert each_once(cues, [1.5, 2, 4.5]) == "one\ntwo lines\nhidden by the one before"
    assert each_once(cues, [1]) == each_once(cues, [2]) == "one" and each_once(cues, [0, 2.5, 7.5]) == ""


def test_lmms_eval_quotes_what_font_tags_hold_at_32_frames_once() -> None:
    said = [(0, "<font>here</font> not"), (1, "no"), (2, "<font a='b'>here</font>"), (3.65, "<font>x</font>"), (7, "")]
    cues = [Cue(start, start + 0.4, text) for start, text in said]
    assert in_font_tags(cues, Shown((0.0,), 320, 32.0)) == "here\nx"
    assert in_font_tags(cues, Shown((0.0,), 320, 32.0), 2) == "here"


def clip(indices: list[int], fps: float | None, num_total: int) -> Video:
    frames = np.zeros((len(indices), 2, 2, 3), np.uint8)
    return Video(frames, np.zeros(len(indices)), indices, fps, num_total, "linspace", "a decoder", "a.mp4")


def test_prompts_quote_what_stands_beside_the_frames_shown(tmp_path: Path) -> None:
    lines = ["one", "two", '<font color="white">three</font>', '<font color="white">four</font>']
    cues = "\n\n".join(f"{i}\n00:00:0{i},000 --> 00:00:0{i},900\n{text}" for i, text in enumerate(lines))
    item = Item("x", "What?", details={"options": ("A. a",), "subtitles": str(write(tmp_path / "x.srt", cues))})
    seen = shown(item, clip([0, 5, 7, 15, 25], 10.0, 30))
    header = "This video's subtitles are listed below:"
    official = f"{header}\none\ntwo\n{lines[2]}\n{SELECT}\nWhat?\nA. a\nThe best answer is:"
    assert asked("video_mme", "official_subtitles", seen).user == official
    ccam = f"{header}\none\none\ntwo\n{lines[2]}\n{SELECT}\nWhat?\nA. a\n{LETTER}"
    assert asked("video_mme", "video_ccam_subtitles", seen).user == ccam
    both = SELECT.replace("the video.", "the video and the subtitles.")
    # The frames that count here are not those shown, and the last of 30 is at 2.9 s.
    lmms = f"{header} \nthree\n{both}\nWhat?\nA. a\nThe best answer is:"
    assert asked("video_mme", "lmms_eval_subtitles", seen).user == lmms
    assert asked("video_mme", "official", seen) == asked("video_mme", "official", item)


def test_subtitles_need_a_video_that_was_read(tmp_path: Path) -> None:
    item = Item(
        "x", "?", media="a.mp4", details={"options": ("A. a",), "subtitles": str(write(tmp_path / "x.srt", SRT))}
    )
    with pytest.raises(InputError, match="subtitles of a.mp4 .* Read the video"):
        asked("video_mme", "official_subtitles", item)
    with pytest.raises(InputError, match="a.mp4 has no frame rate"):
        asked("video_mme", "official_subtitles", shown(item, clip([0], None, 1)))
    for name in ("official_subtitles", "lmms_eval_subtitles", "video_ccam_subtitles"):
        everything = asked("video_mme", name, shown(item, None)).user
        assert "first" in everything and "later" in everything
    Path(item.details["subtitles"]).unlink()
    with pytest.raises(DatasetError, match="x.srt"):
        asked("video_mme", "official_subtitles", shown(item, None))
    without = Item("x", "?", details={"options": ("A. a",), "subtitles": None})
    assert asked("video_mme", "official_subtitles", without) == asked("video_mme", "official", without)


# Free answers of MLVU


def generation(tmp_path: Path, judge: Callable[[list[dict[str, str]]], str]) -> tuple[Benchmark, Protocol, list[Item]]:
    row = {"video": "v.mp4", "question": "What?", "answer": "a cat sits"}
    write(tmp_path / "json" / "8_sub_scene.json", [{**row, "scoring_points": "cat; sits"}])
    write(tmp_path / "json" / "9_summary.json", [row])
    made = replace(benchmark("mlvu_generation"), protocols=mlvu.generation(judge, "a judge 1.0"))
    return made, made.protocol("official (a judge 1.0)"), made.read(tmp_path)


def test_a_judge_grades_free_answers(tmp_path: Path) -> None:
    heard: list[list[dict[str, str]]] = []

    def judge(messages: list[dict[str, str]]) -> str:
        heard.append(messages)
        return "So: {'score_accuracy': 3.5, 'score_relevance': 5, 'score_completeness': 2, 'score_reliability': 1}"

    made, protocol, items = generation(tmp_path, judge)
    assert list(made.protocols) == ["official (a judge 1.0)", "video_ccam (a judge 1.0)"]
    assert [(item.kind, item.media) for item in items] == [
        ("sub_scene", "8_sub_scene/v.mp4"),
        ("summary", "9_summary/v.mp4"),
    ]
    system = (
        "Carefully watch this video and pay attention to every detail. Based on your observations, answer the given "
        "questions."
    )
    assert protocol.prompt and protocol.prompt(items[0]) == Prompt("What?", system)
    assert made.protocol("video_ccam (a judge 1.0)").prompt(items[0]) == Prompt("What?")  # type: ignore[misc]
    rows = [judged(item, "a dog", protocol) for item in items]
    assert [row.verdict for row in rows] == [(8.5, (3.5, 5.0)), (3.0, (2.0, 1.0))]
    sums = protocol.aggregate(rows)
    assert (sums["SSC"], sums["VS"], sums["G-Avg"], sums["score_accuracy"]) == (8.5, 3.0, 5.75, 3.5)
    assert np.isnan(protocol.aggregate(rows[:1])["G-Avg"])
    assert "Scoring points: cat; sits" in heard[0][1]["content"] and "ACCURACY" in heard[0][0]["content"]
    assert "points" not in heard[1][1]["content"] and "COMPLETENESS" in heard[1][0]["content"]
    assert all("a dog" in one[1]["content"] and "a cat sits" in one[1]["content"] for one in heard)


def test_published_averages_of_mlvu() -> None:
    rows = [Judged(Item(kind, "?", kind=kind), "", None, "answered") for kind in ("sub_scene", "summary")]
    protocol = mlvu.generation(lambda _: "", "x")["official (x)"]
    graded = [
        row.__class__(row.item, "", (0.0, pair), "answered") for row, pair in zip(rows, [(3.4, 3.4), (2.0, 2.94)])
    ]  # type: ignore[arg-type]
    graded = [Judged(one.item, "", mlvu.Verdict(*one.verdict), "answered") for one in graded]  # type: ignore[misc]
    sums = protocol.aggregate(graded)
    assert [round(sums[name], 2) for name in ("SSC", "VS", "G-Avg")] == [6.8, 4.94, 5.87]


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("no dictionary", (0.0, 0.0)),
        ("{'score_completeness': 4, 'score_reliability': 5, 'total_score': 9}", (4.0, 5.0)),
        ('{"score_completeness": 4, "score_reliability": 5}', (4.0, 5.0)),
        ("score_reliability: 3", (3.0, 0.0)),
        ("score_completeness: none, score_reliability: 2,", (2.0, 0.0)),
    ],
)
def test_scores_of_a_judge(reply: str, scores: tuple[float, float]) -> None:
    assert mlvu.judge_scores(reply, "summary") == scores


@given(
    st.text() | st.lists(st.sampled_from(["score_accuracy", "score_relevance", ":", " ", "4", ",", "."])).map("".join)
)
def test_no_reply_of_a_judge_raises(reply: str) -> None:
    assert all(value >= 0 for value in mlvu.judge_scores(reply, "sub_scene"))


# The comparison with recorded data


@pytest.fixture(scope="module")
def parity() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield importlib.import_module("parity")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*path, key))
    else:
        yield path


def passes(parity: ModuleType, folder: Path) -> bool:
    try:
        return all(one.passed for one in parity.run_case(parity.Case(folder)))
    except (KeyError, ValueError):  # no item of that id
        return False


@pytest.mark.parametrize("case", [*CASES.values(), "frame_sampling"])
def test_each_recorded_value_is_compared(parity: ModuleType, tmp_path: Path, case: str) -> None:
    expected = json.loads((DATA / case / "expected.json").read_text())
    chosen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for path in leaves(expected):  # the last row of each field, each metric, the last index of each rule
        rule = (expected[path[0]]["rule"],) if case == "frame_sampling" else ()
        chosen[(*rule, *(one for one in path if not isinstance(one, int)))] = path
    if case == "frame_sampling":
        chosen = {name: path for name, path in chosen.items() if "indices" in name}
    folder = Path(shutil.copytree(DATA / case, tmp_path / "eval" / case))
    assert passes(parity, folder)
    for name, path in chosen.items():
        spoilt = json.loads(json.dumps(expected))
        place = spoilt
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = SPOILT.get(type(place[path[-1]]), lambda value: "spoilt")(place[path[-1]])
        write(folder / "expected.json", spoilt)
        assert not passes(parity, folder), name


SPOILT: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value + 1e-6,
}
