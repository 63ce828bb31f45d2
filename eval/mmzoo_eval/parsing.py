"""How suites read an answer to a multiple-choice question, rule by rule.

Suites differ here more than models do, so a score has to name its rule. Their oddities are kept, with two exceptions:
nothing is ever drawn at random (nothing found is None), and nothing raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from mmzoo_eval.benchmark import Item, Verdict, lettered
from mmzoo_eval.normalise import without_punctuation
from mmzoo_eval.prompts import bracketed, dotted

Judge = Callable[[Item, str], Verdict]

PREFIXES = ("Answer:", "The answer is", "Answer is")
"""What may stand before an answer in Video-CCAM's scripts. The one for MLVU does not know the last."""

PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
"""After these, `by_priority` expects an answer."""

_PATTERNS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0


def by_option(counts: Callable[[str, str], bool]) -> Judge:
    """A judge of rules that compare a response with "(B) text of the right option" and read no letter.

    What was parsed is the one option that the rule would count as right; a response that fits none, or several as "("
    does, counts as unanswered, whatever its score.
    """

    def judge(item: Item, response: str) -> Verdict:
        counted = [i for i, option in enumerate(item.options) if counts(response, bracketed(i, option))]
        return Verdict(float(item.answer in counted), counted[0] if len(counted) == 1 else None)

    return judge


def by_letter(read: Callable[[Item, str], str | None]) -> Judge:
    """A judge of rules that read a letter: right is the right one, and none is wrong."""

    def judge(item: Item, response: str) -> Verdict:
        letter = read(item, response)
        number = None if letter is None else ord(letter) - ord("A")
        return Verdict(None if item.answer is None else float(number == item.answer), number)

    return judge


def two_way(said: str, reference: str) -> bool:
    """Whether one first word holds the other: MVBench's notebook, and check_ans of VLMEvalKit.

    Periods are taken from what was said, and only for one of the two directions. A response without a first word is
    part of everything, so it is right. (Upstream raises IndexError on an option without text.)
    """
    word, right = (text.lower().split(" ")[0] for text in (said, reference))
    return word.replace(".", "") in right or right in word


def without_prefixes(said: str, reference: str, prefixes: Iterable[str] = PREFIXES) -> bool:
    """Whether one first word holds the other, in Video-CCAM's scripts: `)` alone is right, and nothing is wrong.

    Args:
        said: the model's words, as they are.
        reference: the right answer, such as "(B) Tidied up the blanket."
        prefixes: each is taken away once, in this order, where `said` begins with it.
    """
    for prefix in prefixes:
        said = said.removeprefix(prefix).strip()
    one, other = (text.split(" ")[0].lower().replace(".", "") for text in (said, reference))
    return bool(one) and (one in other or other in one)


def first_capital(said: str, phrases: Iterable[str], letters: str = "ABCD") -> str | None:
    """The first of these capitals once the phrases are deleted, inside words too: Video-MME's script, VLMEvalKit."""
    for phrase in phrases:
        said = said.replace(phrase, "")
    return next((character for character in said if character in letters), None)


def _padded(said: str, stripped: str) -> str:
    for character in stripped:
        said = said.strip(character)
    return f" {said} "


def by_priority(said: str, letters: str = "ABCD") -> str | None:
    """The letter with the most telling surroundings, of equals the last: mcq_extract of lmms-eval."""
    if not said.strip():
        return None
    text = _padded(said.strip(), ",.!?;:'\"")
    found = [*_at_the_ends(text, letters), *_after_phrases(text, letters), *_in_patterns(text, letters)]
    found = found or [(_ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda one: one[:2])[2] if found else None


def _at_the_ends(text: str, letters: str) -> Iterator[tuple[int, int, str]]:
    bare = text.strip(" ")
    if bare[:1] and bare[0] in letters and not bare[1:2].isalpha():
        yield _START, 0, bare[0]
    if bare[-1:] and bare[-1] in letters and not bare[-2:-1].isalpha():
        yield _END, 0, bare[-1]


def _after_phrases(text: str, letters: str) -> Iterator[tuple[int, int, str]]:
    lowered = text.lower()
    for phrase in PHRASES:
        if phrase in lowered:
            places = ((text.find(letter, lowered.find(phrase) + len(phrase)), letter) for letter in letters)
            yield from ((_PHRASE, place, letter) for place, letter in places if place >= 0)


def _in_patterns(text: str, letters: str) -> Iterator[tuple[int, int, str]]:
    for pattern, priority in _PATTERNS:
        places = ((text.rfind(pattern.format(letter)), letter) for letter in letters)
        yield from ((priority, place, letter) for place, letter in places if place >= 0)


def last_named(said: str, options: Sequence[str]) -> str | None:
    """The letter named last, or the option whose text stands last: NExT-QA in lmms-eval, by MMMU's rules.

    Where nothing is found, upstream draws at random.
    """
    text, letters = _padded(said, ",.!?;:'"), [lettered(i) for i in range(len(options))]
    for pattern, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in letters if pattern.format(letter) in text]
        if named:
            return max(named, key=lambda letter: text.rfind(place.format(letter)))
    quoted = _quoted(text, options)
    return max(quoted, key=lambda one: one[0])[1] if quoted else None


def first_named(said: str, options: Sequence[str]) -> str | None:
    """The letter whose last mention comes first, or the option whose text does: EgoSchema in lmms-eval.

    Where nothing is found, upstream draws at random.
    """
    text = _padded(said, ",.!?;:'")
    places = [
        (text.rfind(pattern.format(lettered(i))), lettered(i))
        for pattern in ("({})", "{} ", "{}.")
        for i in range(len(options))
    ]
    named = [one for one in places if one[0] >= 0] or _quoted(text, list(map(dotted, range(len(options)), options)))
    return min(named, key=lambda one: one[0])[1] if named else None


def _quoted(text: str, options: Sequence[str]) -> list[tuple[int, str]]:
    """Where the texts of options stand last, in a response of more than five words."""
    if len(text.split()) <= 5:
        return []
    places = ((text.lower().rfind(option.lower()), lettered(i)) for i, option in enumerate(options))
    return [one for one in places if one[0] >= 0]


def stand_alone_capital(said: str) -> str | None:
    """The first capital A-D that is a word: Perception Test in lmms-eval. The article of "A box" is one."""
    found = re.search(r"\b[A-D]\b", said.strip())
    return found[0] if found else None


def mvbench_letter(said: str) -> str | None:
    """MVBench in lmms-eval: "B. text", or the first letter a-e that is a word once punctuation is gone.

    The article of "It is a dog" is one.
    """
    given = re.fullmatch(r"([A-E])\.\s*.+", said.strip(), re.IGNORECASE)
    if given:
        return given[1].upper()
    text = without_punctuation(re.sub(r"[\n\t]", " ", said).strip())
    for character in "'\")(":
        text = text.strip(character)
    found = re.search(r"\b[a-e]\b", text.lower())
    return found[0].upper() if found else None


def before_bracket(said: str) -> str | None:
    """The character before the first `)`, or all that was said: MLVU's choice_bench.py. Nothing is stripped."""
    head, bracket, _ = said.partition(")")
    return (head[-1:] if bracket else said) or None
