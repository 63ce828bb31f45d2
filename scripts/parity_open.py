"""Scoring cases of open answers, grounding, captions, staged questions, retrieval and generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from parity_cases import Case, Comparison, Skipped, close, same_strings

from mmzoo.errors import DatasetError, MissingExtra
from mmzoo_eval.benchmark import Item, Judged, Protocol, judged
from mmzoo_eval.benchmarks import benchmark, chair, next_gqa, next_qa_open, open_answers, vbench, vidore, vlind_bench
from mmzoo_eval.english import Tagger, nltk_tags
from mmzoo_eval.normalise import normalised
from mmzoo_eval.wordnet import WordNet

TOLERANCE = 1e-9


def numbers(name: str, actual: Mapping[Any, float], expected: Mapping[Any, float]) -> Comparison:
    """The same keys, and values within 1e-9."""
    if actual.keys() != expected.keys():
        return same_strings(f"{name}: keys", sorted(actual), sorted(expected))
    values = [[float(one[key]) for key in expected] for one in (actual, expected)]
    return close(name, *(torch.tensor(one, dtype=torch.float64) for one in values), TOLERANCE)


def numbered(name: str, actual: Sequence[float], expected: Sequence[float]) -> Comparison:
    return numbers(name, dict(enumerate(actual)), dict(enumerate(expected)))


def rounded(values: Mapping[str, float], names: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: round(values[name], digits) for name in names}


def rows_of(items: Sequence[Item], responses: Mapping[str, str], protocol: Protocol) -> list[Judged]:
    return [judged(item, responses[item.id], protocol) for item in items]


def scores_of(rows: Sequence[Judged]) -> list[float | None]:
    return [row.verdict.score if row.verdict else None for row in rows]


def wordnet_files() -> bool:
    """Whether the package that carries WordNet 3.0 is installed."""
    try:
        WordNet()
    except MissingExtra:
        return False
    return True


def exact_match(case: Case) -> Iterator[Comparison]:
    """exact_match_videoqa: two protocols on MSRVTT-QA's file, the third on ActivityNet-QA's."""
    expected = case.json("expected.json")
    totals, words = expected["aggregate"], expected["aggregate"]["by_question_word"]
    msrvtt = benchmark("msrvtt_qa")
    items = msrvtt.read(case.path / "test_qa.json")
    responses = {str(one["id"]): one["response"] for one in case.json("predictions.json")}
    for name in ("strict", "vqa_norm"):
        rows = rows_of(items, responses, msrvtt.protocol(name))
        yield same_strings(f"{name} per item", scores_of(rows), [one[name] for one in expected["per_item"]])
        by_word = {word: one[name] for word, one in words.items()}
        found = msrvtt.protocol(name).aggregate(rows)
        yield numbers(f"{name} aggregate", found, {f"{name}_acc": totals[f"{name}_acc"], **by_word})
        if name == "vqa_norm":
            said = [row.verdict.parsed or "" for row in rows]
            yield same_strings("vqa_norm_pred", said, [one["vqa_norm_pred"] for one in expected["per_item"]])
            right = [normalised(item.answer) for item in items]
            yield same_strings("vqa_norm_gt", right, [one["vqa_norm_gt"] for one in expected["per_item"]])
    yield from _activitynet(case, totals["activitynet_official"])


def _activitynet(case: Case, expected: dict[str, Any]) -> Iterator[Comparison]:
    answers = case.json("activitynet_test_a.json")
    with TemporaryDirectory() as folder:  # the case has no questions, which the published files do
        asked = [{"question_id": one["question_id"], "video_name": "", "question": ""} for one in answers]
        (Path(folder) / "test_q.json").write_text(json.dumps(asked))
        shutil.copy(case.path / "activitynet_test_a.json", Path(folder) / "test_a.json")
        items = benchmark("activitynet_qa").read(Path(folder))
    protocol = benchmark("activitynet_qa").protocol("activitynet_official")
    responses = {one["question_id"]: one["answer"] for one in case.json("activitynet_pred.json")}
    rows = rows_of(items, responses, protocol)
    found = protocol.aggregate(rows)
    types = dict(enumerate(open_answers.TYPES))
    yield numbers(
        "activitynet_official acc_by_type",
        {str(i): found[name] for i, name in types.items()},
        expected["acc_by_type"],
    )
    kinds = [row.item.kind for row in rows]
    counts = {str(i): kinds.count(name) for i, name in types.items()}
    yield numbers("activitynet_official count_by_type", counts, expected["count_by_type"])
    right = [row.item.kind for row in rows if row.verdict.score]
    corrects = {str(i): right.count(name) for i, name in types.items()}
    yield numbers("activitynet_official corrects_by_type", corrects, expected["corrects_by_type"])
    names = ("all", "free_as_upstream", "free_correct")
    yield numbers(
        "activitynet_official", {name: found[name] for name in names}, {name: expected[name] for name in names}
    )


def judge_replies(case: Case) -> Iterator[Comparison]:
    """gpt_assisted_videoqa: canned replies through both parsers, and through the protocol as a judge's."""
    expected = case.json("expected.json")
    replies = [one["judge_output"] for one in case.json("judge_outputs.json")]
    parsed = [open_answers.parse_lmms_eval(reply) for reply in replies]
    wanted = [one["lmms_eval_parse"] for one in expected["per_item"]]
    yield same_strings("lmms_eval per item", [one and list(one) for one in parsed], wanted)
    whole = [open_answers.parse_videochatgpt(reply) is not None for reply in replies]
    yield same_strings("videochatgpt per item", whole, [one["videochatgpt_parses"] for one in expected["per_item"]])

    item, totals = Item("0", "question", "answer"), expected["aggregate"]
    for parse, key in (("lmms_eval", "lmms_eval_on_parsed_only"), ("videochatgpt", "videochatgpt_on_parsed")):
        canned = iter(replies)
        protocol = open_answers.gpt_assisted(lambda _, canned=canned: next(canned), "canned", parse)
        rows = [judged(item, "said", protocol) for _ in replies]
        readable = [row for row in rows if row.verdict.parsed["read"]]
        found = protocol.aggregate(readable)
        names = ("accuracy", "average_score")
        yield numbers(f"{parse} aggregate", {n: found[n] for n in names}, {n: totals[key][n] for n in names})
        count = totals[key].get("n", totals[key].get("count"))
        yield same_strings(f"{parse} readable", len(readable), count)
        unread = protocol.aggregate(rows)["unreadable_replies"]
        yield same_strings(f"{parse} unreadable", unread, float(len(replies) - count))


