"""The command `mmzoo eval`: list, run, score, compare."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmzoo.errors import InputError
from mmzoo.files import replacing

if TYPE_CHECKING:
    from mmzoo_eval.benchmark import Benchmark, Item, Protocol
    from mmzoo_eval.runner import Run

app = typer.Typer(no_args_is_help=True, help="Benchmarks, each score with its protocol.")
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)

Data = Annotated[Path | None, typer.Option(help="the annotations as published: a file or folder")]
ProtocolName = Annotated[
    str | None, typer.Option("--protocol", help="`mmzoo eval list` names them; the first is default")
]


JudgeName = Annotated[
    str | None, typer.Option("--judge", help="package.module:function, messages -> reply, for the protocols of a judge")
]


@app.command("list")
def list_command() -> None:
    """The benchmarks and their protocols; the first protocol is the default."""
    from mmzoo_eval.benchmarks import MODULES, benchmark
    from mmzoo_eval.file_scorers import FILE_SCORERS

    table = Table("benchmark", "shows", "protocols", "data")
    for name in MODULES:
        found = benchmark(name)
        with_judge = list(found.judged_by(lambda messages: "", "a judge")) if found.judged_by else []
        table.add_row(name, found.media, escape(", ".join([*found.protocols, *with_judge])), escape(found.data))
    console.print(table)
    table = Table("scores files", "protocols", "files")
    for name, scorer in FILE_SCORERS.items():
        told = "; ".join(f"{file}: {what}" for file, what in scorer.files.items())
        table.add_row(name, ", ".join(scorer.protocols), escape(told))
    console.print(table)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="a registered name, hf-hub:org/name, or a folder")],
    benchmark: Annotated[str, typer.Argument(help="a name of `mmzoo eval list`")],
    data: Data = None,
    media: Annotated[
        Path | None, typer.Option(help="the folder of videos or pictures; beside the data by default")
    ] = None,
    protocol: ProtocolName = None,
    judge: JudgeName = None,
    answers: Annotated[
        str, typer.Option(help="text: what the model writes; letters, options: the likeliest letter or option")
    ] = "text",
    frames: Annotated[int | None, typer.Option(help="frames of a video, in place of the protocol's number")] = None,
    batch_size: Annotated[int, typer.Option(help="items of a batch")] = 1,
    limit: Annotated[int | None, typer.Option(help="only the first items")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder of the results; an interrupted run goes on there")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: the i-th of n processes, from 0; torchrun's by default")
    ] = None,
    report: Annotated[int, typer.Option(help="items on the HTML page; 0 for none")] = 100,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own")] = None,
    attention: Annotated[str, typer.Option(help="the attention backend")] = "sdpa",
) -> None:
    """Ask a model everything of a benchmark; the score names its protocol."""
    import mmzoo
    from mmzoo.cli import named_dtype  # which imports this module
    from mmzoo.language import MultimodalLM
    from mmzoo_eval.asking import Media
    from mmzoo_eval.benchmarks import benchmark as find
    from mmzoo_eval.runner import Run

    folder = output or Path("evaluated") / f"{Path(model).name}-{benchmark}"
    found = _with_judge(find(benchmark), judge, folder / "judged.jsonl")
    chosen = _protocol(found, protocol, answers, frames)
    items = _items(found, data)[:limit]
    number, shards = _shard(shard)
    precision = named_dtype(dtype)
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's own way to say which device is whose
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with console.status(f"loading {model}"):
        loaded = mmzoo.load(model, device=device, dtype=precision, attention=attention)
    if not isinstance(loaded, MultimodalLM):
        raise InputError(f"{model} makes clips or pictures and answers no questions; `mmzoo list` shows which do.")
    shown = Media(found, media or (data if data and data.is_dir() else (data or Path(".")).parent), chosen.frames)
    plan = Run(loaded, found, chosen, items, shown, folder, batch_size, number, shards)
    described = {"model": model, "benchmark": benchmark, "protocol": chosen.name, "frames": frames, "limit": limit}
    _claim(folder, described | {"data": data and str(data)})
    _run(plan, report)


def _with_judge(found: Benchmark, name: str | None, replies: Path) -> Benchmark:
    """The benchmark with the protocols of a judge, whose replies are kept in a file, in place of its own."""
    from mmzoo_eval.judges import RecordedJudge, find_judge

    if name is None:
        return found
    if found.judged_by is None:
        raise InputError(f"{found.title} has no protocol of a judge.")
    return replace(found, protocols=found.judged_by(RecordedJudge(find_judge(name), replies), name))


def _protocol(found: Benchmark, name: str | None, answers: str, frames: int | None) -> Protocol:
    from mmzoo_eval.asking import by_likelihood

    if answers not in ("text", "letters", "options"):
        raise InputError(f"--answers is text, letters or options, not {answers!r}.")
    protocol = found.protocol(name)
    if frames:
        protocol = replace(protocol, frames=replace(protocol.frames, num_frames=frames))
    return protocol if answers == "text" else by_likelihood(protocol, answers)


def _items(found: Benchmark, data: Path | None) -> list[Item]:
    if data is None and found.make is None:
        raise InputError(f"{found.title} needs its annotations. Give --data. {found.data}")
    return found.read(data or Path("."))


def _shard(given: str | None) -> tuple[int, int]:
    if given is None:  # torchrun tells its processes so
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        number, shards = map(int, given.split("/"))
    except ValueError as error:
        raise InputError(f"--shard is like 0/4, the first of four; not {given!r}.") from error
    return number, shards


def _claim(folder: Path, described: dict[str, Any]) -> None:
    """Says in the folder whose results it holds. Raises InputError if these are another run's."""
    path = folder / "run.json"
    if path.is_file() and (before := json.loads(path.read_text())) != described:
        changed = ", ".join(
            f"{name} was {before.get(name)!r}" for name in described if before.get(name) != described[name]
        )
        raise InputError(f"{folder} holds the results of another run: {changed}. Take another --output.")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(described) + "\n")


