"""Write docs/claims.md's sections and its pictures from benchmarks/results/claims.

mmzoo reproduce all --seeds 3 --output benchmarks/results/claims
python scripts/claims_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

from mmzoo.files import replacing
from mmzoo_training.reproduce import CLAIMS, draw, markdown, missing, results

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "claims.md", ROOT / "benchmarks" / "results" / "claims"
SEEDS = 3


def section(name: str) -> str:
    """One claim: its table, its conclusions and its curves; or that it has not been run."""
    claim = CLAIMS[name]
    found = results(claim, RESULTS)
    parts = [f"## {name}", f"`mmzoo reproduce {name} --seeds {SEEDS}`"]
    if not found["runs"]:
        return "\n\n".join([*parts, "Not run yet."])
    left = missing(claim, SEEDS, found)
    if left:
        parts.append(
            f"Not all was run: {', '.join(f'{variant} with seed {seed}' for variant, seed in left)} is missing."
        )
    picture = draw(claim, found, ROOT / "docs" / "images" / f"claim-{name}.png")
    return "\n\n".join([*parts, markdown(claim, found), f"![Curves of every run](images/{picture.name})"])


def page(text: str) -> str:
    """The page with what stands between its two markers made anew."""
    made = "<!-- claims -->\n" + "\n\n".join(map(section, CLAIMS)) + "\n<!-- /claims -->"
    return re.sub(r"<!-- claims -->.*<!-- /claims -->", lambda _: made, text, flags=re.DOTALL)


def main() -> None:
    with replacing(PAGE) as temporary:
        temporary.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
