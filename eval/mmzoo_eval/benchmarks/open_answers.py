"""Open answers by exact match or by a judge: MSVD-QA, MSRVTT-QA, TGIF-QA, ActivityNet-QA.

The same answers score 29 or 79 by the first two protocols, so neither is "the" accuracy.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmzoo_eval.annotations import read_json, read_table, refuse, require, unique
from mmzoo_eval.benchmark import (
    Benchmark,
    Item,
    Judge,
    Judged,
    Message,
    Prompt,
    Protocol,
    Verdict,
    by_kind,
    by_name,
    mean,
    scores,
)
from mmzoo_eval.normalise import normalised
from mmzoo_eval.parsing import by_letter, by_priority
from mmzoo_eval.prompts import LETTER_ONLY, dotted

SHORT = "\nAnswer the question using a single word or phrase."
LAVIS = "salesforce/LAVIS 506965b9c4a18c1e565bd32acaccabe0198433f7"
ACTIVITYNET_QA = "MILVLG/activitynet-qa 2cf80aeb4e45955e53404e1716d3b9c0b1cbd72f"
VIDEO_CHATGPT = "mbzuai-oryx/Video-ChatGPT 659e04b2ce4bb518b663eb06f7db27b4971e8bde"
LMMS_EVAL = "EvolvingLMMs-Lab/lmms-eval 75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3"


def short_answer(item: Item) -> Prompt:
    """The question and a sentence that asks for few words; our own choice, since the sources have no prompt."""
    return Prompt(f"{item.question}{SHORT}")


def is_equal(item: Item, response: str) -> Verdict:
    """Right if the response is the answer, character by character."""
    return Verdict(float(response == item.answer), response if response.strip() else None)


def is_equal_normalised(item: Item, response: str) -> Verdict:
    """Right if both are the same after the VQA normaliser."""
    words = normalised(response)
    return Verdict(float(words == normalised(item.answer)), words or None)


def accuracies(name: str) -> Callable[[Sequence[Judged]], dict[str, float]]:
    """Percent over all, under that name, and by kind."""

    def aggregate(rows: Sequence[Judged]) -> dict[str, float]:
        return {name: mean(scores(rows), 100)} | {kind: mean(scores(some), 100) for kind, some in by_kind(rows).items()}

    return aggregate


STRICT = Protocol(
    "strict",
    f"{ACTIVITYNET_QA}; top-1 over a closed vocabulary is the same where the response is one of its entries",
    is_equal,
    accuracies("strict_acc"),
    "strict_acc",
    short_answer,
)
VQA_NORM = Protocol("vqa_norm", LAVIS, is_equal_normalised, accuracies("vqa_norm_acc"), "vqa_norm_acc", short_answer)


# ActivityNet-QA

TYPES = ("motion", "spatial", "temporal", "yes/no", "colour", "object", "location", "number", "other")
_FREE_FROM = 3


def by_type(rows: Sequence[Judged]) -> dict[str, float]:
    """ActivityNet-QA's fractions: by type, over all, and "free" (types from yes/no on) twice.

    `free_as_upstream` divides the right answers of those types by the number of answers of all types but the three that
    APPEAR first in the file, as upstream does: 1.39 times too much in the published test file. `free_correct` divides
    by their own number.
    """
    kinds = by_kind(rows)
    found = {name: mean(scores(kinds[name])) for name in TYPES if name in kinds}
    free = [score for name in TYPES[_FREE_FROM:] for score in scores(kinds.get(name, []))]
    divisor = sum(len(scores(some)) for some in list(kinds.values())[_FREE_FROM:])
    return {
        "all": mean(scores(rows)),
        **found,
        "free_as_upstream": sum(free) / divisor if divisor else float("nan"),
        "free_correct": mean(free),
    }


def capitalised_question(item: Item) -> Prompt:
    """The question as lmms-eval writes it, with a capital and a question mark, and our sentence for few words."""
    return Prompt(f"{item.question.capitalize()}?{SHORT}")


def read_activitynet_qa(path: Path) -> list[Item]:
    """`<split>_q.json` and `<split>_a.json` of ActivityNet-QA, in the order of the answers.

    Args:
        path: the folder, for the test split, or a file of questions such as val_q.json.
    """
    questions_path = path / "test_q.json" if path.is_dir() else path
    answers_path = questions_path.with_name(questions_path.name.replace("_q.json", "_a.json"))
    questions, answers = read_json(questions_path, list), read_json(answers_path, list)
    require(questions_path, enumerate(questions), {"question_id": str, "video_name": str, "question": str})
    require(answers_path, enumerate(answers), {"question_id": str, "answer": str, "type": (int, str)})
    kinds = {str(number): name for number, name in enumerate(TYPES)}
    asked = {question["question_id"]: question for question in questions}
    unique(answers_path, [answer["question_id"] for answer in answers], "question_id")
    refuse(
        [
            f"{answers_path}: entry {i}: field 'type' {a['type']!r}"
            for i, a in enumerate(answers)
            if str(a["type"]) not in kinds
        ]
        + [f"{questions_path}: no question_id {a['question_id']!r}" for a in answers if a["question_id"] not in asked]
    )
    return [
        Item(
            id=answer["question_id"],
            question=asked[answer["question_id"]]["question"],
            answer=answer["answer"],
            media=f"v_{asked[answer['question_id']]['video_name']}.mp4",
            kind=kinds[str(answer["type"])],
            cluster=asked[answer["question_id"]]["video_name"],
        )
        for answer in answers
    ]


ACTIVITYNET_OFFICIAL = Protocol(
    "activitynet_official", ACTIVITYNET_QA, is_equal, by_type, "all", capitalised_question, unit="fraction"
)


# MSVD-QA and MSRVTT-QA


def read_test_qa(path: Path, video: str) -> list[Item]:
    """`test_qa.json` of MSVD-QA or MSRVTT-QA; kinds are the first words of the questions.

    Args:
        path: the folder, or the file of any split.
        video: the name of a video's file, with a place for its id.
    """
    path = path / "test_qa.json" if path.is_dir() else path
    rows = read_json(path, list)
    require(path, enumerate(rows), {"answer": str, "id": int, "question": str, "video_id": int})
    unique(path, [row["id"] for row in rows], "id")
    return [
        Item(
            id=str(row["id"]),
            question=row["question"],
            answer=row["answer"],
            media=video.format(row["video_id"]),
            kind=next(iter(row["question"].lower().split()), ""),
            cluster=str(row["video_id"]),
        )
        for row in rows
    ]


# TGIF-QA

FRAMEQA_TYPES = ("object", "number", "color", "location")
_TGIF_TABLE = "Test_{}_question.csv"


def _tgif(path: Path, task: str, fields: Sequence[str]) -> list[dict[str, str]]:
    path = path / _TGIF_TABLE.format(task) if path.is_dir() else path
    rows = read_table(path, ["gif_name", "question", "answer", *fields], "\t")
    unique(path, [(row["gif_name"], row["question"], row.get("key")) for row in rows], "gif_name, question and key")
    return rows


def _tgif_item(row: Mapping[str, str], number: int, kind: str, answer: Any) -> Item:
    gif = row["gif_name"]
    return Item(f"{gif}_{number}", row["question"], answer, media=f"{gif}.gif", kind=kind, cluster=gif)


def read_tgif_frameqa(path: Path) -> list[Item]:
    """`Test_frameqa_question.csv` of TGIF-QA: open questions about a frame. `path` is the folder or the file."""
    kinds = {str(number): name for number, name in enumerate(FRAMEQA_TYPES)}
    rows = _tgif(path, "frameqa", ["type"])
    refuse([f"{path}: line {i}: field 'type' {r['type']!r}" for i, r in enumerate(rows, 2) if r["type"] not in kinds])
    return [_tgif_item(row, i, kinds[row["type"]], row["answer"]) for i, row in enumerate(rows)]


def read_tgif_count(path: Path) -> list[Item]:
    """`Test_count_question.csv` of TGIF-QA: how often something happens. `path` is the folder or the file."""
    rows = _tgif(path, "count", [])
    wrong = [(i, row["answer"]) for i, row in enumerate(rows, 2) if not row["answer"].strip().isdecimal()]
    refuse([f"{path}: line {i}: field 'answer' {answer!r} is no whole number" for i, answer in wrong])
    return [_tgif_item(row, i, "count", int(row["answer"])) for i, row in enumerate(rows)]


def read_tgif_choice(path: Path, task: str) -> list[Item]:
    """`Test_action_question.csv` or `Test_transition_question.csv` of TGIF-QA: five options, one right.

    Args:
        path: the folder or the file.
        task: "action" or "transition".
    """
    columns = [f"a{i}" for i in range(1, 6)]
    rows = _tgif(path, task, columns)
    wrong = [(i, row["answer"]) for i, row in enumerate(rows, 2) if row["answer"].strip() not in tuple("01234")]
    refuse([f"{path}: line {i}: field 'answer' {answer!r} is none of 0 to 4" for i, answer in wrong])
    return [
        replace(_tgif_item(row, i, task, int(row["answer"])), options=tuple(row[column] for column in columns))
        for i, row in enumerate(rows)
    ]


def lettered_options(item: Item) -> Prompt:
    """The question, its options and a sentence that asks for the letter; our own choice."""
    return Prompt("\n".join([item.question, *map(dotted, range(len(item.options)), item.options), LETTER_ONLY]))


CHOICE = Protocol(
    "letter",
    "accuracy is the task's definition; prompt and parser are mmzoo's, the latter lmms-eval's mcq_extract",
    by_letter(lambda item, said: by_priority(said, "ABCDE")),
    accuracies("accuracy"),
    "accuracy",
    lettered_options,
)


def squared_error(item: Item, response: str) -> Verdict:
    """The squared difference to the first number in the response, "three" or "3"; without one it is not counted."""
    number = re.search(r"(?<!\S)\d{1,6}(?!\S)", normalised(response))
    if number is None:
        return Verdict(None, None)
    return Verdict(float((int(number[0]) - item.answer) ** 2), int(number[0]))


MEAN_SQUARED_ERROR = Protocol(
    "mean_squared_error",
    "the definition of the task; how its authors round or clip is not known, so nothing is rounded or clipped here",
    squared_error,
    lambda rows: {"mse": mean(scores(rows))},
    "mse",
    short_answer,
    unit="points",
)


# A judge

JUDGE_SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs for question-answer "
    "pairs. Your task is to compare the predicted answer with the correct answer and determine if they match "
    "meaningfully. Here's how you can accomplish the task:------##INSTRUCTIONS: - Focus on the meaningful match "
    "between the predicted answer and the correct answer.\n"
    "- Consider synonyms or paraphrases as valid matches.\n"
    "- Evaluate the correctness of the prediction compared to the answer."
)
_JUDGE_USER = (
    "Please evaluate the following video-based question-answer pair:\n\n"
    "Question: {}\nCorrect Answer: {}\nPredicted Answer: {}\n\n"
    "Provide your evaluation only as a yes/no and score where the score is an integer value between 0 and 5, with 5 "
    "indicating the highest meaningful match. Please generate the response in the form of a Python dictionary string "
    "with keys 'pred' and 'score', where value of 'pred' is  a string of 'yes' or 'no' and value of 'score' is in "
    "INTEGER, not STRING.DO NOT PROVIDE ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary "
    "string. For example, your response should look like this: {{'pred': 'yes', 'score': 4.8}}."
)


def judge_messages(question: str, answer: str, predicted: str) -> list[Message]:
    """What the judge is told, word by word as Video-ChatGPT does, its missing space and its 4.8 included."""
    user = _JUDGE_USER.format(question, answer, predicted)
    return [{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": user}]


Rating = tuple[str, int]
"""Yes or no (or what else the judge said), and a whole number."""


def _rating(literal: str) -> Rating | None:
    """`pred` and `score` of a Python dictionary in text, which is never evaluated."""
    try:
        value = ast.literal_eval(literal)
        pred, score = value["pred"], int(value["score"])
    except (ValueError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError, RecursionError):
        return None
    if not isinstance(pred, str):
        return None
    lower = pred.lower()
    return ("yes" if "yes" in lower else "no" if "no" in lower else pred), score


def parse_lmms_eval(reply: str) -> Rating | None:
    """A judge's reply as lmms-eval reads it: the dictionary between the first "{" and the next "}", or the end.

    "unknown" holds "no", and "eyes" holds "yes": so it is upstream.
    """
    _, brace, rest = reply.partition("{")
    return _rating("{" + rest.partition("}")[0] + "}") if brace else None


def parse_videochatgpt(reply: str) -> Rating | None:
    """A judge's reply as Video-ChatGPT reads it: all of it has to be the dictionary."""
    return _rating(reply)


