"""`mmzoo reproduce`: every paper's claim rerun small, run by run, with a table, curves and what is concluded.

The results are written after every run, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mmzoo.attention.verdicts import versions
from mmzoo.errors import InputError
from mmzoo.files import replacing
from mmzoo_training import claim_ccam, claim_cells, claim_qformer, claim_video
from mmzoo_training.claims import Advance, Claim

CLAIMS = {
    claim.name: claim
    for claim in (
        claim_ccam.CLAIM,
        claim_qformer.CLAIM,
        claim_cells.FRAME_BLOCK,
        claim_cells.CCA,
        claim_cells.MMA,
        claim_video.CLAIM,
    )
}
"""By name, in the order in which `all` runs them."""

Results = dict[str, Any]
"""As `results` reads and `reproduce` writes them: the claim, its steps, where and when, levels, and a list of runs."""


def claims(name: str) -> list[Claim]:
    """One claim, or every one for "all". Raises InputError for an unknown name."""
    if name != "all" and name not in CLAIMS:
        raise InputError(f"Unknown claim {name!r}. Known: {', '.join(CLAIMS)}, and all.")
    return list(CLAIMS.values()) if name == "all" else [CLAIMS[name]]


def results(claim: Claim, folder: Path) -> Results:
    """What has been run in this folder so far.

    Raises:
        InputError: the file is damaged, or of runs of another length or of other variants, which must not be mixed with
            new ones.
    """
    path = folder / f"{claim.name}.json"
    if not path.exists():
        return {"claim": claim.name, "steps": claim.steps, "runs": []}
    way_out = "Give another folder, or remove the file to run everything again."
    try:
        found: Results = json.loads(path.read_text())
        steps, known = found["steps"], {run["variant"]: (run["seed"], run["scores"]) for run in found["runs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold results of `mmzoo reproduce`: {error!r}. {way_out}") from error
    if known.keys() - claim.variants.keys():
        strange = ", ".join(sorted(known.keys() - claim.variants.keys()))
        raise InputError(f"{path} holds runs of variants that {claim.name} does not have: {strange}. {way_out}")
    if steps != claim.steps:
        raise InputError(f"{path} holds runs of {steps} steps, a run has {claim.steps} now. {way_out}")
    return found


def run(name: str, variant: str, seed: int, steps: int, advance: Advance) -> dict[str, Any]:
    """One run, on one thread: its scores, its curve, and the CPU seconds it took."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        with torch.random.fork_rng(devices=[]):
            scores, curve = CLAIMS[name].train(variant, seed, steps, advance)
    finally:
        torch.set_num_threads(threads)
    seconds = round(time.process_time() - start, 2)
    points = [list(point) for point in curve]  # as JSON gives them back
    return {"variant": variant, "seed": seed, "scores": scores, "curve": points, "cpu_seconds": seconds}


def missing(claim: Claim, seeds: int, found: Results) -> list[tuple[str, int]]:
    """The (variant, seed) pairs that are still to run; all variants of a seed before the next seed."""
    done = {(run["variant"], run["seed"]) for run in found["runs"]}
    return [(v, seed) for seed in range(seeds) for v in claim.variants if (v, seed) not in done]


def reproduce(claim: Claim, seeds: int, folder: Path, jobs: int = 1, advance: Callable[[int], Any] = id) -> Results:
    """Run what is missing, write each result as it comes, and draw the curves.

    Args:
        claim: which one.
        seeds: 0 to `seeds - 1` are run.
        folder: for `NAME.json` and `NAME.png`.
        jobs: processes; each run has one thread. With 1 the runs are made in this process.
        advance: told of every number of steps that is done.

    Raises:
        InputError: fewer than one seed or job, or results in the folder that do not belong to this claim.
    """
    if min(seeds, jobs) < 1:
        raise InputError(f"Needs at least one seed and one job, got seeds={seeds}, jobs={jobs}.")
    found = results(claim, folder)
    todo = missing(claim, seeds, found)
    for result in _made(claim, todo, jobs, advance):
        order = list(claim.variants)
        found["runs"] = sorted([*found["runs"], result], key=lambda run: (order.index(run["variant"]), run["seed"]))
        found |= {"date": date.today().isoformat(), "device": f"{platform.machine()} CPU, one thread a run"}
        found |= {"versions": {"python": platform.python_version(), **versions()}}
        found |= {"levels": claim.levels()}
        with replacing(folder / f"{claim.name}.json") as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    draw(claim, found, folder / f"{claim.name}.png")
    return found


def _made(
    claim: Claim, todo: Sequence[tuple[str, int]], jobs: int, advance: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        for variant, seed in todo:
            yield run(claim.name, variant, seed, claim.steps, lambda: advance(1))
        return
    # Not forked: torch's threads do not survive a fork.
    context = get_context("spawn")
    steps = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, initializer=_count_in, initargs=(steps,)) as pool:
        yield from _as_they_come(pool, claim, todo, steps, advance)