def wups(case: Case) -> Iterator[Comparison]:
    """nextqa_open: by the recorded lemmas and similarities; with WordNet at hand also by its own."""
    words = set((case.path / "stopwords.txt").read_text().split())
    yield same_strings("stop words", sorted(words), sorted(next_qa_open.STOP_WORDS))
    single, double = (next_qa_open.read(path) for path in (case.path / "val.csv", case.path))
    responses = {
        f"{video}_{number}": text
        for video, answers in case.json("predictions.json").items()
        for number, text in answers.items()
    }
    for name, block in case.json("expected.json").items():
        recorded = {one["id"]: one for one in block["per_item"]}
        lemmas: dict[str, str] = {}
        for item in double:
            texts = (responses[item.id], *next_qa_open.references(item))
            kept = [recorded[item.id].get(field) for field in ("pred_lemmas", "gt_lemmas", "add_lemmas")]
            lemmas |= dict(zip(texts, kept, strict=False))
        table = block["word_similarity_alpha0"]
        known = {word for one in recorded.values() for field in ("pred", "gt") for word in _words(one, field)}

        def similarity(one: str, other: str, table: dict[str, float] = table) -> float:
            return table.get(f"{one} {other}", 0.0)

        checkable = [item for item in double if set(_words(recorded[item.id], "add")) <= known]
        protocol = next_qa_open.protocol(name, lemmas.__getitem__, similarity)
        yield from _wups_items(f"{name}, {len(checkable)} items", checkable, responses, protocol, similarity, recorded)
        yield from _wups_totals(f"{name} single_reference", single, responses, protocol, block["single_reference"])
        if wordnet_files():
            yield from _with_wordnet(name, block, double, responses, lemmas, recorded)


