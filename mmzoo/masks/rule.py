"""Rules: who may look at whom, as data.

A rule is a list of terms, and any term opens a pair. A term names a class of queries, a class of keys and a relation
between a value of the query and a value of the key. Samples never meet, and padding is never seen.

Shape legend: B batch, L tokens, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mmzoo.errors import InputError
from mmzoo.layout import Modality, Role, TokenLayout


@dataclass(frozen=True)
class Class:
    """A named predicate on the layout: bool [B, L].

    Attributes:
        holds_answers: whether generated text tokens belong to it, which decides how decoding may run.
    """

    name: str
    of: Callable[[TokenLayout], Tensor] = field(repr=False)
    holds_answers: bool = False

    def __str__(self) -> str:
        return self.name

    def __and__(self, other: Class) -> Class:
        return Class(
            f"{self} and {other}", lambda x: self.of(x) & other.of(x), self.holds_answers and other.holds_answers
        )


@dataclass(frozen=True)
class Value:
    """A named integer of each token: [B, L].

    Attributes:
        grows: whether a newly generated text token has a value no smaller than every earlier token of its sample.
    """

    name: str
    of: Callable[[TokenLayout], Tensor] = field(repr=False)
    grows: bool = False

    def __str__(self) -> str:
        return self.name


everything = Class("everything", lambda x: x.valid, holds_answers=True)
text = Class("text", lambda x: x.valid & (x.modality == int(Modality.TEXT)), holds_answers=True)
visual = Class("visual", lambda x: x.visual)
prompt = Class("prompt", lambda x: x.valid & (x.role == int(Role.PROMPT)))
answer = Class("answer", lambda x: x.valid & (x.role == int(Role.ANSWER)), holds_answers=True)
first_prompt_text = Class(
    "text up to the first answer",
    lambda x: x.valid & (x.modality == int(Modality.TEXT)) & (x.role == int(Role.PROMPT)) & (x.turn == 0),
)

index = Value("index", lambda x: x.index, grows=True)
_minus_index = Value("-index", lambda x: -x.index)
_minus_index_minus_one = Value("-index - 1", lambda x: -x.index - 1)
turn = Value("turn", lambda x: x.turn)
segment = Value("segment", lambda x: x.segment)
frame = Value("frame", lambda x: x.frame)
segment_and_frame = Value("segment and frame", lambda x: x.segment * 2**16 + x.frame)


@dataclass(frozen=True)
class Relation:
    """How the value of a query and the value of a key must stand to each other."""

    kind: Literal["not after", "same", "always"]
    query: Value = index
    key: Value = index
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InputError(f"A window is at least 1, got {self.window}.")

    def __str__(self) -> str:
        if self.kind == "always":
            return "always"
        sign = "=" if self.kind == "same" else "<="
        within = "" if self.window is None else f", less than {self.window} apart"
        return f"key {self.key} {sign} query {self.query}{within}"


always = Relation("always")
itself = Relation("same")


def not_after(query: Value = index, key: Value | None = None, *, window: int | None = None) -> Relation:
    """key value <= query value and, with a window, query value - key value < window."""
    return Relation("not after", query, key or query, window)


def after() -> Relation:
    """key index > query index."""
    return Relation("not after", _minus_index_minus_one, _minus_index)


def same(value: Value) -> Relation:
    """key value == query value."""
    return Relation("same", value, value)


@dataclass(frozen=True)
class Term:
    """Queries of one class see keys of another when the relation holds."""

    query: Class
    key: Class
    relation: Relation

    def __str__(self) -> str:
        return f"{self.query} -> {self.key}: {self.relation}"


AllowedFunction = Callable[[TokenLayout, TokenLayout], Tensor]


@dataclass(frozen=True)
class Rule:
    """Who may look at whom.

    Attributes:
        name: the mask's name in the literature.
        terms: any of them opens a pair.
        function: what no list of terms can say: `(query layout, key layout) -> bool [B, Q, K]`, opened beside the
            terms. Backends that need terms refuse it.
        empty: what a query without an open key gives: "zero", or "uniform", the mean over the keys that `fallback`
            opens (what an additive mask of finfo.min does in upstream VisualChat and FAVOR).
        fallback: the rule that says over which keys "uniform" takes its mean.
    """

    name: str
    terms: tuple[Term, ...] = ()
    function: AllowedFunction | None = field(default=None, compare=False)
    empty: Literal["zero", "uniform"] = "zero"
    fallback: Rule | None = None

    def __post_init__(self) -> None:
        if not self.terms and self.function is None:
            raise InputError(f"The rule {self.name!r} opens nothing: give it terms or a function.")
        if (self.empty == "uniform") != (self.fallback is not None):
            raise InputError(f"The rule {self.name!r}: empty='uniform' and a fallback rule go together.")

    def __or__(self, other: Rule) -> Rule:
        """A pair is open if either rule opens it."""
        if self.fallback or other.fallback:
            raise InputError(f"{self.name!r} | {other.name!r}: rules with a uniform fallback cannot be composed.")
        functions = [rule.function for rule in (self, other) if rule.function]
        function = (lambda q, k: functions[0](q, k) | functions[1](q, k)) if len(functions) == 2 else None
        return Rule(
            f"{self.name} | {other.name}",
            tuple(dict.fromkeys(self.terms + other.terms)),
            function or (functions[0] if functions else None),
        )

    def __repr__(self) -> str:
        lines = [f"Rule {self.name!r}: a query sees a key of its sample when", *(f"  {term}" for term in self.terms)]
        if self.function is not None:
            lines.append(f"  the function {getattr(self.function, '__name__', 'function')} says so")
        if self.fallback is not None:
            lines.append(f"  (a query that sees none takes the mean over {self.fallback.name!r})")
        return "\n".join(lines)

    @property
    def decodes_causally(self) -> bool:
        """Whether a generated text token is sure to see every earlier token of its sample.

        Then decoding may use the ordinary padding mask. True needs a term without a window from a class that holds
        answers to everything, in a value that grows along the sequence.
        """
        return any(
            term.query.holds_answers
            and term.key == everything
            and (term.relation.kind == "always" or _sees_the_past(term.relation))
            for term in self.terms
        )


def _sees_the_past(relation: Relation) -> bool:
    same_value = relation.query == relation.key
    return relation.kind == "not after" and relation.window is None and same_value and relation.query.grows


def see(query: Class, key: Class, relation: Relation) -> Term:
    """`see(visual, text, always)`: visual queries see text keys always."""
    return Term(query, key, relation)