def _as_they_come(
    pool: Executor, claim: Claim, todo: Sequence[tuple[str, int]], steps: Any, advance: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    waiting: set[Future[dict[str, Any]]] = {pool.submit(_counted_run, claim.name, *one, claim.steps) for one in todo}
    told = 0
    try:
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            now = steps.value
            advance(now - told)
            told = now
            yield from (future.result() for future in done)
    finally:
        for future in waiting:
            future.cancel()


_steps: Any = None


def _count_in(steps: Any) -> None:
    global _steps
    _steps = steps


def _counted_run(name: str, variant: str, seed: int, steps: int) -> dict[str, Any]:
    def advance() -> None:
        with _steps.get_lock():
            _steps.value += 1

    return run(name, variant, seed, steps, advance)


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t for 1 to 9 degrees of freedom."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by Student's t over the seeds; it is infinite for one seed."""
    mean, freedom = statistics.fmean(values), len(values) - 1
    if freedom == 0:
        return mean, float("-inf"), float("inf")
    if freedom <= len(STUDENT):
        t = STUDENT[freedom - 1]
    else:  # the expansion of Cornish and Fisher, right to 0.01
        z = 1.96
        t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    half = t * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def scores_of(claim: Claim, found: Results, variant: str, score: str = "") -> dict[int, float]:
    """One score, or the claim's metric, of every seed of a variant."""
    runs = [run for run in found["runs"] if run["variant"] == variant]
    return {run["seed"]: run["scores"][score or claim.metric] for run in runs}


def conclusions(claim: Claim, found: Results) -> list[str]:
    """What each comparison says in plain words, also where no effect shows. Pairs are of the same seed."""
    return [_conclusion(claim, found, *pair) for pair in claim.comparisons]


def _conclusion(claim: Claim, found: Results, variant: str, baseline: str) -> str:
    ours, theirs = scores_of(claim, found, variant), scores_of(claim, found, baseline)
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    said = f"{variant} against {baseline}"
    if not pairs:
        return f"{said}: no pair of runs."
    mean, low, high = interval(pairs)
    higher = sum(pair > 0 for pair in pairs)
    said += f": {_signed(mean)}, higher in {higher} of {len(pairs)} seeds"
    if len(pairs) == 1:
        return f"{said}. One seed says nothing of how far seeds differ."
    said += f", 95 % interval {_signed(low)} to {_signed(high)}."
    guess = max(level.get(claim.metric, 0.0) for level in found["levels"].values())
    means = statistics.fmean(ours.values()), statistics.fmean(theirs.values())
    if max(means) <= guess + 0.02:
        return f"{said} Neither has got beyond a good guess ({guess:.2f}): no effect on the task itself shows."
    if low > 0:
        return f"{said} The effect shows."
    if high < 0:
        return f"{said} The opposite shows: {baseline} is better."
    if min(means) > 0.98:
        return f"{said} No effect shows: both have solved the task."
    if higher == len(pairs):
        return f"{said} Better in every seed, but the interval holds 0."
    return f"{said} No effect shows."


Grid = tuple[list[str], list[list[str]]]
"""The head and the rows of a table."""


def tables(claim: Claim, found: Results) -> tuple[Grid, Grid]:
    """The metric of every seed with mean and interval, and the means of the other scores; levels come last."""
    seeds = sorted({run["seed"] for run in found["runs"]})
    others = [name for name in found["runs"][0]["scores"] if name != claim.metric]
    main, rest = [], []
    for variant in claim.variants:
        scores = scores_of(claim, found, variant)
        main.append([variant, *(_number(scores.get(seed)) for seed in seeds), *_summary(claim, found, variant)])
        means = [_mean(scores_of(claim, found, variant, other)) for other in others]
        rest.append([variant, *means])
    for name, level in found["levels"].items():
        main.append([f"level: {name}", *[""] * len(seeds), _number(level.get(claim.metric)), "", ""])
        rest.append([f"level: {name}", *(_number(level.get(other)) for other in others)])
    head = ["variant", *(f"seed {seed}" for seed in seeds), "mean", "95 % interval", "CPU s a run"]
    return (head, main), (["variant", *others], rest)


def _summary(claim: Claim, found: Results, variant: str) -> list[str]:
    scores = scores_of(claim, found, variant)
    if not scores:
        return ["not run", "", ""]
    mean, low, high = interval(list(scores.values()))
    within = f"{max(0, low):.2f} to {min(1, high):.2f}" if len(scores) > 1 else ""
    seconds = statistics.fmean(run["cpu_seconds"] for run in found["runs"] if run["variant"] == variant)
    return [_number(mean), within, f"{seconds:.0f}"]


def _mean(scores: dict[int, float]) -> str:
    return _number(statistics.fmean(scores.values())) if scores else ""


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no minus before 0.00


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def markdown(claim: Claim, found: Results) -> str:
    """The claim as a section of a page, without its heading and picture."""
    main, rest = tables(claim, found)
    where = f"{claim.steps} steps a run, {found['device']}, torch {found['versions']['torch']}, {found['date']}"
    return "\n".join(
        [
            f"{claim.paper}: {claim.says}",
            "",
            f"**Task.** {claim.task}",
            "",
            *(f"- `{name}`: {what}." for name, what in claim.variants.items()),
            "",
            f"`{claim.metric}` by seed ({where}):",
            "",
            *_markdown_table(*main),
            "",
            "Other scores, means over the seeds:",
            "",
            *_markdown_table(*rest),
            "",
            *(f"- {line}" for line in (*conclusions(claim, found), *claim.caveats)),
        ]
    )


def _markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)]


def draw(claim: Claim, found: Results, path: Path) -> Path:
    """The metric over the steps: a thin line for every run, a dotted one for every level; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6))
    axis = figure.subplots()
    for i, variant in enumerate(claim.variants):
        for j, one in enumerate(one for one in found["runs"] if one["variant"] == variant):
            axis.plot(*zip(*one["curve"]), color=f"C{i}", alpha=0.8, linewidth=1.2, label=None if j else variant)
    for (name, level), style in zip(found.get("levels", {}).items(), (":", "--", "-.")):
        if claim.metric in level:
            axis.axhline(level[claim.metric], color="grey", linestyle=style, linewidth=1, label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(claim.metric)
    axis.set_ylim(0, 1.02)
    axis.set_title(f"{claim.name}: every run", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