def _words(recorded: Mapping[str, Any], field: str) -> list[str]:
    return recorded.get(f"{field}_lemmas", "").split()


def _wups_items(
    name: str,
    items: Sequence[Item],
    responses: Mapping[str, str],
    protocol: Protocol,
    similarity: next_qa_open.Similarity,
    recorded: Mapping[str, Any],
) -> Iterator[Comparison]:
    parsed = {item.id: protocol.judge(item, responses[item.id]) for item in items}
    yield numbers(
        f"{name}: wups0",
        {key: verdict.score for key, verdict in parsed.items()},
        {key: recorded[key]["wups0"] for key in parsed},
    )
    column = {key: verdict.parsed["wups9"] if verdict.parsed else 0.0 for key, verdict in parsed.items()}
    yield numbers(f"{name}: wups9", column, {key: recorded[key]["wups9"] for key in parsed})
    faulty = {
        item.id: next_qa_open.wups(
            recorded[item.id]["pred_lemmas"],
            [recorded[item.id]["gt_lemmas"], recorded[item.id]["add_lemmas"]],
            similarity,
            (0.9, 0.0),
        )
        for item in items
        if "wups9_lmms_eval_bug" in recorded[item.id] and item.kind not in next_qa_open.EXACT
    }
    wanted = {key: recorded[key]["wups9_lmms_eval_bug"] for key in faulty}
    yield numbers(f"{name}: wups9_lmms_eval_bug", faulty, wanted)


def _wups_totals(
    name: str, items: Sequence[Item], responses: Mapping[str, str], protocol: Protocol, expected: dict[str, float]
) -> Iterator[Comparison]:
    found = protocol.aggregate(rows_of(items, responses, protocol))
    yield numbers(name, rounded(found, expected, 2), expected)


def _with_wordnet(
    name: str,
    block: dict[str, Any],
    items: Sequence[Item],
    responses: Mapping[str, str],
    lemmas: Mapping[str, str],
    recorded: Mapping[str, Any],
) -> Iterator[Comparison]:
    known = WordNet(rules=name.removeprefix("published_"))
    table = block["word_similarity_alpha0"]
    words = sorted({word for pair in table for word in pair.split()})
    pairs = [(one, other) for one in words for other in words]
    yield numbers(
        f"{name}, WordNet: similarities",
        {f"{one} {other}": known.similarity(one, other) for one, other in pairs},
        {f"{one} {other}": table.get(f"{one} {other}", 0.0) for one, other in pairs},
    )
    protocol = next_qa_open.protocol(name, lemmas.__getitem__, known.similarity)
    yield from _wups_items(f"{name}, WordNet, all items", items, responses, protocol, known.similarity, recorded)
    expected = block["with_additional_reference"]
    yield from _wups_totals(f"{name}, WordNet: with_additional_reference", items, responses, protocol, expected)
    if tagger():
        found = {text: next_qa_open.lemmatise(text, known) for text in lemmas}
        yield same_strings(f"{name}, WordNet and tagger: lemmas", found, dict(lemmas))


def tagger() -> Tagger | None:
    """nltk's, if it and its data are there."""
    try:
        nltk_tags(["dog"])
    except (MissingExtra, DatasetError):
        return None
    return nltk_tags


def grounding(case: Case) -> Iterator[Comparison]:
    """nextgqa: spans in seconds and in fractions of the video."""
    expected = case.json("expected.json")
    paths = [case.path / name for name in ("gsub_test.json", "pred_ground.json", "pred_qa.json")]
    segments, _ = next_gqa.read_annotations(paths[0])
    found = {key: next_gqa.overlap(span, segments[key]) for key, span in next_gqa.read_spans(paths[1]).items()}
    for field in ("IoU", "IoP"):
        values = {key: getattr(one, field.lower()) for key, one in found.items()}
        yield numbers(f"official per item {field}", values, {k: one[field] for k, one in expected["per_item"].items()})
    totals = next_gqa.SCORER.score(paths)
    yield numbers("official aggregate", {name: totals[name] for name in expected["aggregate"]}, expected["aggregate"])
    yield _printed("official_printed", totals, expected)
    paths[1] = case.path / "pred_ground_normalised.json"
    totals = next_gqa.SCORER.score(paths, "official_fractions")
    yield _printed("official_printed_normalised_spans", totals, expected)


