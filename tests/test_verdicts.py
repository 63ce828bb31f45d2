"""The published table is what running it gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmzoo.attention import backends
from mmzoo.attention.verdicts import BACKENDS, EXAMPLES, SCENARIOS, cell, verdict
from mmzoo.masks import RULES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))


def test_every_rule_has_an_example() -> None:
    assert set(EXAMPLES) == set(RULES)


@pytest.mark.parametrize("rule", EXAMPLES)
def test_every_cell_is_equal_or_refused(rule: str) -> None:
    for attention in BACKENDS:
        for scenario in SCENARIOS:
            found = verdict(rule, attention, scenario)
            assert found.kind in ("equal", "contents equal", "refused", "not applicable"), (attention, scenario, found)
            if attention in ("eager", "sdpa"):
                assert found.kind in ("equal", "not applicable")
            if found.kind == "refused":
                assert found.detail


def test_the_published_table_is_current() -> None:
    from backend_table import table

    assert "\n".join(table("cpu")) in (ROOT / "docs" / "backend-table.md").read_text()


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backends.Mask, "dense", lambda self: self.queries.valid[:, self.rows, None] & self.keys.valid[:, None]
    )
    monkeypatch.setattr(backends.Eager, "__call__", lambda self, q, k, v, mask, scale: 2 * q)
    assert verdict("causal", "sdpa", "prefill").kind == "WRONG"
    assert "WRONG" in cell("causal", "flex_attention")
