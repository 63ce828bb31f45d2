"""What the parity cases of multiple-choice and yes/no benchmarks mean, in terms of mmzoo's public code.

Each protocol that a case names judges the recorded responses to the items of the case's own annotation files; verdicts
are compared item by item, then what they sum up to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from parity_cases import Case, Comparison, same_strings

from mmzoo.media import sample_indices
from mmzoo_eval import statistics
from mmzoo_eval.benchmark import Judged, judged, lettered
from mmzoo_eval.benchmarks import benchmark, egoschema, next_qa, pope, video_mme
from mmzoo_eval.benchmarks import mvbench as mvbench_rules
from mmzoo_eval.prompts import bracketed

TOLERANCE = 1e-9


def numbers(name: str, actual: Mapping[str, float], expected: Mapping[str, float]) -> Comparison:
    """Every expected number, to 1e-9."""
    missing = [key for key in expected if key not in actual]
    if missing:
        return Comparison(f"{name}: no {', '.join(missing)}", float("inf"), TOLERANCE, False)
    error = max(abs(actual[key] - value) for key, value in expected.items())
    return Comparison(name, error, TOLERANCE, error <= TOLERANCE)


def _letter(row: Judged) -> str | None:
    assert row.verdict is not None
    return None if row.verdict.parsed is None else lettered(row.verdict.parsed)


def _score(row: Judged) -> float:
    """A dropped answer counts as not right."""
    assert row.verdict is not None
    return row.verdict.score or 0.0


class Run:
    """The items of a case in the order of its responses, and what each protocol makes of these.

    Args:
        case: with its annotation files.
        name: of the benchmark.
        said: the responses, in the order of the expected rows.
        identify: expected row -> id of its item.
    """

    def __init__(self, case: Case, name: str, said: Sequence[str], identify: Callable[[dict[str, Any]], str]):
        described = case.json("config.json")
        self.expected = case.json(described["expected"])
        self.rows = self.expected["per_item"]
        known = benchmark(name)
        by_id = {item.id: item for item in known.read(case.path)}
        items = [by_id[identify(row)] for row in self.rows]
        if not len(items) == len({item.id for item in items}) == len(said) == len(by_id):
            raise ValueError(f"{len(by_id)} items, {len(said)} responses, {len(items)} expected rows, or one row twice")
        self.judged = {
            protocol: [judged(item, one, known.protocol(protocol)) for item, one in zip(items, said)]
            for protocol in described["protocols"]
        }
        self.sums = {protocol: known.protocol(protocol).aggregate(rows) for protocol, rows in self.judged.items()}

    def items(self, protocol: str, field: str, read: Callable[[Judged], Any]) -> Comparison:
        """One recorded field of every item."""
        made = [read(row) for row in self.judged[protocol]]
        return same_strings(f"{protocol} {field}", made, [row[field] for row in self.rows])


def _responses(case: Case, identify: Callable[[dict[str, Any]], str]) -> tuple[list[str], Callable[[Any], str]]:
    """What was said, in the order of the expected rows, and how rows are identified."""
    given = {identify(one): one["response"] for one in case.json("predictions.json")}
    expected = case.json("expected.json")["per_item"]
    return [given[identify(row)] for row in expected], identify


def mvbench(case: Case) -> Iterator[Comparison]:
    run = Run(case, "mvbench", *_responses(case, lambda row: f"{row['task']}/{row['index']}"))
    right = [bracketed(row.item.answer, row.item.options[row.item.answer]) for row in run.judged["official"]]
    yield same_strings("references", right, [row["gt"] for row in run.rows])
    yield run.items("official", "official_pred", lambda row: mvbench_rules.with_bracket(row.response))
    for protocol in run.judged:
        if protocol == "lmms_eval":
            yield run.items(protocol, "lmms_eval_score", _score)
            yield run.items(protocol, "lmms_eval_counted", lambda row: row.verdict.score is not None)
        else:
            yield run.items(protocol, protocol, lambda row: bool(_score(row)))
        yield numbers(f"{protocol} aggregate", run.sums[protocol], run.expected["aggregate"][protocol])


def videomme(case: Case) -> Iterator[Comparison]:
    run = Run(case, "video_mme", *_responses(case, lambda row: row["question_id"]))
    for protocol in run.judged:
        yield run.items(protocol, f"{protocol}_extract", lambda row: _letter(row) or "")
    yield run.items("lmms_eval", "lmms_eval_score", _score)
    aggregate = run.expected["aggregate"]
    for protocol in ("official", "lmms_eval"):
        yield numbers(f"{protocol} aggregate", run.sums[protocol], aggregate[protocol])
    printed = video_mme.printed_report(run.judged["official"])
    yield same_strings("official_printed_report", printed, aggregate["official_printed_report"])
    template = [one for video in case.json("results_for_official_script.json") for one in video["questions"]]
    asked = [[row.item.id, list(row.item.details["options"]), row.response] for row in run.judged["official"]]
    yield same_strings("results template", asked, [[x["question_id"], x["options"], x["response"]] for x in template])
    paired = run.expected["paired_ttest"]
    made = statistics.paired(list(map(_score, run.judged["lmms_eval"])), paired["baseline_scores"])
    names = {"mean_diff": "difference", "se_diff": "stderr_clustered", "ci_lower": "low", "ci_upper": "high"}
    names |= {"t_stat": "t", "p_value": "p", "n": "n"}  # without clusters, the clustered error is the plain one
    result = {name: getattr(made, ours) for name, ours in names.items()}
    yield numbers("paired_ttest", result, paired["result"])


def mlvu(case: Case) -> Iterator[Comparison]:
    run = Run(case, "mlvu", *_responses(case, lambda row: f"{row['task']}/{row['index']}"))
    for protocol in run.judged:
        if protocol == "lmms_eval":
            yield run.items(protocol, "lmms_eval_extract", lambda row: _letter(row) or "")
        field = "lmms_eval_correct" if protocol == "lmms_eval" else protocol
        yield run.items(protocol, field, lambda row: bool(_score(row)))
        yield numbers(f"{protocol} aggregate", run.sums[protocol], run.expected["aggregate"][protocol])


def nextqa(case: Case) -> Iterator[Comparison]:
    run = Run(case, "next_qa", *_responses(case, lambda row: row["id"]))
    yield run.items("lmms_eval", "lmms_eval_parsed", _letter)
    yield run.items("lmms_eval", "lmms_eval_random_draw", lambda row: row.verdict.parsed is None)
    results = {
        row.item.id: {"answer": row.item.answer, "prediction": -1 if row.verdict.parsed is None else row.verdict.parsed}
        for row in run.judged["official"]
    }
    yield same_strings("official results", results, case.json("official_results.json"))
    aggregate = run.expected["aggregate"]
    yield same_strings("official printed", next_qa.printed(run.sums["official"]), aggregate["official_printed"])
    rounded = {name: round(value, 2) for name, value in run.sums["official"].items()}
    yield numbers("official aggregate", rounded, aggregate["official"])


def ego(case: Case) -> Iterator[Comparison]:
    run = Run(case, "egoschema", *_responses(case, lambda row: row["q_uid"]))
    yield run.items("lmms_eval", "lmms_eval_index", lambda row: row.verdict.parsed)
    yield run.items("lmms_eval", "lmms_eval_random_draw", lambda row: row.verdict.parsed is None)
    rows = run.judged["lmms_eval"]
    yield same_strings("answers", {row.item.id: row.item.answer for row in rows}, case.json("subset_answers.json"))
    yield same_strings("submission", egoschema.submission(rows), run.expected["submission"])
    yield numbers("aggregate", run.sums["lmms_eval"], run.expected["aggregate"])


def perception(case: Case) -> Iterator[Comparison]:
    run = Run(case, "perception_test", *_responses(case, lambda row: f"{row['video']}/{row['id']}"))
    read = {
        "lmms_eval_pred": lambda row: -1 if row.verdict.parsed is None else row.verdict.parsed,
        "correct": _score,
        "area": lambda row: row.item.details["area"],
        "reasoning": lambda row: row.item.details["reasoning"],
    }
    for field, one in read.items():
        yield run.items("lmms_eval", field, one)
    aggregate = run.expected["aggregate"]
    by = {f"{field}/{name}": value for field, group in aggregate["by"].items() for name, value in group.items()}
    yield numbers("aggregate", run.sums["lmms_eval"], {"top1": aggregate["top1"]} | by)


def videovista(case: Case) -> Iterator[Comparison]:
    run = Run(case, "videovista", *_responses(case, lambda row: str(row["index"])))
    yield run.items("video_ccam", "Type", lambda row: row.item.kind)
    yield run.items("video_ccam", "video_ccam", lambda row: bool(_score(row)))
    yield same_strings("aggregate", run.sums["video_ccam"], run.expected["aggregate"]["video_ccam"])


def yes_no(case: Case) -> Iterator[Comparison]:
    lines = (case.path / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    given = [json.loads(line)["answer"] for line in lines if line.strip()]
    run = Run(case, "pope", given, lambda row: f"coco_pope_random/{row['question_id']}")
    yield run.items("official", "official_pred", lambda row: pope.no_among_words(row.response))
    yield run.items("lmms_eval", "lmms_eval_score", _score)
    yield run.items("lmms_eval", "lmms_eval_pred", lambda row: row.verdict.parsed or row.response.lower().strip())
    yield run.items("vlmevalkit", "vlmevalkit_extract", lambda row: (row.verdict.parsed or "unknown").capitalize())
    for protocol, recorded in (
        *(("official", "official"), ("lmms_eval", "lmms_eval")),
        ("vlmevalkit", "vlmevalkit_rederived"),
    ):
        yield numbers(f"{protocol} aggregate", run.sums[protocol], run.expected["aggregate"][recorded])


def mme(case: Case) -> Iterator[Comparison]:
    run = Run(case, "mme", case.json("predictions.json"), lambda row: f"{row['question_id']}/{row['answer']}")
    yield run.items("lmms_eval", "parsed", lambda row: row.verdict.parsed or "other")
    yield run.items("lmms_eval", "score", _score)
    aggregate = run.expected["aggregate"]
    sums = {name: value for name, value in aggregate.items() if name != "per_category"}
    yield numbers("aggregate", run.sums["lmms_eval"], sums | aggregate["per_category"])


def frames(case: Case) -> Iterator[Comparison]:
    """The recorded indices of every sampling rule."""
    names = {"num_frames": "num_total", "num_segments": "num_frames", "max_num_frames": "num_frames"}
    recorded = case.json("expected.json")
    for rule in case.json("config.json")["protocols"]:
        cases = [one for one in recorded if one["rule"] == rule]
        made = []
        for one in cases:
            # Only for mvbench `fps` is the video's own rate and not the one asked for.
            names_here = names | ({"fps": "video_fps"} if rule == "mvbench" else {})
            given = {names_here.get(key, key): value for key, value in one.items() if key not in ("rule", "indices")}
            made.append(sample_indices(rule, **{key: value for key, value in given.items() if value != -1}))
        yield same_strings(f"{rule}, {len(cases)} cases", made, [one["indices"] for one in cases])


RUNNERS = {
    ("eval", "scoring", "mvbench"): mvbench,
    ("eval", "scoring", "videomme"): videomme,
    ("eval", "scoring", "mlvu"): mlvu,
    ("eval", "scoring", "nextqa_mc"): nextqa,
    ("eval", "scoring", "egoschema"): ego,
    ("eval", "scoring", "perceptiontest"): perception,
    ("eval", "scoring", "videovista"): videovista,
    ("eval", "scoring", "pope"): yes_no,
    ("eval", "scoring", "mme"): mme,
    ("eval", "scoring", "frame_sampling"): frames,
}