def gpt_assisted(
    judge: Judge,
    name: str,
    parse: Literal["lmms_eval", "videochatgpt"] = "lmms_eval",
    prompt: Callable[[Item], Prompt] = short_answer,
) -> Protocol:
    """The protocol of Video-ChatGPT: a language model says whether an answer matches, and how well from 0 to 5.

    Scores of different judges cannot be compared, so the judge stands in the protocol's name. A blank response is not
    sent to it: it counts as "no" and 0.

    Args:
        judge: messages -> reply.
        name: of the judge with its version, such as "gpt-4o-2024-11-20".
        parse: "lmms_eval" (percent; a reply that cannot be read counts as "no" and 0) or "videochatgpt" (fraction; such
            a reply is dropped and counted, where upstream asks again for ever).
        prompt: what the model is asked.
    """
    read = {"lmms_eval": parse_lmms_eval, "videochatgpt": parse_videochatgpt}[parse]
    scale = 100.0 if parse == "lmms_eval" else 1.0
    failure: Rating | None = ("no", 0) if parse == "lmms_eval" else None

    def verdict(item: Item, response: str) -> Verdict:
        if not response.strip():
            return Verdict(0.0, None)
        reply = judge(judge_messages(item.question, item.answer, response))
        rating = read(reply)
        pred, score = rating or failure or (None, None)
        return Verdict(
            {"yes": 1.0, "no": 0.0}.get(pred or ""),
            {"reply": reply, "read": rating is not None, "pred": pred, "score": score},
        )

    return Protocol(
        f"gpt_assisted_{parse} ({name})",
        LMMS_EVAL if parse == "lmms_eval" else VIDEO_CHATGPT,
        verdict,
        lambda rows: _judged_scores(rows, scale),
        "accuracy",
        prompt,
        unit="percent" if parse == "lmms_eval" else "fraction",
    )


