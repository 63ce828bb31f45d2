"""The command `mmzoo`: thin, and each command imports the rooms it needs when asked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import mmzoo
from mmzoo.errors import InputError, MissingExtra, MmzooError
from mmzoo.files import check_png
from mmzoo.registry import tasks
from mmzoo_eval.cli import app as eval_app

if TYPE_CHECKING:
    import torch

    from mmzoo.asking import Answer
    from mmzoo.language import MultimodalLM
    from mmzoo_training.claims import Claim

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Video and vision-language models whose attention is not plain causal.",
)
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)

OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="folder for the pictures")]


def _table(*heads: str, **options: Any) -> Table:
    """A table that breaks names and paths that are wider than their column, instead of cutting them."""
    return Table(*(Column(head, overflow="fold") for head in heads), **options)


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="with * and ?")] = "*",
    task: Annotated[str | None, typer.Option(help=f"only models for this task: {', '.join(tasks())}")] = None,
    pretrained: Annotated[bool | None, typer.Option(help="only models with, or without, weights")] = None,
) -> None:
    """The models of the zoo."""
    from mmzoo.registry import entry

    table = _table("name", "mask", "positions", "weights", "licence", "summary")
    table.columns[0].no_wrap = True
    for name in mmzoo.list_models(pattern, task=task, pretrained=pretrained):
        found = entry(name)
        rule = " + ".join(filter(None, (found.rule, found.connector_rule)))
        table.add_row(name, rule, found.scheme, found.weights or "-", found.license or "-", found.summary)
    console.print(table)


@app.command()
def info(name: Annotated[str, typer.Argument(help="a registered name")]) -> None:
    """One model: what it is, its mask, where its weights are."""
    from mmzoo.registry import entry

    found = entry(name)
    for label in ("name", "summary", "task", "paper", "weights", "license", "scheme"):
        console.print(f"{label:9} {getattr(found, label) or '-'}")
    model = mmzoo.create(name, device="meta")
    console.print(f"{'size':9} {sum(p.numel() for p in model.parameters()):,} parameters")
    for where, rules in found.rules.items():
        console.print(f"The {where}:")
        for one in rules:
            console.print(repr(one))


@app.command()
def ask(
    name: Annotated[str, typer.Argument(help="a registered name, hf-hub:org/name, or a folder")],
    question: Annotated[str, typer.Argument(help="the question")],
    video: Annotated[Path | None, typer.Option(help="a video file, or a folder of frames")] = None,
    image: Annotated[Path | None, typer.Option(help="an image file")] = None,
    attention: Annotated[str, typer.Option(help="sdpa or eager")] = "sdpa",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    output: OutputFolder = Path("ask_output"),
) -> None:
    """Ask a model about a video or an image."""
    if (video is None) == (image is None):
        raise InputError("Give one of --video and --image.")
    model = _load_answering(name, attention=attention, device=device)
    answer = model.ask(video or image, question)
    _print_answers([(question, answer, None)])
    _draw(model, answer, output)


@app.command()
def attend(
    name: Annotated[str, typer.Argument(help="a registered name, hf-hub:org/name, or a folder")],
    question: Annotated[str, typer.Argument(help="the question")],
    video: Annotated[Path | None, typer.Option(help="a video file, or a folder of frames")] = None,
    image: Annotated[Path | None, typer.Option(help="an image file")] = None,
    layer: Annotated[int | None, typer.Option(help="one layer; the mean over all if left out")] = None,
    head: Annotated[int | None, typer.Option(help="one head; the mean over all if left out")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    output: Annotated[Path, typer.Option("--output", "-o", help="the PNG")] = Path("attend.png"),
) -> None:
    """Draw which frames and patches an answer looked at."""
    if (video is None) == (image is None):
        raise InputError("Give one of --video and --image.")
    check_png(output)  # before the work
    maps = _load_answering(name, device=device).attend(video or image, question)
    _print_answers([(question, maps.answer, None)])
    shares = {kind: float(share.mean(0).mean(0)[0]) for kind, share in maps.by_class().items()}
    whole = sum(shares.values())  # 2 where two softmaxes are added
    console.print("looked at " + ", ".join(f"{kind} {100 * share / whole:.0f} %" for kind, share in shares.items()))
    console.print(f"drawn in {maps.draw(output, layer=layer, head=head)}")


@app.command()
def mask(
    rule: Annotated[str, typer.Argument(help="a mask's name; `mmzoo mask list` names them")],
    layout: Annotated[
        str, typer.Option(help="spans such as text:4, image:3x3, video:3x2x2 (frames first), answer:3")
    ] = "text:3 video:3x2x2 text:4 answer:3",
    output: Annotated[Path, typer.Option("--output", "-o", help="the PNG")] = Path("mask.png"),
) -> None:
    """Print a rule and draw its mask over a layout."""
    from mmzoo import masks
    from mmzoo.attention import draw
    from mmzoo.attention.drawing import EXAMPLE_OPTIONS, check_drawable
    from mmzoo.layout import lay_out

    if rule == "list":
        console.print("\n".join(masks.RULES))
        return
    found = masks.rule(rule, **EXAMPLE_OPTIONS.get(rule, {}))
    spans = [_span(word) for word in layout.split()]
    num_tokens = sum(span.frames * span.rows * span.columns for span in spans)
    if num_tokens == 0:
        raise InputError(f"The layout {layout!r} has no tokens. {_SPANS}")
    check_drawable(num_tokens)
    for one in found if isinstance(found, tuple) else (found,):
        console.print(repr(one))
    console.print(f"drawn in {draw(found, lay_out(*spans), output)}")


_SPANS = "Write spans such as text:4, answer:3, image:3x3 or video:3x2x2 (frames first), with spaces between them."


def _span(word: str) -> Any:
    from mmzoo import layout as spans

    kind, _, size = word.partition(":")
    makers: dict[str, Callable[..., Any]] = {
        "text": spans.text,
        "answer": lambda n: spans.text(n, spans.Role.ANSWER),
        "image": spans.image,
        "video": spans.video,
    }
    try:
        return makers[kind](*map(int, size.split("x")))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"Cannot read the span {word!r}. {_SPANS}") from error


@app.command()
def doctor() -> None:
    """Versions, devices, and which backend runs which rule on this machine, and why not."""
    import torch

    from mmzoo.attention.verdicts import BACKENDS, EXAMPLES, cell, device_name, reasons, versions

    console.print(f"mmzoo {mmzoo.__version__}, python {sys.version.split()[0]}")
    console.print(", ".join(f"{package} {version}" for package, version in versions().items()))
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        table = _table("rule", *BACKENDS, title=f"{device}: {device_name(device)}")
        with console.status(f"running every rule on every backend on {device}"):
            for rule in EXAMPLES:
                table.add_row(rule, *(cell(rule, attention, device) for attention in BACKENDS))
            refused = reasons(device)
        console.print(table)
        console.print("\n".join(f"refused on {device}: {one}" for one in refused), soft_wrap=True)


@app.command()
def demo(output: OutputFolder = Path("demo_output")) -> None:
    """Let the small model that ships with mmzoo answer questions about a small video that ships with it."""
    clips = resources.files("mmzoo") / "assets" / "demo"
    model = _load("aki-nano")
    for clip in json.loads((clips / "questions.json").read_text()):
        path = Path(str(clips / clip["video"]))
        console.print(f"\n[bold]{clip['video']}[/]: {clip['shows']}")
        rows = [(question, model.ask(path, question), right) for question, right in clip["questions"]]
        _print_answers(rows)
        _draw(model, rows[0][1], output, path.stem)


@app.command()
def generate(
    name: Annotated[str, typer.Argument(help="a registered generator, hf-hub:org/name, or a folder")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the clip: .mp4, .mov or .mkv")] = Path("made.mp4"),
    num_frames: Annotated[int, typer.Option("--frames", help="frames in all, those that are given included")] = 64,
    prompt: Annotated[list[str] | None, typer.Option(help="what is to be seen; may be repeated, with --switch")] = None,
    switch: Annotated[list[float] | None, typer.Option(help="seconds at which the next prompt begins")] = None,
    image: Annotated[Path | None, typer.Option(help="a picture to go on from")] = None,
    video: Annotated[Path | None, typer.Option(help="a clip to go on from, whole")] = None,
    seed: Annotated[int, typer.Option(help="of all noise")] = 0,
    steps: Annotated[int | None, typer.Option(help="denoising steps; the family's own if left out")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a clip of this name")] = False,
) -> None:
    """Make a clip. After an interrupt the same command goes on where it was; made.growing.mp4 shows what is there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmzoo.generating import check_output
    from mmzoo.generating import generate as make
    from mmzoo.generation import Generator

    if out.exists() and any(given is not None and given.exists() and out.samefile(given) for given in (image, video)):
        raise InputError(f"{out} is what the clip would go on from. Take another name.")
    check_output(out, overwrite)
    precision, given = named_dtype(dtype), _given_frames(image, video)
    model = _load(name, device=device, dtype=precision)
    if not isinstance(model, Generator):
        raise InputError(f"{name} answers questions; `mmzoo list --task text-to-video` shows models that make clips.")
    wanted = {"seed": seed, "steps": steps, "given": given, **_prompts(prompt or [], switch or [], model.fps)}
    options = {option: value for option, value in wanted.items() if value is not None}
    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
    )
    progress = Progress(*parts, console=console, speed_estimate_period=300)
    task = progress.add_task("generating", total=num_frames)

    def advance(done: int, _: int) -> None:
        progress.start()  # not before a clip is begun: options are refused without a bar
        progress.update(task, completed=done)

    try:
        path = make(model, out, num_frames, overwrite=overwrite, advance=advance, **options)
    finally:
        progress.stop()
    console.print(f"written: {path}", soft_wrap=True)


