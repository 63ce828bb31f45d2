"""Open answers: prompts, bad files, the judge, and parsers that never raise. Scores are in the parity cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmzoo.errors import DatasetError, InputError
from mmzoo_eval.benchmark import Item, Judged, Protocol, judged
from mmzoo_eval.benchmarks import MODULES, benchmark, open_answers

ITEM = Item("0", "what is shown", "a dog", kind="what", cluster="v")
MINE = ("msvd_qa", "msrvtt_qa", "tgif_qa", "tgif_qa_count", "activitynet_qa", "next_qa_open", "chair", "vlind_bench")


@pytest.mark.parametrize("name", MINE)
def test_benchmarks_are_found_by_name(name: str) -> None:
    assert name in MODULES
    found = benchmark(name)
    assert found.name == name
    assert found.data
    assert all(key == protocol.name and protocol.source for key, protocol in found.protocols.items())


def test_prompts_are_word_by_word() -> None:
    short = "\nAnswer the question using a single word or phrase."
    for name in ("msvd_qa", "msrvtt_qa", "tgif_qa"):
        for protocol in benchmark(name).protocols.values():
            assert protocol.prompt(ITEM) == (f"what is shown{short}", None, "")
    official = benchmark("activitynet_qa").protocol("activitynet_official")
    assert official.prompt(ITEM).user == f"What is shown?{short}"


def rows(protocol: Protocol, *answers: tuple[Item, str]) -> list[Judged]:
    return [judged(item, response, protocol) for item, response in answers]


def test_strict_and_normalised_answers() -> None:
    strict, norm = benchmark("msvd_qa").protocol("strict"), benchmark("msvd_qa").protocol("vqa_norm")
    assert strict.judge(ITEM, "a dog").score == 1
    assert strict.judge(ITEM, "A dog.").score == 0
    assert norm.judge(ITEM, "The dog.").score == 1
    assert strict.judge(ITEM, " \n").parsed is None
    assert norm.judge(ITEM, "the!").parsed is None
    assert norm.aggregate(rows(norm, (ITEM, "dog"), (ITEM, "cat"))) == {"vqa_norm_acc": 50, "what": 50}


def test_free_accuracy_by_order_of_appearance_and_by_type() -> None:
    protocol = benchmark("activitynet_qa").protocol("activitynet_official")
    kinds = ["other", "yes/no", "number", "motion", "motion", "colour"]
    items = [Item(str(i), "q", "x", kind=kind) for i, kind in enumerate(kinds)]
    answers = [(item, "x" if item.kind in ("other", "colour") else "y") for item in items]
    found = protocol.aggregate(rows(protocol, *answers))
    assert found["free_as_upstream"] == 2 / 3  # motion twice, colour once: the kinds that come fourth and later
    assert found["free_correct"] == 2 / 4
    assert found["all"] == 2 / 6
    assert found["motion"] == 0


def test_count_is_a_squared_error() -> None:
    protocol, item = benchmark("tgif_qa_count").protocol(), Item("0", "how often", 3)
    scores = {"3": 0, "three": 0, "5 times.": 4, "It happens two times": 1, "none": 9}
    assert {said: protocol.judge(item, said).score for said in scores} == scores
    assert protocol.judge(item, "many").score is None
    assert protocol.judge(item, "many").parsed is None
    assert protocol.aggregate(rows(protocol, (item, "5"), (item, "many"), (item, "3"))) == {"mse": 2}


# Files


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


QA = {"answer": "dog", "id": 0, "question": "What is it?", "video_id": 1301}


def test_msvd_and_msrvtt_read_their_file(tmp_path: Path) -> None:
    write(tmp_path / "test_qa.json", [QA])
    (item,) = benchmark("msvd_qa").read(tmp_path)
    assert item == Item("0", "What is it?", "dog", media="vid1301.avi", kind="what", cluster="1301")
    assert benchmark("msrvtt_qa").read(tmp_path / "test_qa.json")[0].media == "video1301.mp4"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no JSON"),
        ({"a": 1}, "is dict, not list"),
        ([{**QA, "id": True}], "entry 0: field 'id' is bool, not int"),
        ([QA, {**QA, "id": "1"}], "entry 1: field 'id' is str, not int"),
        ([{k: v for k, v in QA.items() if k != "answer"}], "entry 0: field 'answer' is missing"),
        (["x"], "entry 0: is str, not dict"),
        ([QA, QA], "id 0 comes twice"),
    ],
)
def test_a_bad_file_is_named_with_entry_and_field(tmp_path: Path, content: object, said: str) -> None:
    path = write(tmp_path / "test_qa.json", content)
    with pytest.raises(DatasetError, match=said) as error:
        benchmark("msvd_qa").read(tmp_path)
    assert str(path) in str(error.value)


def test_missing_and_undecodable_files_are_dataset_errors(tmp_path: Path) -> None:
    for name in ("msvd_qa", "activitynet_qa", "tgif_qa", "tgif_qa_count", "next_qa_open", "chair", "vlind_bench"):
        with pytest.raises(DatasetError, match=str(tmp_path)):
            benchmark(name).read(tmp_path)
    (tmp_path / "test_qa.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(DatasetError, match="test_qa.json"):
        benchmark("msvd_qa").read(tmp_path)


def activitynet(folder: Path, **changes: object) -> Path:
    write(folder / "test_q.json", [{"question_id": "v_a_1", "video_name": "a", "question": "what is it"}])
    write(folder / "test_a.json", [{"question_id": "v_a_1", "answer": "dog", "type": 5, **changes}])
    return folder


def test_activitynet_joins_questions_and_answers(tmp_path: Path) -> None:
    (item,) = benchmark("activitynet_qa").read(activitynet(tmp_path))
    assert item == Item("v_a_1", "what is it", "dog", media="v_a.mp4", kind="object", cluster="a")
    with pytest.raises(DatasetError, match="field 'type' 9"):
        benchmark("activitynet_qa").read(activitynet(tmp_path, type=9))
    with pytest.raises(DatasetError, match="no question_id 'v_b_1'"):
        benchmark("activitynet_qa").read(activitynet(tmp_path, question_id="v_b_1"))


def test_tgif_reads_its_tables(tmp_path: Path) -> None:
    head = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\n"
    write(tmp_path / "Test_frameqa_question.csv", f"{head}g1\twhat is it?\tcat\t2\tID1\t7\n")
    write(tmp_path / "Test_count_question.csv", "gif_name\tquestion\tanswer\tvid_id\tkey\ng1\thow often?\t4\tID1\t7\n")
    (item,) = benchmark("tgif_qa").read(tmp_path)
    assert (item.id, item.answer, item.media, item.kind) == ("g1_0", "cat", "g1.gif", "color")
    assert benchmark("tgif_qa_count").read(tmp_path)[0].answer == 4
    write(tmp_path / "Test_frameqa_question.csv", f"{head}g1\twhat is it?\tcat\t4\tID1\t7\n")
    with pytest.raises(DatasetError, match="line 2: field 'type' '4'"):
        benchmark("tgif_qa").read(tmp_path)
    write(tmp_path / "Test_count_question.csv", "gif_name\tquestion\tanswer\ng1\thow often?\tmany\n")
    with pytest.raises(DatasetError, match="line 2: field 'answer' 'many'"):
        benchmark("tgif_qa_count").read(tmp_path)
    write(tmp_path / "Test_count_question.csv", "gif_name,question,answer\ng1,how often?,3\n")
    with pytest.raises(DatasetError, match="field 'gif_name' is missing"):
        benchmark("tgif_qa_count").read(tmp_path)


# The judge


def test_the_judge_is_told_what_video_chatgpt_tells_it() -> None:
    system, user = open_answers.judge_messages("Q {x}?", "A", "P")
    assert system["role"] == "system"
    assert system["content"].startswith(
        "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for "
        "question-answer pairs. Your task is to compare the predicted answer with the correct answer and determine if "
        "they match meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - Focus on"
    )
    assert system["content"].endswith("- Evaluate the correctness of the prediction compared to the answer.")
    assert user == {
        "role": "user",
        "content": "Please evaluate the following video-based question-answer pair:\n\nQuestion: Q {x}?\nCorrect "
        "Answer: A\nPredicted Answer: P\n\nProvide your evaluation only as a yes/no and score where the score is an "
        "integer value between 0 and 5, with 5 indicating the highest meaningful match. Please generate the response "
        "in the form of a Python dictionary string with keys 'pred' and 'score', where value of 'pred' is  a string of "
        "'yes' or 'no' and value of 'score' is in INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR "
        "EXPLANATION. Only provide the Python dictionary string. For example, your response should look like this: "
        "{'pred': 'yes', 'score': 4.8}.",
    }


def test_the_judge_is_part_of_the_protocols_name_and_gets_the_answers() -> None:
    heard = []

    def judge(messages: list[dict[str, str]]) -> str:
        heard.append(messages)
        return "{'pred': 'yes', 'score': 4}" if len(heard) == 1 else "I cannot say"

    protocol = open_answers.gpt_assisted(judge, "some-judge-1.0")
    assert protocol.name == "gpt_assisted_lmms_eval (some-judge-1.0)"
    answered = rows(protocol, (ITEM, "a puppy"), (ITEM, "a cat"), (ITEM, "  "))
    assert heard == [open_answers.judge_messages("what is shown", "a dog", said) for said in ("a puppy", "a cat")]
    assert [row.verdict.score for row in answered] == [1, 0, 0]
    assert [row.state for row in answered] == ["answered", "answered", "unanswered"]
    assert protocol.aggregate(answered) == {
        "accuracy": 100 / 3,
        "average_score": 4 / 3,
        "unreadable_replies": 1,
    }


def test_an_unreadable_reply_is_dropped_by_the_other_parser() -> None:
    replies = iter(["{'pred': 'yes', 'score': 4}", "Sure! {'pred': 'no', 'score': 1}", "{'pred': 'maybe', 'score': 2}"])
    protocol = open_answers.gpt_assisted(lambda _: next(replies), "j", "videochatgpt")
    answered = rows(protocol, *[(ITEM, "x")] * 3)
    assert [row.verdict.score for row in answered] == [1, None, None]
    assert protocol.aggregate(answered) == {"accuracy": 1, "average_score": 3, "unreadable_replies": 1}


def test_a_reply_is_never_evaluated() -> None:
    hostile = "{'pred': 'yes', 'score': __import__('os').getpid()}"
    assert open_answers.parse_lmms_eval(hostile) is None
    assert open_answers.parse_videochatgpt(hostile) is None


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["pred", "score", "x"]), inner),
    max_leaves=6,
)


@given(st.text() | literals.map(repr) | st.text("{}'[]():,predscoyn0 9-.\\"))
def test_no_parser_of_replies_raises(reply: str) -> None:
    for parse in (open_answers.parse_lmms_eval, open_answers.parse_videochatgpt):
        rating = parse(reply)
        assert rating is None or (isinstance(rating[0], str) and isinstance(rating[1], int))


def test_deep_and_endless_replies_are_refused() -> None:
    endless = "{'pred': 'yes', 'score': 1e999}"
    for reply in (
        endless,
        "{" + "(" * 100_000,
        "[" * 100_000,
        "{'pred': 'yes', 'score': '" + "9" * 10_000 + "'}",
        "-" * 50_000,
    ):
        assert open_answers.parse_lmms_eval(reply) is None
        assert open_answers.parse_videochatgpt(reply) is None


@given(st.text())
def test_no_response_makes_a_protocol_raise(response: str) -> None:
    for name in ("msvd_qa", "activitynet_qa", "tgif_qa"):
        for protocol in benchmark(name).protocols.values():
            verdict = protocol.judge(ITEM, response)
            assert verdict.score in (0, 1)
            assert response.strip() or verdict.parsed is None
    count = benchmark("tgif_qa_count").protocol().judge(Item("0", "q", 2), response)
    assert count.score is None or count.score >= 0


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(InputError, match="vqa_norm, strict"):
        benchmark("msvd_qa").protocol("exact")
