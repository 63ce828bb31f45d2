"""The mask compiler: layout + rule -> compact arrays, and what they say about prefill and decoding.

Shape legend: B batch, L tokens, Q queries, K keys, T terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmzoo.errors import UnsupportedMask
from mmzoo.layout import TokenLayout
from mmzoo.masks.rule import Rule, Term
from mmzoo_kernels.masks import HIGHEST, LOWEST, OUTSIDE, CompactMask

Rules = Rule | tuple[Rule, Rule]
"""One softmax, or the pair of a two-softmax attention."""


def compact(rule: Rule, queries: TokenLayout, keys: TokenLayout | None = None) -> CompactMask:
    """The compact arrays of a rule's terms. `keys` defaults to the queries (self-attention).

    Every relation is an interval of the key's value. Classes fold into it: a query outside the class gets an empty
    interval, a key outside it a value below every interval.

    Raises:
        UnsupportedMask: the rule is a function, which no list of terms can say.
    """
    if rule.function is not None:
        raise UnsupportedMask("compact arrays", rule.name, "it is a function, not a list of terms", ["eager"])
    keys = queries if keys is None else keys
    queries = TokenLayout(queries.data.expand(keys.shape[0], -1, -1))
    columns = [_interval(term, queries, keys) for term in rule.terms]
    lower, upper, value = (torch.stack(parts, -1) for parts in zip(*columns, strict=True))
    return CompactMask(queries.sample, keys.sample, lower, upper, value)


def _interval(term: Term, queries: TokenLayout, keys: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    relation = term.relation
    query, key = relation.query.of(queries), relation.key.of(keys)
    upper = torch.full_like(query, HIGHEST) if relation.kind == "always" else query
    lower = torch.full_like(query, LOWEST) if relation.kind != "same" else query
    if relation.window is not None:
        lower = query - relation.window + 1
    member = term.query.of(queries)
    return (
        torch.where(member, lower, HIGHEST).to(torch.int32),
        torch.where(member, upper, LOWEST).to(torch.int32),
        torch.where(term.key.of(keys), key, OUTSIDE).to(torch.int32),
    )


def allowed(rule: Rule, queries: TokenLayout, keys: TokenLayout | None = None, *, rows: slice = slice(None)) -> Tensor:
    """bool [B, Q, K], True = may attend; of any rule, functions included.

    Args:
        rows: only these queries. Values such as a concentric position need the whole sequence, so a chunk of queries
            is a slice of rows, not a slice of the layout.
    """
    keys = queries if keys is None else keys
    opened = None
    if rule.terms:
        terms = Rule(rule.name, rule.terms)
        opened = compact(terms, queries, keys).rows(rows).dense()
    if rule.function is None:
        assert opened is not None
        return opened
    same = (queries.sample[:, rows, None] == keys.sample[:, None]) & keys.valid[:, None]
    said = rule.function(queries, keys)[:, rows] & same
    return said if opened is None else opened | said


def looks_ahead(rule: Rules, layout: TokenLayout, cut: int) -> bool:
    """Whether a token before `cut` sees one at or after it."""
    if isinstance(rule, tuple) or rule.function is not None:
        return cut not in prefill_cuts(rule, layout)
    return bool(compact(rule, layout).rows(slice(cut)).columns(slice(cut, None)).dense().any())


def prefill_cuts(rule: Rules, layout: TokenLayout) -> list[int]:
    """Where a prefill may be cut: every c in 1..L-1 such that no token before c sees one at or after c.

    What a token without an open key takes from a fallback counts as seen.
    """
    places = torch.arange(len(layout), device=layout.data.device)
    seen = torch.stack([_seen(one, layout) for one in (rule if isinstance(rule, tuple) else (rule,))]).any(0)
    last_seen = torch.where(seen, places, -1).amax((0, 2)).cummax(0).values
    return (places[1:][last_seen[:-1] < places[1:]]).tolist()


def _seen(rule: Rule, layout: TokenLayout) -> Tensor:
    opened = allowed(rule, layout)
    if rule.fallback is None:
        return opened
    return torch.where(opened.any(-1, keepdim=True), opened, allowed(rule.fallback, layout))