def _given_frames(image: Path | None, video: Path | None) -> Any:
    """The frames, uint8 [F, H, W, 3], that a clip goes on from."""
    import numpy as np

    from mmzoo.media import read_image, read_video

    if image is not None and video is not None:
        raise InputError("Give --image or --video, not both.")
    if image is not None:
        return np.array(read_image(image))[None]
    return read_video(video, sampling="all").frames if video is not None else None


def _prompts(prompts: list[str], seconds: list[float], fps: float) -> dict[str, Any]:
    """One prompt, or several with the frames at which each after the first begins."""
    if len(seconds) != max(0, len(prompts) - 1) or not all(map(math.isfinite, seconds)):
        raise InputError(f"Each --prompt after the first needs one --switch, in seconds: {len(prompts)} and {seconds}.")
    if len(prompts) > 1:
        return {"prompt": prompts, "switches": [round(second * fps) for second in seconds]}
    return {"prompt": prompts[0]} if prompts else {}


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="a registered name, a folder, or hf-hub:org/name")],
    repo: Annotated[str, typer.Argument(help="org/name")],
    private: Annotated[bool | None, typer.Option(help="whether a new repository is private")] = None,
    revision: Annotated[str | None, typer.Option(help="a branch, made if it does not exist")] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="the LoRA adapter alone; MODEL is its folder")] = False,
    base: Annotated[str | None, typer.Option(help="hf-hub:org/name of an adapter's base model")] = None,
    license: Annotated[str | None, typer.Option(help="of the weights, as the Hub names it")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="what it was trained on; may be repeated")] = None,
    eval_results: Annotated[list[Path] | None, typer.Option(help="a file of scores; may be repeated")] = None,
    dry_run: Annotated[Path | None, typer.Option(help="write what would be uploaded there, and send nothing")] = None,
) -> None:
    """Put a model on the Hub, with digests, a card and its scores. Log in first: hf auth login."""
    with console.status(f"pushing {model}"):
        where = mmzoo.push(
            model,
            repo,
            private=private,
            revision=revision,
            message=message,
            adapter=adapter,
            base=base,
            license=license,
            datasets=dataset or (),
            eval_results=eval_results or (),
            dry_run=dry_run,
        )
    console.print(f"written to {where}" if dry_run else f"pushed: {where}", soft_wrap=True)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a folder, hf-hub:org/name, or a registered name")],
    folder: Annotated[Path, typer.Argument(help="where to write")],
    name: Annotated[
        str | None, typer.Option(help="the registered model that it is, where its files fit several")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own")] = None,
    verify: Annotated[bool, typer.Option(help="check the digests of a checkpoint that holds some")] = True,
) -> None:
    """Write a checkpoint of any layout that mmzoo reads in its own, with digests and a card."""
    from mmzoo import hub

    precision = named_dtype(dtype)
    with console.status(f"converting {source}"):
        where = hub.convert(source, folder, name, dtype=precision, verify=verify)
    console.print(f"written to {where}", soft_wrap=True)


