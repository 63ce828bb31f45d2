"""VLind-Bench: does a model look, or does it believe what is usual? Asked in stages (klee972/VLind-Bench, Apache-2.0).

a: common-sense knowledge; b: visual perception; c: common-sense bias, counted where a passed; d: language prior,
counted where b and c passed. In every stage statement 1 is true and statement 2 false.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmzoo_eval.annotations import Kinds, read_json, refuse, require, unique
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, Verdict, by_name

SOURCE = "klee972/VLind-Bench 9083efe4ff0f5f22c7aab7715a5aae648d0ebd13, eval/score_pipeline.py"
VOTES = 2
"""An image is good if so many people say so."""

STYLES = {
    "all": range(12),
    "photorealistic": range(4),
    "illustration": range(4, 8),
    "cartoon": range(8, 12),
}
"""Which images are of which style."""

_ONLY = "Only respond in True or False."
_FORGET = "Forget real-world common sense and just follow the information provided in the {}. "
_ASKED = {
    "a": "Based on the common sense, is the given statement true or false? ",
    "b": "Based on the image, is the given statement true or false? ",
    "c": "Based on the context, is the given statement true or false? ",
    "d": "Based on the image, is the given statement true or false? ",
}
_FORGOTTEN = {"c": _FORGET.format("context"), "d": _FORGET.format("image")}


def _told(item: Item) -> str:
    context = f"Context: {item.details['context']}\n" if item.kind == "c" else ""
    return f"{context}Statement: {item.question}\n"


def official_prompt(item: Item) -> Prompt:
    """The script for GPT-4o."""
    return Prompt(f"{_told(item)}{_ASKED[item.kind]}{_FORGOTTEN.get(item.kind, '')}{_ONLY}")


def instructblip_prompt(item: Item) -> Prompt:
    """The script for InstructBLIP: the order stands first, and nothing is to be forgotten."""
    return Prompt(f"{_ONLY} {_told(item)}{_ASKED[item.kind].rstrip()}")


def parse(response: str) -> bool | None:
    """The first word that is true or false, in any case, without commas and periods; None if there is none."""
    words = response.lower().replace("\n", " ").replace(",", "").replace(".", "").split(" ")
    return next((word == "true" for word in words if word in ("true", "false")), None)


def judge(item: Item, response: str) -> Verdict:
    """Right if the statement is recognised as what it is."""
    said = parse(response)
    return Verdict(float(said == item.answer), said)


class Context(NamedTuple):
    """How a model did in one context: the stages that it passed, and d by good image."""

    a: bool
    b: bool
    c: bool
    d: Mapping[int, bool]


def staged(contexts: Sequence[Context], style: str = "all") -> dict[str, float]:
    """Upstream's counters and ratios, as fractions, over the contexts with a good image of that style.

    `d_macro` sums the share of good images that passed, `d_micro` the images. `n` contexts are left.
    """
    kept = [(one, [passed for image, passed in one.d.items() if image in STYLES[style]]) for one in contexts]
    kept = [(one, images) for one, images in kept if images]
    through = [(one, images) for one, images in kept if one.b and one.c and one.a]
    total = {
        "n": len(kept),
        **{name: sum(getattr(one, name) for one, _ in kept) for name in "abc"},
        "d_macro": sum(sum(images) / len(images) for _, images in kept),
        "d_micro": sum(sum(images) for _, images in kept),
        "a_pass": sum(one.a for one, _ in kept),
        "b_pass": sum(one.b for one, _ in kept),
        "c_pass": sum(one.a and one.c for one, _ in kept),
        "bc_pass": len(through),
        "bc_pass_micro": sum(len(images) for _, images in through),
        "d_pass_macro": sum(sum(images) / len(images) for _, images in through),
        "d_pass_micro": sum(sum(images) for _, images in through),
    }
    ratios = {
        "a_pass_ratio": ("a_pass", "n"),
        "b_pass_ratio": ("b_pass", "n"),
        "c_pass_ratio": ("c_pass", "a_pass"),
        "d_pass_ratio_macro": ("d_pass_macro", "bc_pass"),
        "d_pass_ratio_micro": ("d_pass_micro", "bc_pass_micro"),
        "c_ratio": ("c", "n"),
        "d_ratio_macro": ("d_macro", "n"),
    }
    return {
        **{name: float(value) for name, value in total.items()},
        **{name: total[part] / total[whole] if total[whole] else 0.0 for name, (part, whole) in ratios.items()},
    }


PRINTED = ("a_pass_ratio", "b_pass_ratio", "c_pass_ratio", "d_pass_ratio_macro", "c_ratio", "d_ratio_macro")
"""What upstream prints, in this order, in percent."""


_Place = tuple[str, int, int | None]
"""Stage, number of the statement, and image."""


def contexts(rows: Sequence[Judged]) -> list[Context]:
    """What each context came to. A statement without a verdict was not passed.

    A context whose rows come several times, as in a resampled set, comes as often.
    """
    right: dict[str, dict[_Place, bool]] = {}
    good: dict[str, list[int]] = {}
    times: Counter[tuple[str, _Place]] = Counter()
    for row in rows:
        place = (row.item.kind, row.item.details["statement"], row.item.details["image"])
        found = right.setdefault(row.item.cluster, {})
        found[place] = row.verdict is not None and row.verdict.score == 1
        good[row.item.cluster] = row.item.details["good_images"]
        times[row.item.cluster, place] += 1

    def passed(found: Mapping[_Place, bool], stage: str, image: int | None = None) -> bool:
        return all(found.get((stage, statement, image), False) for statement in (1, 2))

    result = []
    for name, found in right.items():
        images = {image: passed(found, "d", image) for image in good[name]}
        context = Context(passed(found, "a"), passed(found, "b"), passed(found, "c"), images)
        result += [context] * max(times[name, place] for place in found)
    return result


def aggregate(rows: Sequence[Judged]) -> dict[str, float]:
    """Percent as "style/ratio", for all images and each style, and the number of contexts left as "style/n"."""
    found = contexts(rows)
    result: dict[str, float] = {}
    for style in STYLES:
        values = staged(found, style)
        result |= {f"{style}/{name}": 100 * values[name] for name in (*PRINTED, "d_pass_ratio_micro")}
        result[f"{style}/n"] = values["n"]
    return result


_FIELDS: dict[str, Kinds] = {
    "concept": str,
    "context_id": (int, str),
    "context": str,
    "factual_context": str,
    "true_statement": str,
    "false_statement": str,
    "existent_noun": str,
    "non-existent_noun": str,
    "best_img_id": (int, str),
    "aggregated_human_label_good_images": dict,
}


def read(path: Path) -> list[Item]:
    """The statements of every stage. `path` is the folder with data.json, or that file.

    Contexts without a good image are left out, as upstream skips them.
    """
    path = path / "data.json" if path.is_dir() else path
    entries = read_json(path, list)
    require(path, enumerate(entries), _FIELDS)
    unique(path, [(entry["concept"], entry["context_id"]) for entry in entries], "concept and context_id")
    votes = [
        (i, *pair) for i, entry in enumerate(entries) for pair in entry["aggregated_human_label_good_images"].items()
    ]
    refuse(
        [
            f"{path}: entry {i}: field 'aggregated_human_label_good_images': {image!r}: {number!r}"
            for i, image, number in votes
            if not image.isdecimal() or isinstance(number, bool) or not isinstance(number, int)
        ]
    )
    return [item for entry in entries for item in _items(entry)]


def _items(entry: Mapping[str, Any]) -> list[Item]:
    votes = entry["aggregated_human_label_good_images"]
    good = [int(image) for image, number in votes.items() if number >= VOTES]
    name = f"{entry['concept']}/{entry['context_id']}"
    usual = f"{name}_{entry['factual_context']}/0.jpg"
    seen = f"There is {entry['existent_noun']} in the given image."
    unseen = f"There is {entry['non-existent_noun']} in the given image."
    true, false = entry["true_statement"], entry["false_statement"]

    def shown(image: int | str) -> str:
        return f"{name}_{entry['context']}/{image}.jpg"

    asked: list[tuple[str, int | None, str, tuple[str, str]]] = [
        ("a", None, usual, (false, true)),
        ("b", None, shown(entry["best_img_id"]), (seen, unseen)),
        ("c", None, shown(entry["best_img_id"]), (true, false)),
        *(("d", image, shown(image), (true, false)) for image in good),
    ]
    return [
        Item(
            id=f"{name}/{stage}{number}" + ("" if image is None else f"/{image}"),
            question=statement,
            answer=number == 1,
            media=media,
            kind=stage,
            cluster=name,
            details={
                "statement": number,
                "image": image,
                "context": entry["context"],
                "concept": entry["concept"],
                "good_images": good,
            },
        )
        for stage, image, media, statements in asked
        for number, statement in enumerate(statements, 1)
        if good
    ]


def _protocol(name: str, prompt: Callable[[Item], Prompt]) -> Protocol:
    return Protocol(name, SOURCE, judge, aggregate, "all/d_pass_ratio_macro", prompt)


BENCHMARKS = (
    Benchmark(
        "vlind_bench",
        "VLind-Bench",
        read,
        by_name(_protocol("official", official_prompt), _protocol("instructblip", instructblip_prompt)),
        "image",
        "data.json of klee972/VLind-Bench; images are called <concept>/<context_id>_<context>/<image>.jpg.",
    ),
)