def _printed(name: str, totals: dict[str, float], expected: dict[str, str]) -> Comparison:
    heads, values = (line.split() for line in expected[name].strip().split("\n"))
    return same_strings(name, [f"{totals[head.replace('&', '@')]:.1f}" for head in heads], values)


def captions(case: Case) -> Iterator[Comparison]:
    """chair: words and objects of every caption, and the rates. The table of synonyms is not shipped."""
    if not (case.path / chair.TABLE).exists():
        raise Skipped(f"{chair.TABLE}, which has no licence, is not in the folder")
    expected = case.json("expected.json")
    lines = [json.loads(line) for line in (case.path / "captions.jsonl").read_text().split("\n") if line]
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(case.path / "coco_annotations", folder / "annotations")
        shutil.copy(case.path / chair.TABLE, folder)
        (folder / chair.IMAGES).write_text("\n".join(str(one["image_id"]) for one in lines))
        items = chair.read(folder)
    responses = {str(one["image_id"]): one["caption"] for one in lines}
    sentences, table = expected["official"]["sentences"], items[0].details["table"]
    found = [chair.objects(chair.singulars(one["caption"]), table) for one in sentences]
    truth = [item.details["ground_truth"] for item in items]
    yield same_strings("official words", [one.words for one in found], [one["words"] for one in sentences])
    yield same_strings(
        "official objects", [one.objects for one in found], [one["mscoco_generated_words"] for one in sentences]
    )
    yield same_strings("official ground truth", truth, [one["mscoco_gt_words"] for one in sentences])
    wrong = [[i for i, name in zip(one.positions, one.objects) if name not in t] for one, t in zip(found, truth)]
    yield same_strings("official hallucination_idxs", wrong, [one["hallucination_idxs"] for one in sentences])
    for i, metric in enumerate(("CHAIRs", "CHAIRi", "Recall")):
        values = [chair.rates([(one.objects, t)])[i] for one, t in zip(found, truth)]
        values = [0.0 if isnan(value) else value for value in values]  # as upstream has it for a single caption
        yield numbered(f"official per item {metric}", values, [one["metrics"][metric] for one in sentences])
    rows = rows_of(items, responses, chair.OFFICIAL)
    yield numbers("official aggregate", chair.OFFICIAL.aggregate(rows), expected["official"]["overall_metrics"])
    yield from _lemmatised_captions(items, responses, expected["lmms_eval"])


def _lemmatised_captions(
    items: Sequence[Item], responses: Mapping[str, str], expected: dict[str, Any]
) -> Iterator[Comparison]:
    recorded = [one["node_words"] for one in expected["per_item"]]
    table, totals = items[0].details["table"], expected["overall_percent"]
    as_recorded = {responses[item.id]: objects for item, objects in zip(items, recorded, strict=True)}
    protocol = chair.lmms_eval()
    rows = [
        Judged(item, text, chair.judge(item, text, lambda said: as_recorded[said]), "answered")
        for item, text in zip(items, as_recorded, strict=True)
    ]
    yield numbers("lmms_eval aggregate of the recorded objects", protocol.aggregate(rows), totals)
    if wordnet_files():
        tag = tagger() or (lambda words: ["NN"] * len(words))
        how = "nltk's tagger" if tagger() else "every word a noun"
        lemma = WordNet(rules="nltk3.10.4").lemma
        found = [chair.objects(chair.lemmas(responses[item.id], lemma, tag), table).objects for item in items]
        yield same_strings(f"lmms_eval objects, WordNet, {how}", found, recorded)