app.add_typer(eval_app, name="eval")

data_app = typer.Typer(no_args_is_help=True, help="Training data of one's own.")
app.add_typer(data_app, name="data")


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="a .json, .jsonl or .tar file, or a folder")],
    format: Annotated[str | None, typer.Option(help="llava, swift, chat or webdataset; told by the content")] = None,
    media: Annotated[Path | None, typer.Option(help="the folder that paths of media start from")] = None,
    read_media: Annotated[bool, typer.Option(help="also open every image and video")] = False,
) -> None:
    """Say what is wrong with training data: file, line and field of every problem. Exit code 1 if there is one."""
    from mmzoo_training.records import load_records, unreadable

    records, problems = load_records([(path, format, media)])
    bad = [unreadable(record) for record in records] if read_media else []
    problems += [problem for found in bad for problem in found]
    if problems:
        table = _table("file", "line", "field", "problem")
        for problem in problems:
            table.add_row(*(escape(str(part)) for part in problem))
        console.print(table)
    usable = len(records) - sum(map(bool, bad))
    images, videos = (sum(len(getattr(record, kind)) for record in records) for kind in ("images", "videos"))
    console.print(f"{usable} usable records, {images} images, {videos} videos; {len(problems)} problems")
    if problems or not records:
        raise typer.Exit(1)


