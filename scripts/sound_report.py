"""Measure favor-nano and write the prose of its card: per kind of question, with both streams and with one alone.

    python scripts/sound_report.py FOLDER [FOLDER ...] --took "..." --said "..." [--clips 300]

The folders are exports of `mmzoo fit --config favor-nano --seed_everything N --export FOLDER`: the first, of seed 0, is
the one that ships; those of seeds 1, 2 ... say how much of its numbers is luck.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

import mmzoo
from mmzoo.files import replacing
from mmzoo.language import MultimodalLM
from mmzoo.world_sound import NEEDS, SOUND_KINDS, make_sound_clip, prior_accuracy, write_sound_clip
from mmzoo_training.world_sound import STREAMS, SoundBatches, SoundData, SoundQuestions

CARD = Path(__file__).parent.parent / "mmzoo" / "assets" / "cards" / "favor-nano.md"
PROSE = """\
Trained by `mmzoo fit --config favor-nano` (seed 0; clips made on the fly; {took})
and shipped with the package. It answers short questions about clips of coloured shapes and the tones that come with
them, in the words of the synthetic world with sound; about anything else it knows nothing. {parameters:,} parameters:
InstructBLIP's tower at 32 pixels, Whisper's encoder at 10 steps a second, a causal Q-Former with windows of 8 frames
and of one, LLaMA with 3 layers. Its frames look back (`direction="past"`), as the paper has it; the connector's mask
above is that of the authors' code.

## What it can do

{clips} clips of the test split, exact word, percent with 95 % intervals. *Prior*: the most frequent answer. The same
model is asked with both streams, with the video alone (no sound track) and with the sound alone (no frames); in
training one batch in ten was silent and one in ten dark, so it knows both cases.

{table}

False sounds come when true ones could, so neither their moments nor their number tell *together* or *contact*. Of
*colour of sound* sight alone knows who may be meant, and of *sound of colour* sound alone knows which there are.

The same recipe under other seeds: the mean over the kinds of question that need both streams, and each kind with both.

{seeds}

{said}

Written as H.264 films with an AAC sound track at 128 pixels and read back by `ask` ({file_questions} questions):
{files} right.
{weak}"""


def measured(model: MultimodalLM, clips: int) -> dict[str, dict[str, list[bool]]]:
    """Stream -> kind -> whether each question was answered right."""
    module = SoundQuestions("favor-nano")
    module.model = model.eval()
    batches = SoundBatches(model.processor, SoundData(batch_size=20), "test", clips)
    found: dict[str, dict[str, list[bool]]] = {stream: {} for stream in STREAMS}
    for batch in batches:
        for stream in STREAMS:
            module.streams = stream
            for kind, right in zip(batch["kinds"], module.answers(batch)[1].tolist(), strict=True):
                found[stream].setdefault(kind, []).append(right)
    return found


def shown(right: list[bool]) -> str:
    share = sum(right) / len(right)
    return f"{100 * share:.1f} ± {196 * math.sqrt(share * (1 - share) / len(right)):.1f}"


def through_files(model: MultimodalLM, clips: int) -> list[bool]:
    right = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for seed in range(clips):
            clip = make_sound_clip(seed, split="test")
            write_sound_clip(clip, path)
            film = model.processor.read_video(path)
            for question in clip.questions:
                right.append(model.ask(film, question.text, max_new_tokens=3).text == question.answer)
    return right


def mean_of_both(found: dict[str, list[bool]]) -> float:
    kinds = [kind for kind in found if NEEDS[kind] == "both"]
    return sum(sum(found[kind]) / len(found[kind]) for kind in kinds) / len(kinds)


def over_seeds(every: list[dict[str, dict[str, list[bool]]]]) -> str:
    kinds = [kind for kind in SOUND_KINDS if NEEDS[kind] == "both"]
    lines = [
        "| " + " | ".join(("seed", "both", "video alone", "sound alone", *kinds)) + " |",
        "|---" * (4 + len(kinds)) + "|",
    ]
    for seed, found in enumerate(every):
        means = [mean_of_both(found[stream]) for stream in STREAMS]
        means += [sum(found["both"][kind]) / len(found["both"][kind]) for kind in kinds]
        lines.append(f"| {seed} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |")
    return "\n".join(lines)


def prose(models: list[MultimodalLM], clips: int, took: str, said: str) -> str:
    every = [measured(model, clips) for model in models]
    model, found = models[0], every[0]
    priors = prior_accuracy(make_sound_clip(i, split="test") for i in range(clips))
    lines = ["| question | needs | prior | both | video alone | sound alone |", "|---|---|---|---|---|---|"]
    for kind in SOUND_KINDS:
        cells = " | ".join(shown(found[stream][kind]) for stream in STREAMS)
        lines.append(f"| {kind} | {NEEDS[kind]} | {100 * priors[kind]:.1f} | {cells} |")
    weak = [k for k in SOUND_KINDS if sum(found["both"][k]) / len(found["both"][k]) < priors[k] + 0.1]
    files = through_files(model, clips // 15)
    return PROSE.format(
        took=took,
        said=said,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        clips=clips,
        table="\n".join(lines),
        seeds=over_seeds(every),
        file_questions=len(files),
        files=f"{shown(files)} %",
        weak=f"\nWhat it cannot do: not clearly above the prior: {', '.join(weak)}.\n" if weak else "",
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--took", required=True, help="what training took, in words")
    parser.add_argument("--said", required=True, help="what it was compared with, in words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    said = prose([mmzoo.load(folder) for folder in options.folders], options.clips, options.took, options.said)
    with replacing(CARD) as temporary:
        temporary.write_text(said)
    print(said)


if __name__ == "__main__":
    main()
