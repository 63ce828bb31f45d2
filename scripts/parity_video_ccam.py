"""What the parity cases of Video-CCAM mean, in terms of mmzoo's public code.

Their models are written out as the authors release them, in parts (base models, LoRA adapters, projector), and read
by the reader of such releases.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from parity_cases import Case, Comparison, close, exact, greedy, same_strings
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mmzoo import hub, masks
from mmzoo.connectors.ccam import CCAMProjector
from mmzoo.layout import Modality, TokenLayout, batch
from mmzoo.media import sample_indices
from mmzoo.models.video_ccam import VideoCCAM, siglip_image_processor
from mmzoo.processing import IMAGE
from mmzoo_eval.benchmark import Item
from mmzoo_eval.benchmarks import benchmark, video_mme, videovista
from mmzoo_eval.parsing import PREFIXES, without_prefixes
from mmzoo_eval.prompts import LETTER_ONLY, bracketed, question_block
from mmzoo_eval.subtitles import one_a_frame, read_srt

FILES = {
    "llm_base": "model.safetensors",
    "llm_adapter": "adapter_model.safetensors",
    "visual_encoder_base": "model.safetensors",
    "visual_encoder_adapter": "adapter_model.safetensors",
    "projector": "model.safetensors",
}


def _options(described: dict[str, Any]) -> dict[str, Any]:
    renamed = {"rounding": described["mask_rule"], **described}
    return {name: x for name, x in renamed.items() if name not in ("mask_rule", "hidden_act", "split_sizes")}


def projector(case: Case) -> Iterator[Comparison]:
    """video-ccam-definition, module: the projector alone, in time, against time, and without its mask."""
    options = _options(case.config)
    options.pop("tokens_per_frame")
    model = CCAMProjector(**options).eval()
    model.load_state_dict(case.checkpoint)
    features, sizes = case.inputs["features"], case.config["split_sizes"]
    num_frames = torch.tensor([sizes])
    reversed_items = torch.cat([item.flip(0) for item in features.split(sizes)])
    for attention in ("sdpa", "eager"):
        model.attention = attention
        model.rule = masks.causal_cross_attention()
        yield close(f"output {attention}", model(features[None], num_frames)[0], case.expected["output"])
        backwards = model(reversed_items[None], num_frames)[0]
        yield close(f"output_frames_reversed {attention}", backwards, case.expected["output_frames_reversed"])
        model.rule = masks.bidirectional()
        yield close(
            f"output_no_mask {attention}", model(features[None], num_frames)[0], case.expected["output_no_mask"]
        )


def _release(case: Case, folder: Path) -> Path:
    """The case's model as the authors release one; without a projector of its own, one that is never used."""
    config = case.config
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in FILES}
    for name, tensor in case.checkpoint.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    described = {
        "llm_base": ("config.json", config["llm"]),
        "llm_adapter": (
            "adapter_config.json",
            {**config["llm_adapter"], "base_model_name_or_path": f"{folder}/llm_base"},
        ),
        "visual_encoder_base": ("config.json", config["vision"]),
        "visual_encoder_adapter": (
            "adapter_config.json",
            {**config["visual_encoder_adapter"], "base_model_name_or_path": f"{folder}/visual_encoder_base"},
        ),
        "projector": ("config.json", config.get("projector") or {"num_query": case.inputs["visual_tokens"].shape[1]}),
    }
    if not parts["projector"]:
        options = {**described["projector"][1], "hidden_size": 8, "intermediate_size": 8, "num_heads": 2}
        described["projector"] = ("config.json", options)
        stand_in = CCAMProjector(config["vision"]["hidden_size"], config["llm"]["hidden_size"], **options)
        parts["projector"] = stand_in.state_dict()
    for part, tensors in parts.items():
        (folder / part).mkdir()
        save_file(tensors, folder / part / FILES[part], metadata={"format": "pt"})
        name, content = described[part]
        (folder / part / name).write_text(json.dumps(content))
    _tokenizer(case).save_pretrained(folder / "llm_base")
    return folder


def _tokenizer(case: Case) -> PreTrainedTokenizerFast:
    """The case's tokenizer; the definition's cases use that of the case they were made from."""
    places = (case.path, case.path.parent.parent / "video-ccam" / case.name.replace("model", "glue"))
    path = next(place / "tokenizer.json" for place in places if (place / "tokenizer.json").is_file())
    return PreTrainedTokenizerFast(tokenizer_file=str(path), pad_token="<unk>", bos_token="<s>", eos_token="</s>")


