"""English words: tokens, singulars, and the tagger and stemmer of nltk."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from mmzoo.errors import DatasetError, MissingExtra
from mmzoo_eval.wordnet import WordNet

Tagger = Callable[[Sequence[str]], list[str]]
"""Tokens -> Penn Treebank tags."""

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+|(?<=[.?!]['\")\]])\s+")
_APART = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[«»“”‘’„]", r" \g<0> "),
        (r"^\"", "`` "),
        (r"([ (\[{<])(\"|'{2})", r"\1 `` "),
        (r"([^\s.,])?([:,])([^\d])", r"\1 \2 \3"),
        (r"([:,])$", r" \1 "),
        (r"\.{2,}", r" \g<0> "),
        (r"[;@#$%&]", r" \g<0> "),
        (r"([^.])(\.)([\])}>\"'»”’ ]*)\s*$", r"\1 \2 \3 "),
        (r"[?!]", r" \g<0> "),
        (r"([^'])' ", r"\1 ' "),
        (r"[*]", r" \g<0> "),
        (r"[\]\[(){}<>]", r" \g<0> "),
        (r"--", r" -- "),
        (r"(?<!\S)'(?=\w)(?!(?:s|m|d|ll|re|ve|t|n't)\b)", "' "),
    )
]
_ENDINGS = [
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"''", " '' "),
        (r"\"", " '' "),
        (r"([^' ])('s|'m|'d|') ", r"\1 \2 "),
        (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
        (r"\b(can)(not|n't)\b", r" \1 \2 "),
        (r"\b(gon|wan)(na)\b", r" \1 \2 "),
        (r"\b(got)(ta)\b", r" \1 \2 "),
        (r"\b(gim|lem)(me)\b", r" \1 \2 "),
    )
]


def tokens(text: str) -> list[str]:
    """Words and punctuation marks by the rules of the Penn Treebank, as nltk's word_tokenize gives them.

    A sentence ends at ".", "?" or "!" before white space. nltk knows abbreviations too, after which it goes on.
    """
    found: list[str] = []
    for sentence in _SENTENCE_END.split(text):
        for pattern, replacement in _APART:
            sentence = pattern.sub(replacement, sentence)
        sentence = f" {sentence} "
        for pattern, replacement in _ENDINGS:
            sentence = pattern.sub(replacement, sentence)
        found += sentence.split()
    return found


_IRREGULAR = dict(
    pair.split(">")
    for pair in """
children>child men>man women>woman people>person persons>person teeth>tooth feet>foot geese>goose mice>mouse lice>louse
oxen>ox dice>die knives>knife wives>wife lives>life midwives>midwife leaves>leaf loaves>loaf thieves>thief halves>half
calves>calf wolves>wolf shelves>shelf bookshelves>bookshelf elves>elf selves>self scarves>scarf hooves>hoof
wharves>wharf sheaves>sheaf lenses>lens gases>gas buses>bus minibuses>minibus airbuses>airbus quizzes>quiz
""".split()
)
_NO_PLURAL = frozenset(
    "scissors shears pliers tweezers series species news headquarters innings bison trout salmon tuna swine".split()
)
_IN_E = frozenset(
    """
pie tie cookie collie birdie doggie brownie hoodie movie zombie selfie smoothie genie hippie rookie auntie
canoe shoe horseshoe snowshoe toe tiptoe mistletoe hoe doe oboe foe
ache headache toothache stomachache moustache mustache quiche cache niche brioche avalanche axe
""".split()
)
"""Words whose plural adds nothing but an s, although it looks as if it added more."""


def singular(word: str) -> str:
    """A lower-case token as CHAIR compares it: without the ending of an English plural.

    What only looks like a plural is cut too, as the original's rules do: "bus" becomes "bu", "glass" "glas" and "his"
    "hi", while "buses" becomes "bus". A possessive of a plural, "dogs'", becomes "dog's".
    """
    if word.endswith("'"):
        return f"{singular(word[:-1])}'s"
    if word in _IRREGULAR or word in _NO_PLURAL:
        return _IRREGULAR.get(word, word)
    if word.endswith("men") and len(word) > 5:
        return f"{word[:-3]}man"
    if len(word) < 3 and word != "'s" or not word.endswith("s"):
        return word
    stem = word[:-1]
    if stem in _IN_E:
        return stem
    if stem.endswith("ie"):
        return f"{stem[:-2]}y"
    return stem[:-1] if stem.endswith(("xe", "che", "she", "sse", "oe")) else stem


_PARTS = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}


def part_of_speech(tag: str) -> str | None:
    """WordNet's part of speech of a Penn Treebank tag; None for any but nouns, adjectives, verbs and adverbs."""
    return _PARTS.get(tag[:2])


def nltk_tags(words: Sequence[str]) -> list[str]:
    """The tags of nltk's perceptron tagger. MissingExtra without nltk, DatasetError without its data."""
    try:
        from nltk import pos_tag
    except ImportError as error:
        raise MissingExtra("nltk", "wordnet", "Tagging words") from error
    try:
        return [tag for _, tag in pos_tag(list(words))]
    except LookupError as error:
        hint = "python -m nltk.downloader averaged_perceptron_tagger_eng"
        raise DatasetError("The data of nltk's tagger are missing:", [f"get them with: {hint}"]) from error


def nltk_stem(word: str) -> str:
    """The Porter stem. Raises MissingExtra without nltk."""
    return _porter()(word)


@cache
def _porter() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError as error:
        raise MissingExtra("nltk", "wordnet", "Stemming words") from error
    return PorterStemmer().stem


@cache
def wordnet(rules: str, path: Path | None = None) -> WordNet:
    """WordNet, read once."""
    return WordNet(path, rules)