@app.command()
def reproduce(
    claim: Annotated[
        str, typer.Argument(help="ccam, causal-qformer, frame-block, cca, mma, causal-video, or all")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="runs of each variant")] = 3,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="folder for results and curves; an interrupted command goes on there")
    ] = Path("reproduced"),
    jobs: Annotated[int, typer.Option(help="processes; each run has one thread")] = 2,
) -> None:
    """Rerun the papers' claims at nano scale: every variant and seed, beside its controls."""
    from mmzoo_training.reproduce import claims

    for one in claims(claim):
        _reproduce(one, seeds, output, jobs)


def _reproduce(claim: Claim, seeds: int, folder: Path, jobs: int) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mmzoo_training import reproduce as rerun

    parts = TextColumn(claim.name), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
    left = rerun.missing(claim, seeds, rerun.results(claim, folder))
    with Progress(*parts, console=console, speed_estimate_period=300) as progress:
        task = progress.add_task(claim.name, total=claim.steps * len(left))
        found = rerun.reproduce(claim, seeds, folder, jobs, lambda done: progress.advance(task, done))
    titles = f"{claim.name} ({claim.paper}): {claim.metric}", "other scores, means over the seeds"
    for title, (head, body) in zip(titles, rerun.tables(claim, found), strict=True):
        table = _table(*head, title=title)
        for row in body:
            table.add_row(*row)
        console.print(table)
    for line in (*rerun.conclusions(claim, found), *claim.caveats):
        console.print(f"- {escape(line)}")
    files = " and ".join(str(folder / f"{claim.name}.{kind}") for kind in ("json", "png"))
    console.print(f"results and curves: {files}\n", soft_wrap=True)