def models(case: Case) -> Iterator[Comparison]:
    """A whole model in parts: prompts, features, splice, logits and greedy tokens; of v1.0 also batches and labels."""
    with tempfile.TemporaryDirectory() as folder:
        model = hub.load_from(str(_release(case, Path(folder))))
    assert isinstance(model, VideoCCAM)
    model.eval()
    expected, pixels = case.expected, case.inputs["pixel_values"]
    yield close("vision_features", model.patch_features(pixels), expected["vision_features"])
    yield exact(
        "stop ids", torch.tensor(model.generation_config.eos_token_id), torch.tensor(case.config["eos_token_id"])
    )
    num_frames = torch.tensor([case.config["frames_per_item"]])
    if "visual_tokens" in expected:
        tokens = model.projector(model.patch_features(pixels)[None], num_frames)[0]
        yield close("visual_tokens", tokens, expected["visual_tokens"])
        frames = pixels.split(case.config["frames_per_item"])
        shown = [{"pixel_values": x[None], "num_frames": torch.tensor([[len(x)]])} for x in frames]
    else:
        tokens = case.inputs["visual_tokens"]
        shown = [{"visual_embeds": item[None, None]} for item in tokens]
    rows = []
    for i, prompt in enumerate(case.config["prompts"]):
        ids = _encoded(model, prompt)
        yield exact(f"input_ids_{i}", _upstream_ids(model, ids), expected[f"input_ids_{i}"])
        rows.append(_laid_out(model, ids))
        yield from _alone(case, model, i, rows[-1], shown[i])
    if "batch_inputs_embeds" in expected:
        yield from _batches(case, model, rows, tokens)


def _encoded(model: VideoCCAM, prompt: str) -> list[int]:
    made = model.processor
    return made.encode(made.prompt(prompt.replace("<video>", IMAGE), IMAGE))


def _upstream_ids(model: VideoCCAM, ids: list[int]) -> Tensor:
    place = model.processor.tokenizer.convert_tokens_to_ids(IMAGE)
    return torch.tensor([-200 if i == place else i for i in ids])


def _laid_out(model: VideoCCAM, ids: list[int]) -> tuple[list[int], TokenLayout]:
    place = model.processor.tokenizer.convert_tokens_to_ids(IMAGE)
    return model.processor.lay_out(ids, model.processor.spans(torch.zeros(1), Modality.IMAGE) * ids.count(place))


def _alone(
    case: Case, model: VideoCCAM, i: int, row: tuple[list[int], TokenLayout], shown: dict[str, Tensor]
) -> Iterator[Comparison]:
    ids, layout = torch.tensor(row[0])[None], row[1]
    yield exact(f"attention_mask_{i}", layout.attention_mask, case.expected[f"attention_mask_{i}"])
    yield close(f"inputs_embeds_{i}", model.embed(ids, layout, **shown), case.expected[f"inputs_embeds_{i}"])
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        logits = model(ids, layout, **shown).logits
        yield close(f"logits_{i} {attention}", logits, case.expected[f"logits_{i}"])
        said, _ = greedy(model, case.config["max_new_tokens"], ids, layout, **shown)
        yield exact(f"greedy_{i} {attention}", said[0], case.expected[f"greedy_{i}"])


def _batches(
    case: Case, model: VideoCCAM, rows: list[tuple[list[int], TokenLayout]], tokens: Tensor
) -> Iterator[Comparison]:
    """Batches padded on the right, compared where there are tokens: upstream's padding is zero vectors."""
    place = model.processor.tokenizer.convert_tokens_to_ids(IMAGE)
    without = [i for i in _encoded(model, case.config["prompts"][0]) if i != place]
    both = _laid_out(model, [place if i == -200 else i for i in case.expected["multi_input_ids"].tolist()])
    for name, chosen, shown in (
        ("batch", rows, tokens[:, None]),
        ("textonly", [_laid_out(model, without), *rows[1:]], tokens[:, None]),
        ("multi", [both], tokens[None]),
    ):
        layout = batch([one for _, one in chosen])
        ids = torch.full(layout.sample.shape, model.processor.tokenizer.pad_token_id)
        ids[layout.valid] = torch.tensor([token for one, _ in chosen for token in one])
        yield exact(f"{name}_attention_mask", layout.attention_mask, case.expected[f"{name}_attention_mask"])
        embeds = model.embed(ids, layout, visual_embeds=shown)[layout.valid]
        yield close(f"{name}_inputs_embeds", embeds, case.expected[f"{name}_inputs_embeds"][layout.valid])
        if f"{name}_labels" in case.expected:  # all text is a target there
            labels = torch.where(layout.valid & ~layout.visual, ids, -100)
            yield exact(f"{name}_labels", labels, case.expected[f"{name}_labels"])
        if f"{name}_logits" in case.expected:
            logits = model(ids, layout, visual_embeds=shown).logits
            yield close(f"{name}_logits", logits, case.expected[f"{name}_logits"])


def pixels(case: Case) -> Iterator[Comparison]:
    """video-ccam, preprocess: frames to pixels."""
    frames = [case.inputs[name].numpy() for name in sorted(case.inputs)]
    made = siglip_image_processor(case.config["size"]["height"])(frames, return_tensors="pt")["pixel_values"]
    yield close("pixel_values", made, case.expected["pixel_values"], 1e-6)