def judged_by(prompt: Callable[[Item], Prompt] = short_answer) -> Callable[[Judge, str], dict[str, Protocol]]:
    """Both ways to read a judge's reply, as a benchmark holds them."""

    def protocols(judge: Judge, name: str) -> dict[str, Protocol]:
        return by_name(*(gpt_assisted(judge, name, parse, prompt) for parse in ("lmms_eval", "videochatgpt")))

    return protocols


def _judged_scores(rows: Sequence[Judged], scale: float) -> dict[str, float]:
    """Accuracy is yes / (yes + no); the average score is over every reply with a score, blank responses included."""
    blank = {"pred": "no", "score": 0, "read": True}
    said: list[Mapping[str, Any]] = [row.verdict.parsed or blank for row in rows if row.verdict is not None]
    yes, no = (sum(one["pred"] == word for one in said) for word in ("yes", "no"))
    rated = [float(one["score"]) for one in said if one["score"] is not None]
    return {
        "accuracy": scale * yes / (yes + no) if yes + no else float("nan"),
        "average_score": mean(rated),
        "unreadable_replies": float(sum(not one["read"] for one in said)),
    }


BENCHMARKS = (
    Benchmark(
        "msvd_qa",
        "MSVD-QA",
        lambda path: read_test_qa(path, "vid{}.avi"),
        by_name(VQA_NORM, STRICT),
        data="test_qa.json of MSVD-QA; videos are called vid<video_id>.avi.",
        judged_by=judged_by(),
    ),
    Benchmark(
        "msrvtt_qa",
        "MSRVTT-QA",
        lambda path: read_test_qa(path, "video{}.mp4"),
        by_name(VQA_NORM, STRICT),
        data="test_qa.json of MSRVTT-QA; videos are called video<video_id>.mp4.",
        judged_by=judged_by(),
    ),
    Benchmark(
        "tgif_qa",
        "TGIF-QA (frameqa)",
        read_tgif_frameqa,
        by_name(VQA_NORM, STRICT),
        data="Test_frameqa_question.csv of TGIF-QA; animations are called <gif_name>.gif.",
        judged_by=judged_by(),
    ),
    *(
        Benchmark(
            f"tgif_qa_{task}",
            f"TGIF-QA ({task})",
            partial(read_tgif_choice, task=task),
            by_name(CHOICE),
            data=f"Test_{task}_question.csv of TGIF-QA; animations are called <gif_name>.gif.",
        )
        for task in ("action", "transition")
    ),
    Benchmark(
        "tgif_qa_count",
        "TGIF-QA (count)",
        read_tgif_count,
        by_name(MEAN_SQUARED_ERROR),
        data="Test_count_question.csv of TGIF-QA; animations are called <gif_name>.gif.",
    ),
    Benchmark(
        "activitynet_qa",
        "ActivityNet-QA",
        read_activitynet_qa,
        by_name(ACTIVITYNET_OFFICIAL, STRICT, VQA_NORM),
        data="test_q.json and test_a.json of MILVLG/activitynet-qa; videos are called v_<video_name>.mp4.",
        judged_by=judged_by(capitalised_question),
    ),
)
