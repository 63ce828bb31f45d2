"""Words that the prompts of several benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence

from mmzoo_eval.benchmark import lettered

LETTER_ONLY = "Answer with the option's letter from the given choices directly."
ONE_WORD = "Answer the question using a single word or phrase."


def bracketed(number: int, text: str) -> str:
    """An option with its letter, "(A) text"; the number -1, of an answer that is no option, gives "(@) text"."""
    return f"({lettered(number)}) {text}"


def dotted(number: int, text: str) -> str:
    """An option with its letter, "A. text"."""
    return f"{lettered(number)}. {text}"


def question_block(question: str, options: Sequence[str]) -> str:
    """The question and its options as MVBench, MLVU and those after them write them."""
    shown = map(bracketed, range(len(options)), options)
    return "\n".join([f"Question: {question}", "Options:", *shown]).rstrip()
