"""Video-CCAM beyond what every model is tested for: the projector and its mask, items, chats, released layouts."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import a_model, clip
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Phi3Config,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import mmzoo
from mmzoo import hub
from mmzoo.attention import allowed
from mmzoo.connectors.ccam import CCAMProjector
from mmzoo.encoders.vision import as_vision_config, build_vision_encoder, patch_features
from mmzoo.errors import CheckpointError, InputError, MissingExtra, UnsupportedMask
from mmzoo.language import CACHE
from mmzoo.layout import Modality, TokenLayout
from mmzoo.masks.ccam import item_layouts, query_layout
from mmzoo.models.video_ccam import (
    CONFIGS,
    VideoCCAM,
    VideoCCAMConfig,
    VideoCCAMProcessor,
    siglip_image_processor,
)
from mmzoo.processing import word_tokenizer
from mmzoo.world import VOCABULARY

QUESTION = "how many objects are there"


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(clip(seed, 1)[0])


def a_projector(**options: Any) -> CCAMProjector:
    torch.manual_seed(0)
    sizes = {"num_query": 12, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_key_value_heads": 2}
    model = CCAMProjector(10, 14, **{**sizes, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


# The projector


def test_queries_see_only_the_first_frames() -> None:
    """T = 4, N = 12: swapping the second and third frame moves only the queries that see one of them alone."""
    projector, frames = a_projector(), torch.randn(1, 4, 3, 10)
    tokens, swapped = projector(frames, torch.tensor([[4]])), projector(frames[:, [0, 2, 1, 3]], torch.tensor([[4]]))
    moved = (tokens - swapped)[0, 0].abs().amax(-1) > 1e-4
    assert moved.tolist() == [False] * 3 + [True] * 3 + [False] * 6


def test_without_the_mask_time_is_not_seen() -> None:
    frames, count = torch.randn(1, 7, 3, 10), torch.tensor([[7]])
    for rule, sees_time in (("ccam", True), ("bidirectional", False)):
        projector = a_projector(rule=rule)
        change = (projector(frames, count) - projector(frames.flip(1), count)).abs().max()
        assert (change > 1e-2) == sees_time, rule


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rounding", ["ceil", "floor", "block"])
def test_items_of_any_length_never_meet(rounding: str, attention: str) -> None:
    """Rows of a batch, and several items in a row, with padding: the same as each item alone."""
    projector = a_projector(rounding=rounding)
    projector.attention = attention
    frames, counts = torch.randn(3, 9, 3, 10), torch.tensor([[2, 5, 1], [9, 0, 0], [1, 7, 0]])
    together = projector(frames, counts)
    for row, of_row in enumerate(counts.tolist()):
        start = 0
        for item, count in enumerate(filter(None, of_row)):
            alone = projector(frames[row : row + 1, start : start + count], torch.tensor([[count]]))
            torch.testing.assert_close(together[row, item], alone[0, 0])
            start += count
    assert together.isfinite().all()


def test_padding_gets_no_gradient_and_spoils_none() -> None:
    projector = a_projector()
    frames, counts = torch.randn(2, 4, 3, 10, requires_grad=True), torch.tensor([[4, 0], [1, 2]])
    projector(frames, counts)[counts > 0].square().sum().backward()
    assert frames.grad[1, 3].abs().max() == 0
    assert frames.grad[0].abs().amin((1, 2)).min() > 0
    assert all(parameter.grad.isfinite().all() for parameter in projector.parameters())


@pytest.mark.parametrize("rounding", ["ceil", "floor", "block"])
def test_layouts_of_rows_are_those_of_single_items(rounding: str) -> None:
    projector_mask = allowed(a_projector().rule, *item_layouts(6, torch.tensor([[4, 3]]), 8, 2, rounding))[0]
    for item, (start, count) in enumerate([(0, 4), (4, 3)]):
        alone = query_layout(6, count, rounding).frame[0]  # the last frame that each query sees
        expected = (torch.arange(8) >= start) & (torch.arange(8) < start + count)
        expected = expected & (torch.arange(8) - start <= alone[:, None])
        assert torch.equal(projector_mask[6 * item : 6 * item + 6], expected.repeat_interleave(2, 1))


def test_patch_weights_are_those_of_the_mask() -> None:
    projector, frames, counts = a_projector(), torch.randn(1, 5, 3, 10), torch.tensor([[3, 2]])
    weights = projector.patch_weights(frames, counts)
    assert weights.shape == (1, 2, 12, 15)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 12))
    mask = allowed(projector.rule, *item_layouts(12, counts, 5, 3))
    assert torch.equal(weights.flatten(1, 2) > 0, mask)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounding": "up"}, "rounding 'up'.*ceil, floor, block"),
        ({"rule": "ccamm"}, "Unknown rule 'ccamm'"),
        ({"num_heads": 3}, "16, 3 heads"),
        ({"num_key_value_heads": 3}, "4 heads and 3 key/value heads"),
    ],
)
def test_a_projector_that_cannot_be_built(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        a_projector(**options)


# The tower


def test_the_tower_is_cut_where_its_features_are_read() -> None:
    config = as_vision_config(CONFIGS["video-ccam-tiny"]["vision_config"])
    whole = SiglipVisionModel(config).eval()
    cut, width = build_vision_encoder(config, -2)
    report = cut.load_state_dict(whole.state_dict(), strict=False)
    assert not report.missing_keys
    assert {name.split(".")[0] for name in report.unexpected_keys} == {"encoder", "head", "post_layernorm"}
    assert {name.split(".")[2] for name in report.unexpected_keys if name.startswith("encoder")} == {"2"}
    pixels = torch.randn(2, 3, 30, 30)
    torch.testing.assert_close(patch_features(cut.eval(), pixels), patch_features(whole, pixels, -2))
    with pytest.raises(InputError, match="hidden states 0 to 3, no layer 4"):
        build_vision_encoder(config, 4)
    with pytest.raises(InputError, match="cannot be cut"):
        build_vision_encoder(as_vision_config("timm:test_vit"), -2)


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_frames_may_be_encoded_a_few_at_a_time(size: int) -> None:
    model, pixels = a_model("video-ccam-tiny"), torch.randn(7, 3, 30, 30)
    expected, seen = model.patch_features(pixels), []
    model.config.vision_chunk_size = size
    model.vision_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    torch.testing.assert_close(model.patch_features(pixels), expected)
    assert max(seen) == min(size, 7)


# Items in a batch


def test_a_clip_takes_as_many_tokens_as_an_image() -> None:
    processor = mmzoo.create("video-ccam-tiny").processor
    text = "<|user|> <image> what <video> is <image> <|end|> <|assistant|>"
    batch = processor(text, images=[picture(0), picture(1)], videos=[clip(2)])
    layout = TokenLayout(batch["layout"])
    assert batch["pixel_values"].shape[:2] == (1, 6)
    assert batch["num_frames"].tolist() == [[1, 4, 1]]
    runs = [(Modality.IMAGE, 12), (Modality.VIDEO, 12), (Modality.IMAGE, 12)]
    visual = layout.modality[layout.visual].tolist()
    assert visual == [int(kind) for kind, count in runs for _ in range(count)]
    assert batch["input_ids"][layout.visual].unique().tolist() == [processor.tokenizer.pad_token_id]


def test_rows_with_other_items_answer_as_they_do_alone() -> None:
    model = a_model("video-ccam-tiny")
    asked = [
        ("<video> what <image>", [picture(0)], [clip(1, 3)]),
        ("is there", [], []),
        ("<image> why", [picture(2)], []),
    ]
    texts, images, videos = zip(*((model.processor.prompt(text), i, v) for text, i, v in asked), strict=True)
    batch = model.processor(texts, images, videos)
    assert batch["num_frames"].tolist() == [[3, 1], [0, 0], [1, 0]]
    together = model(**batch).logits
    layout = TokenLayout(batch["layout"])
    for row in range(3):
        alone = model(**model.processor(texts[row], images[row], videos[row])).logits[0]
        torch.testing.assert_close(together[row][layout.valid[row]], alone, atol=1e-4, rtol=1e-4)


def test_a_short_clip_gives_the_frames_it_has() -> None:
    model = mmzoo.create("video-ccam-tiny")
    batch = model.processor(["<video> what", "<video> what"], videos=[[clip(0, 2)], [clip(1, 9)]])
    assert batch["num_frames"].tolist() == [[2], [4]]
    answer = model.ask(clip(0, 9), QUESTION, max_new_tokens=1)
    assert (answer.video.sampling, answer.video.indices) == ("ccam_uniform", [1, 3, 5, 7])


def test_visual_tokens_take_images_and_clips() -> None:
    model, pixels = a_model("video-ccam-tiny"), torch.randn(2, 5, 3, 30, 30)
    tokens = model.visual_tokens(pixels, torch.tensor([5, 3]))
    assert tokens.shape == (2, 12, 32)
    torch.testing.assert_close(tokens[1:], model.visual_tokens(pixels[1:, :3]))
    torch.testing.assert_close(model.visual_tokens(pixels[:, 0]), model.visual_tokens(pixels[:, :1]))
    assert not torch.allclose(tokens, model.visual_tokens(pixels.flip(1)))


def _without(batch: Any, name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != name}


def test_frames_and_items_must_agree() -> None:
    model = mmzoo.create("video-ccam-tiny")
    batch = model.processor.ask(QUESTION, video=clip(0))
    changes: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
        ("num_frames", lambda x: x + 1, "counts 5 frames in a row, pixel_values has 4"),
        ("num_frames", lambda x: x * 0, r"\[0\] items in num_frames, but \[1\]"),
        ("num_frames", lambda x: torch.cat([x - 3, x - 3], 1), r"\[2\] items in num_frames, but \[1\]"),
        ("num_frames", lambda x: torch.cat([x * 0, x], 1), "an item of 0 frames before"),
        ("num_frames", lambda x: -x, "holds counts"),
        ("num_frames", lambda x: x[0], "holds counts"),
        ("pixel_values", lambda x: x[:, :2], "counts 4 frames in a row, pixel_values has 2"),
    ]
    for name, change, said in changes:
        with pytest.raises(InputError, match=said):
            model(**{**batch, name: change(batch[name])})
    with pytest.raises(InputError, match="need num_frames"):
        model(**_without(batch, "num_frames"))
    with pytest.raises(InputError, match="no pixel_values"):
        model(**_without(batch, "pixel_values"))


def test_the_projector_runs_on_the_models_backend() -> None:
    model = a_model("video-ccam-tiny")
    for name in ("eager", "sdpa"):
        model.set_attention(name)
        assert model.projector.attention == name
    with pytest.raises(UnsupportedMask, match="ccam"):
        model.set_attention("flash_attention_2")
    assert model.projector.attention == "sdpa"
    model.projector.attention = "flash_attention_2"
    with pytest.raises(UnsupportedMask, match="ccam"):
        model.visual_tokens(torch.randn(1, 3, 30, 30))


# Where an answer looked


def test_attention_to_a_clips_tokens_is_told_by_frame() -> None:
    model = a_model("video-ccam-tiny")
    maps = model.attend(clip(0, 9), QUESTION, max_new_tokens=2)
    assert len(maps.frames) == 4
    assert maps.by_token().shape[-2:] == (1, 12)
    assert maps.by_patch().shape[-2:] == (4, 16)
    torch.testing.assert_close(maps.by_frame().sum(-1), maps.by_class()["video"])
    # The first queries see the first frame alone, so the others cannot have taken more than the rest.
    first = maps.by_token()[..., 0, :3].sum(-1)
    assert (maps.by_frame()[..., 0] > first).all()


def test_attending_to_an_image(tmp_path: Path) -> None:
    maps = a_model("video-ccam-tiny").attend(picture(), QUESTION, max_new_tokens=2)
    assert maps.by_patch().shape[-2:] == (1, 16)
    assert maps.draw(tmp_path / "map.png").is_file()


# Prompts


def test_chats_are_those_of_the_base_models() -> None:
    processor = mmzoo.create("video-ccam-tiny").processor
    assert processor.prompt("why?", "<video>") == "<|user|>\n<video>\nwhy?<|end|>\n<|assistant|>\n"
    processor.chat = "chatml"
    assert processor.prompt("why?", "<video>") == ("<|im_start|>user\n<video>\nwhy?<|im_end|>\n<|im_start|>assistant\n")
    processor.chat = "qwen2.5"
    assert processor.prompt("why?") == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_place_is_inserted_only_where_it_is_missing() -> None:
    processor = mmzoo.create("video-ccam-tiny").processor
    assert processor.prompt("see <video> why", "<video>").count("<video>") == 1
    assert processor.prompt("a {} b", "<image>") == "<|user|>\n<image>\na {} b<|end|>\n<|assistant|>\n"


def test_a_conversation_has_its_opening_and_its_media_once() -> None:
    processor = mmzoo.create("video-ccam-tiny").processor
    processor.chat = "qwen2.5"
    text = processor.conversation([("one", "two"), ("three", "four")], "five", "<video>")
    assert text.count("<|im_start|>system") == text.count("<video>") == 1
    assert text.endswith(
        "user\n<video>\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n<|im_start|>user\nfive<|im_end|>\n<|im_start|>assistant\n"
    )


def test_turns_and_roles_of_a_conversation() -> None:
    processor = mmzoo.create("video-ccam-tiny").processor
    text = processor.conversation([("what is the square", "red")], "is there a circle", "<video>") + "no"
    batch = processor(text, videos=[clip(0)], padding_side="right", labels=True)
    layout = TokenLayout(batch["layout"])
    assert layout.turn.unique().tolist() == [0, 1]
    words = processor.tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] >= 0])
    assert words == ["red", "<|end|>", "no"]


BYTES = Path(__file__).parent / "data" / "parity" / "video-ccam" / "glue_v10_phi3" / "tokenizer.json"


@pytest.mark.parametrize("chat", ["chatml", "qwen2.5"])
def test_roles_of_a_chat_whose_markers_are_many_tokens(chat: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(BYTES), pad_token="<unk>")
    tokenizer.add_tokens(["<image>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    processor = VideoCCAMProcessor(siglip_image_processor(30), tokenizer, 5, chat)
    assert processor.stop_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = processor.conversation([("one", "two")], "three", "<image>") + "four"
    batch = processor(text, images=[picture()], labels=True)
    layout = TokenLayout(batch["layout"])
    assert layout.visual.sum() == 5
    said = tokenizer.decode(batch["labels"][batch["labels"] >= 0])
    assert said.replace(" ", "") == "\ntwo<|im_end|>\nfour"  # the line break that ends the turn is no answer


def test_text_between_media_is_encoded_on_its_own() -> None:
    """As the authors do: only the first piece gets what the tokenizer adds at the beginning."""
    processor = mmzoo.create("video-ccam-tiny").processor
    place, start = processor.tokenizer.convert_tokens_to_ids(["<image>", "<s>"])
    ids = processor.encode("what<image>is <image>")
    assert ids == [start, *processor.tokenizer.convert_tokens_to_ids(["what"]), place, ids[3], place]
    assert processor.encode("what<image>is <image>", add_special_tokens=False) == ids[1:]
    assert processor.encode("what<image>is <image>", max_length=3) == ids[:3]


def test_an_unknown_chat_is_refused() -> None:
    with pytest.raises(InputError, match="Unknown chat 'phi4'. Known: phi3"):
        VideoCCAMProcessor(siglip_image_processor(30), word_tokenizer(VOCABULARY), chat="phi4")


def test_a_tokenizer_of_another_chat_is_refused() -> None:
    processor = mmzoo.create("video-ccam-tiny").processor
    processor.chat = "qwen2.5"
    with pytest.raises(InputError, match="lacks <|im_end|>"):
        _ = processor.stop_ids


def test_an_answer_ends_where_the_chat_says() -> None:
    model = mmzoo.create("video-ccam-tiny")
    assert model.processor.tokenizer.convert_ids_to_tokens(model.processor.stop_ids) == ["<|end|>", "<|endoftext|>"]
    assert model.generation_config.eos_token_id == model.processor.stop_ids
    full = mmzoo.create("video-ccam-9b", device="meta")
    assert full.generation_config.eos_token_id == 7


# Sliding windows of the language model


def test_phi3_keeps_its_window() -> None:
    """Visual tokens and text outgrow the window of Phi-3-mini-4k; transformers' own mask is the reference."""
    text = {**CONFIGS["video-ccam-tiny"]["text_config"], "sliding_window": 9}
    torch.manual_seed(0)
    model = mmzoo.create("video-ccam-tiny", text_config=text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = model.processor([model.processor.prompt(QUESTION, "<video>")] * 2, videos=[[clip(0)], [clip(1)]])
    layout = TokenLayout(batch["layout"])
    embeds = model.embed(batch["input_ids"], layout, batch["pixel_values"], num_frames=batch["num_frames"])
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        expected = model.llm(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached, again = model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached, again)
    wide = mmzoo.create("video-ccam-tiny")
    wide.load_state_dict(model.state_dict())
    assert not torch.allclose(wide(**batch).logits, model(**batch).logits, atol=1e-2)


def test_a_second_question_uses_the_first_ones_cache() -> None:
    model = a_model("video-ccam-tiny")
    first = model.processor(model.processor.prompt("what is the square", "<video>"), videos=[clip(0)])
    cache = DynamicCache(config=model.config.text_config)
    model.generate(**first, max_new_tokens=1, do_sample=False, **{CACHE: cache})
    encoded: list[int] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    turns = [("what is the square", "red")]
    second = model.processor(model.processor.conversation(turns, "is there a circle", "<video>"), videos=[clip(0)])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_cache = model.generate(**second, **options, eos_token_id=None, **{CACHE: cache})
    assert encoded == []
    whole = model.generate(**second, **options, eos_token_id=None)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)