def _run(plan: Run, report: int) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmzoo_eval.report import write
    from mmzoo_eval.runner import run

    counts: dict[str, int] = {}
    parts = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*parts, console=console, speed_estimate_period=300) as progress:
        task = progress.add_task("answering")

        def advance(done: int, total: int, state: str) -> None:
            if state:
                counts[state] = counts.get(state, 0) + 1
            told = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "answered")
            progress.update(task, completed=done, total=total, description=f"answering {told}".strip())

        found = run(plan, advance)
    if found is None:
        console.print(f"This shard is done; other shards have items left. Responses are in {plan.folder}.")
        return
    _print_scores(f"{found['label']}: {found['text']}", found["scores"])
    told = [str(plan.folder / name) for name in ("results.jsonl", "scores.json")]
    if report:
        with console.status("writing the report"):
            told.append(str(write(plan, plan.folder / "report.html", report)))
    console.print(escape(f"written: {', '.join(told)}"), soft_wrap=True)


def _print_scores(text: str, metrics: dict[str, dict[str, float]]) -> None:
    table = Table("metric", "value", "95 % interval")
    for name, one in metrics.items():
        table.add_row(name, f"{one['value']:.4g}", f"{one['low']:.4g} to {one['high']:.4g}")
    console.print(table)
    console.print(f"[bold]{escape(text)}[/]", soft_wrap=True)


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(help="a name of `mmzoo eval list`")],
    files: Annotated[
        list[Path],
        typer.Argument(help="lines of JSON with id and response, such as a results.jsonl; or what is listed"),
    ],
    data: Data = None,
    protocol: ProtocolName = None,
    judge: JudgeName = None,
) -> None:
    """Judge responses that are there already, by any protocol of a benchmark; or score files of predictions."""
    from mmzoo_eval.benchmarks import benchmark as find
    from mmzoo_eval.file_scorers import FILE_SCORERS

    if benchmark in FILE_SCORERS:
        scorer = FILE_SCORERS[benchmark]
        table = Table("metric", "value")
        for name, value in scorer.score(files, protocol).items():
            table.add_row(name, f"{value:.6g}")
        console.print(table)
        console.print(f"{scorer.title} ({protocol or scorer.protocols[0]})")
        return
    if len(files) != 1:
        raise InputError(f"Give one file of responses, not {len(files)}.")
    _score(_with_judge(find(benchmark), judge, files[0].with_suffix(".judged.jsonl")), files[0], data, protocol)


def _score(found: Benchmark, predictions: Path, data: Path | None, protocol: str | None) -> None:
    from mmzoo_eval.benchmark import judged
    from mmzoo_eval.scoring import read_results, scored

    chosen, items = found.protocol(protocol), {item.id: item for item in _items(found, data)}
    said = read_results(predictions)
    unknown = sorted(said.keys() - items.keys())
    if unknown:
        raise InputError(f"{predictions} answers items that {found.title} does not have: {', '.join(unknown[:3])}.")
    answered = {name: row["response"] for name, row in said.items() if row["response"] is not None}
    rows = [judged(items[name], response, chosen) for name, response in answered.items()]
    result = scored(found, chosen, rows)
    _print_scores(f"{found.title} ({chosen.name}): {result['text']}", result["scores"])
    if len(rows) < len(items):
        console.print(f"{len(items) - len(rows)} of {len(items)} items have no response and were left out.")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="folder of a run, or its results.jsonl")],
    second: Annotated[Path, typer.Argument(help="another run of the same items")],
) -> None:
    """Compare two runs item by item."""
    from mmzoo_eval.scoring import read_results
    from mmzoo_eval.statistics import paired

    one, other = (read_results(path) for path in (first, second))
    shared = [name for name in one if name in other and None not in (one[name]["score"], other[name]["score"])]
    left_out = len(one.keys() | other.keys()) - len(shared)
    scores = ([run[name]["score"] for name in shared] for run in (one, other))
    found = paired(*scores, [one[name].get("cluster") or name for name in shared])
    sure = f"95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f}, p = {found.p:.3g}"
    if found.clusters == 1:
        sure = "no interval, as all items share one cluster, such as a video"
    elif found.clusters == found.n:
        sure += " (paired t-test)"
    else:
        sure += f" (by the standard error clustered over {found.clusters} clusters, such as videos)"
    told = (
        f"{first} is {100 * found.difference:+.1f} points against {second} on {found.n} items: {sure}. Better on "
        f"{found.better} items, worse on {found.worse}. {left_out} items were scored in one run only, or in none, and "
        "left out."
    )
    console.print(escape(told), soft_wrap=True)
