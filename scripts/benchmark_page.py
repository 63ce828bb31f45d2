"""Write the tables of docs/benchmarks.md from benchmarks/results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmzoo.files import replacing

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"


def table(rows: dict[str, dict[str, float]], first: str) -> str:
    """A Markdown table, one line a row."""
    names = list(next(iter(rows.values())))
    lines = [f"| {first} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |" for name, row in rows.items()
    ]
    return "\n".join(lines)


def replaced(page: str, name: str, content: str) -> str:
    """The page with what stands between two markers replaced."""
    marked = f"<!-- {name} -->\n{content}\n<!-- /{name} -->"
    return re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _: marked, page, flags=re.DOTALL)


def main() -> None:
    cpu: dict[str, Any] = json.loads((RESULTS / "cpu.json").read_text())
    attention: dict[str, Any] = json.loads((RESULTS / "attention_cpu.json").read_text())
    page = PAGE.read_text()
    page = replaced(page, "dense", table(attention["SDPA, dense mask against is_causal"], "tokens"))
    decoding = {name.removeprefix("decoding, "): row for name, row in cpu.items() if name.startswith("decoding")}
    page = replaced(page, "decoding", table(decoding, "attention"))
    page = replaced(page, "imports", table({"median of 7": cpu["import"]}, ""))
    with replacing(PAGE) as temporary:
        temporary.write_text(page)


if __name__ == "__main__":
    main()
