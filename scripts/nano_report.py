"""Measure a nano model and write the prose of its card; aki-nano beside its baselines.

    python scripts/nano_report.py --name cca-nano FOLDER --took "..." [--clips 400]
    python scripts/nano_report.py AKI_NANO UNCOMPRESSED BLIND --took "..." [--clips 400]

A folder is the export of `mmzoo fit --config cca-nano --export FOLDER`; the three of aki-nano are exports of

    mmzoo fit --config aki-nano --export AKI_NANO
    mmzoo fit --config aki-nano --export UNCOMPRESSED \\
        --model.init_args.config '{connector: linear, num_vision_tokens: 16}' \\
        --model.init_args.answer_steps 5000 --trainer.max_steps 8500
    mmzoo fit --config aki-nano --export BLIND --model.init_args.blind true --model.init_args.describe_steps 0 \\
        --model.init_args.answer_steps 1500 --trainer.max_steps 1500
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import mmzoo
from mmzoo.files import replacing
from mmzoo.language import MultimodalLM
from mmzoo.media import read_video
from mmzoo.world import Clip, write_clip
from mmzoo_eval.world import PROTOCOL, clips_of, evaluate, levels, markdown, report

CARDS = Path(__file__).parent.parent / "mmzoo" / "assets" / "cards"
MADE_OF = {
    "aki-nano": "SigLIP at 32 pixels, 6 resampled tokens a frame, 8 frames, Phi-3 with 3 layers",
    "cca-nano": "CLIP at 32 pixels, 4 x 4 tokens a frame, 8 frames as images, LLaMA with 3 layers",
    "tc-llava-nano": "CLIP at 32 pixels, 4 x 4 patches pooled to 2 x 2 tokens a frame, clips of 8 frames, LLaMA with\n"
    "3 layers",
    "visualchat-nano": "Qwen-VL's ViT at 32 pixels, 2 x 2 queries a frame, 8 frames as images, LLaMA with 3 layers",
    "video-ccam-nano": "SigLIP at 32 pixels, 48 tokens for a whole clip of 8 frames, Phi-3 with 3 layers",
}
PROSE = """\
Trained by `mmzoo fit --config {name}` (seed 0; clips made on the fly; {minutes})
and shipped with the package. It answers short questions about clips of coloured shapes in the words of the synthetic
world; about anything else it knows nothing. {parameters:,} parameters: {made_of}.

## What it can do

{protocol}, {clips} clips of the test split, percent with 95 % intervals. The *blind level* is the best guess of one who
knows which objects exist but not what is asked. *Reversed, right answers*: the clips played backwards, with the answers
that are then right. *Reversed, old answers* is the control for temporal questions: who sees time fails it.
*Unseen*: clips with combinations of colour and shape that training never shows.

{table}

Written as H.264 files at 128 pixels and read back through the video reader ({file_clips} clips): {files}.

What it cannot do: {weak}
"""
BESIDE = """
## What the connector costs, and what it is worth to see

*Uncompressed*: the same recipe with one token a patch (16 instead of 6 tokens a frame, no resampler) and 5,000 instead
of 7,000 steps of questions. Its tokens are not told where things are in the first stage, which the resampled ones are;
that may be why it does not learn directions. *Text only*: the pixels hidden, 1,500 steps. One seed each, so small
differences mean nothing.

{beside}
"""


def hide_pixels(model: torch.nn.Module) -> None:
    """The text-only baseline sees mid grey, as it did in training."""
    model.vision_encoder.register_forward_pre_hook(lambda _, pixels: (torch.zeros_like(pixels[0]),))


def through_files(clips: list[Clip]) -> list[Clip]:
    """The clips written as H.264 files and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        read = []
        for clip in clips:
            write_clip(clip, path)
            read.append(replace(clip, frames=read_video(path, sampling="all").frames))
        return read


def measured(model: MultimodalLM, name: str, clips: int, took: str) -> tuple[str, dict[str, dict[str, object]]]:
    """The prose of a card, and its table."""
    table, test = report(model, clips, show=True), clips_of("test", clips)
    files = through_files(test[: clips // 4])
    read_back = evaluate(model, files, show=True)
    prose = PROSE.format(
        name=name,
        minutes=took,
        made_of=MADE_OF[name],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        protocol=PROTOCOL,
        clips=clips,
        table=markdown(table),
        file_clips=len(files),
        files=", ".join(f"{kind} {accuracy}" for kind, accuracy in read_back.items()),
        weak=weaknesses(table),
    )
    return prose, table


def weaknesses(table: dict[str, dict[str, object]]) -> str:
    """What the table shows to be beyond the model."""
    near = [kind for kind, row in table.items() if row["test"].value - row["test"].margin < row["blind"] + 0.1]
    far = [kind for kind, row in table.items() if row["test"].value < 0.8 and kind not in near]
    worse = [kind for kind, row in table.items() if row["unseen"].value < row["blind"]]
    said = []
    if near:
        said.append(f"not clearly above the blind level: {', '.join(near)}.")
    if far:
        said.append(f"often wrong: {', '.join(far)}.")
    if worse:
        said.append(
            "Combinations of colour and shape that it never saw in training: it takes their absence for a\n"
            f"rule of the world, and is worse than blind on them in {', '.join(worse)}."
        )
    return " ".join(said) or "nothing of what this table asks."


def beside(ours: dict[str, dict[str, object]], uncompressed: MultimodalLM, blind: MultimodalLM, clips: int) -> str:
    """aki-nano's table of baselines."""
    hide_pixels(blind)
    test = clips_of("test", clips)
    rows = {kind: {"chance": chance, "blind level": level} for kind, (chance, level) in levels(test).items()}
    for name, model in (("text only, trained", blind), ("uncompressed", uncompressed)):
        for kind, accuracy in evaluate(model, test, show=True).items():
            rows[kind][name] = accuracy
    for kind, row in ours.items():
        rows[kind]["aki-nano"] = row["test"]
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--name", choices=MADE_OF, default="aki-nano")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--took", required=True, help="what training took, in words")
    options = parser.parse_args()
    if len(options.folders) != (3 if options.name == "aki-nano" else 1):
        parser.error("aki-nano takes three folders, the others one.")
    torch.set_num_threads(1)
    model, *others = (mmzoo.load(folder) for folder in options.folders)
    prose, table = measured(model, options.name, options.clips, options.took)
    if others:
        prose += BESIDE.format(beside=beside(table, *others, options.clips))
    with replacing(CARDS / f"{options.name}.md") as temporary:
        temporary.write_text(prose)
    print(prose)


if __name__ == "__main__":
    main()