# Releases


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release as v1.0 is one: adapters and a projector, whose base models are folders beside them."""
    from peft import LoraConfig, get_peft_model

    folder, tiny = tmp_path_factory.mktemp("release"), CONFIGS["video-ccam-tiny"]
    torch.manual_seed(1)
    text = {key: value for key, value in tiny["text_config"].items() if key != "model_type"}
    text["eos_token_id"] = 2  # a base model may know one end, its chat has two
    language = AutoModelForCausalLM.from_config(Phi3Config(**text))
    tower = SiglipVisionModel(SiglipVisionConfig(**tiny["vision_config"]))
    bases = {"llm_adapter": "base-phi", "visual_encoder_adapter": "base-siglip"}
    targets = {"llm_adapter": ["qkv_proj", "down_proj"], "visual_encoder_adapter": ["q_proj", "fc1", "out_proj"]}
    word_tokenizer(VOCABULARY).save_pretrained(folder / "base-phi")
    for part, model in (("llm_adapter", language), ("visual_encoder_adapter", tower)):
        model.save_pretrained(folder / bases[part])
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=targets[part]))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder / part)
        described = json.loads((folder / part / "adapter_config.json").read_text())
        described["base_model_name_or_path"] = str(folder / bases[part])
        (folder / part / "adapter_config.json").write_text(json.dumps(described))
    (folder / "projector").mkdir()
    (folder / "projector" / "config.json").write_text(json.dumps({**tiny["projector"], "hidden_act": "swiglu"}))
    save_file(CCAMProjector(24, 32, **tiny["projector"]).state_dict(), folder / "projector" / "model.safetensors")
    return folder


@pytest.fixture
def parts(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "release")


def test_a_release_in_parts_is_merged(parts: Path, tmp_path: Path) -> None:
    model = mmzoo.load(str(parts))
    assert model.generation_config.eos_token_id == model.processor.stop_ids == [5, 2]
    base = load_file(parts / "base-phi" / "model.safetensors")
    lora = load_file(parts / "llm_adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    down, up = (lora[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    merged = base[f"{name}.weight"] + 6 / 2 * up @ down
    torch.testing.assert_close(model.llm.get_parameter(f"{name}.weight").data, merged)
    projector = load_file(parts / "projector" / "model.safetensors")
    assert all(torch.equal(model.projector.state_dict()[key], value) for key, value in projector.items())
    answer = model.ask(clip(0), QUESTION, max_new_tokens=3)
    assert answer.layout.visual.sum() == 12
    again = mmzoo.load(str(hub.save(model, tmp_path / "saved")))
    assert again.ask(clip(0), QUESTION, max_new_tokens=3).confidence == answer.confidence
    assert mmzoo.load(str(parts), dtype=torch.bfloat16).projector.query.dtype == torch.bfloat16


def test_a_registered_name_may_be_given_parts_in_a_folder(parts: Path) -> None:
    model = mmzoo.load("video-ccam-4b", weights=str(parts))
    assert model.config.text_config.hidden_size == 32


def test_a_projector_saved_by_torch_is_read_without_unpickling(parts: Path) -> None:
    path = parts / "projector" / "model.safetensors"
    state = load_file(path)
    path.unlink()
    torch.save(state, parts / "projector" / "pytorch_model.bin")
    assert torch.equal(mmzoo.load(str(parts)).projector.query, state["query"])
    torch.save(picture, parts / "projector" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is damaged"):
        mmzoo.load(str(parts))


def _renamed(path: Path, old: str, new: str) -> None:
    state = load_file(path)
    save_file({name.replace(old, new): tensor for name, tensor in state.items()}, path)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("projector/model.safetensors", "norm_q", "ln_q"),
        ("llm_adapter/adapter_model.safetensors", "layers.1", "layers.7"),
        ("visual_encoder_adapter/adapter_model.safetensors", "fc1", "fc9"),
    ],
)
def test_names_that_cannot_be_placed_are_listed(parts: Path, file: str, old: str, new: str) -> None:
    _renamed(parts / file, old, new)
    with pytest.raises(CheckpointError) as raised:
        mmzoo.load(str(parts))
    assert raised.value.missing and all(old in name for name in raised.value.missing)
    assert raised.value.unexpected and all(new in name for name in raised.value.unexpected)


def test_shapes_that_do_not_fit_are_listed(parts: Path) -> None:
    path = parts / "projector" / "model.safetensors"
    save_file({**load_file(path), "query": torch.zeros(12, 20)}, path)
    with pytest.raises(CheckpointError) as raised:
        mmzoo.load(str(parts))
    assert raised.value.misshapen == [("query", (12, 20), (12, 16))]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("projector/config.json", "projector.config.json"),
        ("projector/model.safetensors", "holds none of model.safetensors, pytorch_model.bin"),
        ("visual_encoder_adapter/adapter_config.json", "visual_encoder_adapter.adapter_config.json"),
        ("llm_adapter/adapter_model.safetensors", "holds none of adapter_model.safetensors"),
    ],
)
def test_a_missing_part_is_named(parts: Path, missing: str, said: str) -> None:
    (parts / missing).unlink()
    with pytest.raises(CheckpointError, match=said):
        mmzoo.load(str(parts))


def test_parts_take_no_loading_options(parts: Path) -> None:
    with pytest.raises(InputError, match="takes no device_map"):
        mmzoo.load(str(parts), device_map="cpu")


def test_adapters_need_peft(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"mmzoo\[train\]"):
        mmzoo.load(str(parts))


def test_a_projector_of_another_kind_is_refused(parts: Path) -> None:
    (parts / "projector" / "config.json").write_text(json.dumps({"hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match="hidden_act is 'gelu'"):
        mmzoo.load(str(parts))


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A release as v1.2 is one: merged weights, under the names of this project."""
    tiny, folder = CONFIGS["video-ccam-tiny"], tmp_path / "merged"
    model = a_model("video-ccam-tiny")
    folder.mkdir()
    word_tokenizer(VOCABULARY).save_pretrained(folder)
    described = {
        "model_type": "videoccam",
        "projector_config": {**tiny["projector"], "hidden_act": "swiglu", "dropout": 0.1, "output_size": 32},
        "one_config": tiny["text_config"],
        "other_config": {**tiny["vision_config"], "model_type": "siglip_vision_model"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_merged_release_is_read(merged: Path) -> None:
    model = mmzoo.load(str(merged))
    assert isinstance(model, VideoCCAM)
    assert model.processor.chat == "phi3"
    reference = a_model("video-ccam-tiny")
    inputs = model.processor.ask(QUESTION, image=picture())
    torch.testing.assert_close(model(**inputs).logits, reference(**inputs).logits)


def test_a_merged_release_under_other_names_is_listed(merged: Path) -> None:
    _renamed(merged / "model.safetensors", "projector.cross_attn", "projector.attention")
    with pytest.raises(CheckpointError) as raised:
        mmzoo.load(str(merged))
    assert len(raised.value.missing) == len(raised.value.unexpected) == 8
    assert all("cross_attn" in name for name in raised.value.missing)


def test_a_merged_release_must_describe_its_parts(merged: Path) -> None:
    described = json.loads((merged / "config.json").read_text())
    del described["one_config"]
    (merged / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="describes 0 language models and 1 SigLIP towers"):
        mmzoo.load(str(merged))


# Sizes


def test_the_seven_billion_are_as_many_as_its_files_hold() -> None:
    """Four bf16 shards of 4.93, 4.99, 4.93 and 1.23 GB: the tower without its last layer and its pooling head."""
    model = mmzoo.create("video-ccam-7b-v1.2", device="meta")
    assert 16.06e9 < 2 * sum(p.numel() for p in model.parameters()) < 16.09e9
    names = {name.split(".")[0] for name in model.state_dict()}
    assert names == {"vision_encoder", "projector", "llm"}
    assert model.projector.query.shape == (1024, 1024)
    assert model.projector.out_proj.weight.shape == (3584, 1024)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = Path(__file__).parent.parent / "scripts" / "examples" / "video_ccam.py"
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    assert (tmp_path / "ccam.png").is_file()
    assert "frames of each item: [[3], [16], [5]]" in capsys.readouterr().out


def test_nano_is_small_and_whole() -> None:
    model = VideoCCAM(VideoCCAMConfig(**CONFIGS["video-ccam-nano"]))
    assert sum(parameter.numel() for parameter in model.parameters()) <= 500_000
    tokens = model.visual_tokens(torch.randn(1, 8, 3, 32, 32))
    assert tokens.shape == (1, 48, 64)
    assert np.isfinite(tokens.detach().numpy()).all()