def sampling(case: Case) -> Iterator[Comparison]:
    """video-ccam, sampling: which frames are looked at, and which subtitles stand beside them."""
    given = case.json(case.config["data_file"])
    rules: dict[str, Callable[[dict[str, Any]], Any]] = {
        "eval_uniform": lambda x: _indices("ccam_uniform", num_total=x["total_frames"], num_frames=x["num_frames"]),
        "eval_fps": lambda x: _indices(
            "ccam_fps",
            num_total=x["total_frames"],
            video_fps=x["input_fps"],
            fps=x["output_fps"] or x["input_fps"],
            num_frames=x["max_num_frames"],
        ),
        "demo": lambda x: _indices(
            "ccam_demo" if x["sample_type"] == "uniform" else "ccam_demo_fps",
            num_total=x["end_idx"],
            num_frames=x.get("num_frames", x.get("max_num_frames")),
            video_fps=x.get("input_fps"),
            fps=x.get("output_fps"),
        ),
        "mvbench": lambda x: _indices(
            "mvbench",
            num_total=x["max_frame"] + 1,
            num_frames=x["num_frames"],
            video_fps=x["fps"],
            bound=x["bound"],
            first_idx=x["first_idx"],
            max_frame=x["max_frame"],
        ),
    }
    for name, rule in rules.items():
        yield same_strings(name, [rule(x) for x in given[name]], [x["indices"] for x in given[name]])
    cues = read_srt(given["srt"])
    said = [one_a_frame(cues, [i / x["fps"] for i in x["indices"]]) for x in given["subtitle"]]
    yield same_strings("subtitle", said, [x["text"] for x in given["subtitle"]])


def _indices(rule: str, num_frames: int, **given: Any) -> list[int]:
    return sample_indices(rule, num_frames=None if num_frames == -1 else num_frames, **given)


def questions(case: Case) -> Iterator[Comparison]:
    """video-ccam, text: what is asked in each benchmark, and which answers count as right."""
    given = case.json(case.config["data_file"])
    for name in ("mvbench_template", "mlvu_M_template"):
        for i, x in enumerate(given[name]):
            data = x["data"]
            yield same_strings(f"{name} {i}", question_block(data["question"], data["candidates"]), x["question"])
            number = data["candidates"].index(data["answer"]) if data["answer"] in data["candidates"] else -1
            yield same_strings(f"{name} {i} answer", bracketed(number, data["answer"]), x["answer"])
    for i, x in enumerate(given["videovista"]):
        data = x["data"]
        options = tuple(data["Answer_Choices"])
        made = videovista.question_block(data["Question"], options)
        said = _user_turn("videovista", Item("", data["Question"], options=options))
        yield same_strings(f"videovista {i}", [made, said], [x["question"], x["content"]])
        yield same_strings(
            f"videovista {i} answer", bracketed(data["Answer"], options[data["Answer"]]) + "\n", x["answer"]
        )
    for i, x in enumerate(given["videomme"]):
        asked = Item("", x["question"], details={"options": x["options"]})
        said = video_mme.video_ccam_prompt(asked, x["subtitles"]).user
        made = [said.removesuffix(f"\n{LETTER_ONLY}"), f"<video>\n{said}"]
        yield same_strings(f"videomme {i}", made, [x["text"], x["content"]])
    for i, (x, described) in enumerate(zip(given["user_message"], given["mvbench_template"], strict=True)):
        item = Item("", described["data"]["question"], options=tuple(described["data"]["candidates"]))
        said = [_user_turn(name, item) for name in ("mvbench", "mlvu")]
        yield same_strings(f"user_message {i}", said, [x["content"]] * 2)
    prefixes = dict.fromkeys(("mvbench", "videovista"), PREFIXES)
    prefixes["mlvu"] = PREFIXES[:2]
    for name, known in prefixes.items():
        verdicts = [without_prefixes(x["predict"], x["answer"], known) for x in given["check_answer"]]
        yield same_strings(f"check_answer {name}", verdicts, [x[name] for x in given["check_answer"]])


def _user_turn(name: str, item: Item) -> str:
    """What the user says in the protocol "video_ccam", the clip's place included."""
    prompt = benchmark(name).protocol("video_ccam").prompt
    assert prompt is not None
    return f"<video>\n{prompt(item).user}"


RUNNERS = {
    ("video-ccam-definition", "module", "projector"): projector,
    ("video-ccam-definition", "model", "model_v10"): models,
    ("video-ccam", "model", "glue_v10"): models,
    ("video-ccam", "preprocess", "preprocess"): pixels,
    ("video-ccam", "sampling", "sampling"): sampling,
    ("video-ccam", "text", "mcq"): questions,
}