_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def fit(context: typer.Context) -> None:
    """Train: `mmzoo fit --config aki-nano`, or a YAML file; options as LightningCLI's (`mmzoo fit --help`)."""
    _lightning("fit", context)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def validate(context: typer.Context) -> None:
    """Validate a configuration's model; options as LightningCLI's."""
    _lightning("validate", context)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def test(context: typer.Context) -> None:
    """Test a configuration's model; options as LightningCLI's."""
    _lightning("test", context)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def predict(context: typer.Context) -> None:
    """Let a configuration's model answer its data's questions, into a file; options as LightningCLI's."""
    _lightning("predict", context)


def _lightning(subcommand: str, context: typer.Context) -> None:
    try:
        from mmzoo_training.cli import main as lightning_main
    except ImportError as error:
        raise MissingExtra("lightning", "train", f"mmzoo {subcommand}") from error
    lightning_main([subcommand, *context.args])


def _load(name: str, **options: Any) -> MultimodalLM:
    from transformers.utils import logging

    logging.disable_progress_bar()
    with console.status(f"loading {name}"):
        return mmzoo.load(name, **options)


def named_dtype(name: str | None) -> torch.dtype | None:
    """What --dtype names, if anything. Raises InputError for another name."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in dtypes:
        raise InputError(f"--dtype is {', '.join(dtypes)}, not {name!r}.")
    return dtypes[name] if name else None


def _load_answering(name: str, **options: Any) -> MultimodalLM:
    """The model. Raises InputError if it is a generator."""
    from mmzoo.language import MultimodalLM

    model = _load(name, **options)
    if not isinstance(model, MultimodalLM):
        raise InputError(
            f"{name} generates and answers no questions; `mmzoo generate` runs such models, and "
            "`mmzoo list --task video-text-to-text` shows those that answer."
        )
    return model


def _print_answers(rows: list[tuple[str, Answer, str | None]]) -> None:
    with_truth = any(right is not None for _, _, right in rows)
    table = _table("question", "answer", *(["right answer"] if with_truth else []), "confidence")
    for question, answer, right in rows:
        truth = [] if not with_truth else [f"[{'green' if answer.text == right else 'red'}]{right}[/]"]
        table.add_row(escape(question), escape(answer.text), *truth, f"{answer.confidence:.2f}")
    console.print(table)
    video = rows[0][1].video
    if video is not None:
        console.print(f"read {escape(str(video))}", soft_wrap=True)


def _draw(model: MultimodalLM, answer: Answer, folder: Path, stem: str = "") -> None:
    from mmzoo.attention import draw
    from mmzoo.attention.drawing import MAX_DRAWN
    from mmzoo.media.sheet import contact_sheet

    prefix = f"{stem}_" if stem else ""
    if answer.video is not None:
        console.print(f"frames:  {contact_sheet(answer.video, folder / f'{prefix}frames.png')}")
    if len(answer.layout) > MAX_DRAWN:
        console.print(f"mask:    not drawn: {len(answer.layout):,} tokens, more than {MAX_DRAWN:,}")
    else:
        console.print(f"mask:    {draw(model.rule, answer.layout, folder / f'{prefix}mask.png')}")


def main() -> None:
    """Run the command; an error of mmzoo is printed without its traceback."""
    try:
        app()
    except MmzooError as error:
        said = f"[bold red]{type(error).__name__}:[/] {escape(str(error))}"
        Console(stderr=True, highlight=False).print(said, soft_wrap=True)
        sys.exit(1)
