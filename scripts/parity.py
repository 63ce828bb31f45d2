"""Compare mmzoo with recorded outputs of the authors' own code.

    python scripts/parity.py DIR [--system S] [--json OUT]

DIR holds `<system>/<case>/` folders with config.json, inputs, weights and expected outputs. Every case that is known
here runs through mmzoo's public code; the rest is listed as skipped. Exits 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from parity_cases import Case, Comparison, Skipped, run_case
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmzoo.files import replacing


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="folder of <system>/<case>/ folders")
    parser.add_argument("--system", help="only this system")
    parser.add_argument("--json", type=Path, help="write the verdicts here")
    options = parser.parse_args(arguments)
    cases = sorted(path.parent for path in options.directory.glob("*/*/config.json"))
    if options.system:
        cases = [path for path in cases if path.parent.name == options.system]
    if not cases:
        print(f"No cases (config.json files) under {options.directory}.", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 150)
    results = []
    for path in track(cases, description="cases", console=Console(stderr=True), transient=True):
        results.append(_run(Case(path)))
    _print(console, results)
    if options.json:
        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps([_as_json(*result) for result in results], indent=1))
    failed = [case for case, _, verdict in results if verdict == "fail"]
    return 1 if failed else 0


def _run(case: Case) -> tuple[Case, list[Comparison], str]:
    try:
        comparisons = run_case(case)
    except Skipped as reason:
        print(f"{case.system}/{case.name} is skipped: {reason}.", file=sys.stderr)
        comparisons = None
    except Exception as error:  # a case that raises is a failed case, and the others must still run
        comparisons = [Comparison(f"{type(error).__name__}: {error}", float("inf"), 0.0, False)]
    if comparisons is None:
        return case, [], "skipped"
    ok = bool(comparisons) and all(comparison.passed for comparison in comparisons)
    return case, comparisons, "pass" if ok else "fail"


def _print(console: Console, results: list[tuple[Case, list[Comparison], str]]) -> None:
    table = Table("system", "case", "tensor", "max error", "tolerance", "verdict")
    for case, comparisons, verdict in results:
        if verdict == "skipped":
            table.add_row(case.system, case.name, "", "", "", "skipped")
        for comparison in comparisons:
            colour = "green" if comparison.passed else "bold red"
            table.add_row(
                case.system,
                case.name,
                comparison.name,
                f"{comparison.max_error:.2e}",
                "exact" if comparison.tolerance == 0 else f"{comparison.tolerance:.0e}",
                f"[{colour}]{'pass' if comparison.passed else 'fail'}[/]",
            )
    console.print(table)
    counts = {verdict: sum(v == verdict for _, _, v in results) for verdict in ("pass", "fail", "skipped")}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def _as_json(case: Case, comparisons: list[Comparison], verdict: str) -> dict[str, object]:
    return {
        "system": case.system,
        "case": case.name,
        "verdict": verdict,
        "max_error": max((comparison.max_error for comparison in comparisons), default=None),
        "tensors": [comparison._asdict() for comparison in comparisons],
    }


if __name__ == "__main__":
    sys.exit(main())