def staged_questions(case: Case) -> Iterator[Comparison]:
    """vlind_bench: counters by style and by concept, and the printed line."""
    expected, contexts = case.json("expected.json"), case.json("data.json")
    with TemporaryDirectory() as name:  # the case has answers in place of statements, which the published file does
        path = Path(name) / "data.json"
        texts = dict.fromkeys([field for field in vlind_bench._FIELDS if field != "concept"], "")
        path.write_text(json.dumps([{**texts, **one} for one in contexts]))
        items = vlind_bench.read(path)
    by_name = {f"{one['concept']}/{one['context_id']}": one for one in contexts}
    responses = {item.id: _answer(by_name[item.cluster], item) for item in items}
    protocol = benchmark("vlind_bench").protocol("official")
    rows = rows_of(items, responses, protocol)
    printed = protocol.aggregate(rows)
    for style, block in expected.items():
        total = vlind_bench.staged(vlind_bench.contexts(rows), style)
        yield numbers(f"{style} total", {name: total[name] for name in block["total"]}, block["total"])
        line = " & ".join(f"{printed[f'{style}/{name}']:.1f}" for name in vlind_bench.PRINTED)
        yield same_strings(f"{style} printed", f"{line} &", block["printed"])
        for concept, counters in block["by_concept"].items():
            of_concept = [row for row in rows if row.item.details["concept"] == concept]
            found = vlind_bench.staged(vlind_bench.contexts(of_concept), style)
            # upstream counts these over all concepts alone, and leaves them 0 here
            names = counters.keys() - {"bc_pass_micro", "d_pass_ratio_micro"}
            yield numbers(f"{style} {concept}", {n: found[n] for n in names}, {n: counters[n] for n in names})


def _answer(context: dict[str, Any], item: Item) -> str:
    stage = f"{item.kind}{item.details['statement']}"
    if item.kind == "d":
        return context[f"m_pred_{stage}"][str(item.details["image"])]["answer"]
    return context[f"m_pred_{stage}" + ("" if item.kind == "b" else "_image")]["answer"]


def retrieval(case: Case) -> Iterator[Comparison]:
    """ndcg_vidore: every metric of every query, and the means."""
    qrels, run, expected = (case.json(name) for name in ("qrels.json", "run.json", "expected.json"))
    for query, values in expected["per_query"].items():
        yield numbers(f"vidore {query}", vidore.per_query(qrels[query], run[query]), values)
    totals = vidore.SCORER.score([case.path / "qrels.json", case.path / "run.json"])
    yield same_strings("vidore skipped queries", totals.pop("skipped_queries"), float(len(qrels.keys() ^ run.keys())))
    yield numbers("vidore mean", totals, expected["mean"])


def generation(case: Case) -> Iterator[Comparison]:
    """vbench_final_score: every dimension, the parts and the total, from a result file as VBench writes it."""
    for i, expected in enumerate(case.json("expected.json")):
        with TemporaryDirectory() as name:
            path = Path(name) / "results.json"
            results = {name.replace(" ", "_"): [value, []] for name, value in expected["raw"].items()}
            path.write_text(json.dumps(results))
            totals = vbench.SCORER.score([path])
        parts = {name: expected[name] for name in ("quality", "semantic", "total")}
        yield same_strings(f"official {i} missing dimensions", totals.pop("missing_dimensions"), 0.0)
        yield numbers(f"official {i}", totals, {**expected["normalised_weighted"], **parts})


RUNNERS: dict[tuple[str, str, str], Callable[[Case], Iterator[Comparison]]] = {
    ("eval", "scoring", "exact_match_videoqa"): exact_match,
    ("eval", "scoring", "gpt_assisted_videoqa"): judge_replies,
    ("eval", "scoring", "nextqa_open"): wups,
    ("eval", "scoring", "nextgqa"): grounding,
    ("eval", "scoring", "chair"): captions,
    ("eval", "scoring", "vlind_bench"): staged_questions,
    ("eval", "scoring", "ndcg_vidore"): retrieval,
    ("eval", "scoring", "vbench_final_score"): generation,
}
