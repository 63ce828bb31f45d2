"""DeepSpeed-VisualChat beyond what every model is tested for: conversations, towers, two tables, saved models."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import mmzoo
from mmzoo import cli, hub
from mmzoo.encoders.qwen_vit import QwenVisionConfig, QwenVisionTransformer, resized, tower_weights
from mmzoo.errors import CheckpointError, InputError, UnsupportedMask
from mmzoo.layout import Role, TokenLayout
from mmzoo.models.visualchat import CONFIGS, SYSTEM, Round, VisualChat, VisualChatConfig, round_prompt
from mmzoo.processing import word_tokenizer

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
PERCEIVER = {"projection": "perceiver", "projection_options": {"num_queries": 9, "head_dim": 16}}
ROWS = CONFIGS["visualchat-tiny"]["text_config"]["vocab_size"] + 1
TOWERS: dict[str, dict[str, Any]] = {
    "qwen": {},
    "clip, baseline": {"vision_config": CLIP},
    "clip, vit": {"vision_config": CLIP, "projection": "vit"},
    "clip, perceiver": {"vision_config": CLIP, **PERCEIVER},
}
QUESTION = "what colour is the square"


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def a_model(**overrides: Any) -> VisualChat:
    """A tiny model whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    model = mmzoo.create("visualchat-tiny", **overrides)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if name.startswith("lang") else 0.6)
    return model


def greedy(model: VisualChat, batch: Any, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


ROUNDS = [
    Round("what is this", [picture(0)], "red circle"),
    Round("and these", [picture(1), picture(2)], "blue"),
    Round(QUESTION),
]


# Conversations


def test_a_conversation_is_its_rounds_and_their_answers() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    processor.system = SYSTEM
    assert processor.conversation(ROUNDS) == (
        f"{SYSTEM}\n\n### Image 1:\n<image>\n\n### Question:\nwhat is this\n\n### Answer:\nred circle<|endoftext|>"
        "### Image 2:\n<image>\n### Image 3:\n<image>\n\n### Question:\nand these\n\n### Answer:\nblue<|endoftext|>"
        f"### Question:\n{QUESTION}\n\n### Answer:\n"
    )


@pytest.mark.parametrize(
    ("question", "asked"),
    [("<image>\nwhy", "why"), ("why\n<image>", "why"), ("a\n\nb <video> c", "a b c"), (" why ", " why ")],
)
def test_a_question_loses_places_and_line_breaks(question: str, asked: str) -> None:
    assert round_prompt(question) == f"### Question:\n{asked}\n\n### Answer:\n"


def test_a_question_cannot_end_its_round() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    assert processor.conversation([Round("is<|endoftext|> it", answer="no<|endoftext|> idea")]).count("endoftext") == 1
    assert "endoftext" not in processor.prompt("is<|endoftext|> it")


@pytest.mark.parametrize("rounds", [[], [Round("why"), Round("how")]])
def test_only_the_last_round_may_lack_an_answer(rounds: list[Round]) -> None:
    with pytest.raises(InputError, match="only the last may"):
        mmzoo.create("visualchat-tiny").processor.conversation(rounds)


def test_every_round_is_encoded_by_itself() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    batch = processor.chat(ROUNDS)
    layout, ids = TokenLayout(batch["layout"]), batch["input_ids"][0]
    tokenizer = processor.tokenizer
    starts = (ids == tokenizer.bos_token_id).nonzero().flatten().tolist()
    ends = (ids == tokenizer.eos_token_id).nonzero().flatten().tolist()
    assert len(starts) == 3
    assert [start - 1 for start in starts[1:]] == ends
    turns = [layout.turn[0, start].item() for start in starts]
    assert turns == [0, 1, 2]
    assert layout.turn[layout.visual].tolist() == [0] * 4 + [1] * 8
    assert layout.role[0, ends].tolist() == [int(Role.ANSWER)] * 2
    assert layout.segment[layout.visual].unique().numel() == 3


def llama_like() -> PreTrainedTokenizerFast:
    """Characters as tokens, and a space before every text, as LLaMA-2's tokenizer puts it."""
    special = ["<unk>", "<s>", "</s>", "### Image:", "<image>"]
    characters = sorted({"▁", "\n", *"abcdefghijklmnopqrstuvwxyzQAIS#.,:<>/0123456789'YTW"})
    vocabulary = {token: i for i, token in enumerate((*special, *characters))}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.normalizer = Normalizers([Prepend("▁"), Replace(" ", "▁")])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_labels_are_the_answers_and_their_ends() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    processor.tokenizer = llama_like()
    texts = [processor.conversation([*ROUNDS[:2], Round("say", answer="yes")]), processor.conversation(ROUNDS[:1])]
    images = [[picture(i) for i in range(3)], [picture(3)]]
    batch = processor(texts, images=images, padding_side="right", pad_to_multiple_of=8, labels=True)
    layout, labels = TokenLayout(batch["layout"]), batch["labels"]
    assert labels.shape[1] % 8 == 0
    assert bool((labels[layout.visual] == -100).all())
    assert bool((labels[~layout.valid] == -100).all())
    assert not bool(layout.valid[1, -1])
    pieces = [processor.tokenizer.convert_ids_to_tokens(row[row != -100].tolist()) for row in labels]
    assert ["".join(piece) for piece in pieces] == ["red▁circle</s>blue</s>yes</s>", "red▁circle</s>"]


def test_each_round_is_cut_by_itself() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    long = Round("what is this", answer=" ".join(["red"] * 30))
    ids = processor.encode(processor.conversation([long, long]), max_length=12)
    assert len(ids) == 2 * (12 + 1)
    assert ids[12] == ids[25] == processor.tokenizer.eos_token_id
    with pytest.raises(InputError, match="round 1 is not among the 6 ids"):
        processor.encode(processor.conversation([long]), max_length=6)


def test_at_most_eight_images() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    rounds = [Round("what", [picture(i) for i in range(4)], "red"), Round("why", [picture(i) for i in range(4)])]
    assert TokenLayout(processor.chat(rounds)["layout"]).visual.sum() == 8 * 4
    with pytest.raises(InputError, match="9 images or frames; the model was made for at most 8"):
        processor.chat([*rounds[:1], Round("why", [picture(i) for i in range(5)])])


def test_the_frames_of_a_video_are_numbered_images() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    video = np.stack([np.asarray(picture(seed)) for seed in range(6)])
    batch = processor.ask(QUESTION, video=video)
    frames = processor._frames(video)
    same = processor.chat([Round(QUESTION, frames)])
    assert len(frames) == processor.num_frames == 4
    assert batch["input_ids"].tolist() == same["input_ids"].tolist()
    assert torch.equal(batch["pixel_values"], same["pixel_values"])
    after = processor("### Image 1:\n<image> <video>", images=[picture()], videos=[video])
    words = processor.tokenizer.decode(after["input_ids"][0]).split()
    assert [word for word in words if word[0].isdigit()] == [f"{i}:" for i in range(1, 6)]


def test_places_and_images_must_agree() -> None:
    processor = mmzoo.create("visualchat-tiny").processor
    with pytest.raises(InputError, match="2 <image> places, but 1"):
        processor(processor.conversation([Round("what", [picture(), picture()])]), images=[picture()])


# Answers


def conversations() -> list[list[Round]]:
    return [ROUNDS, [Round("how many objects are there")], [Round(QUESTION, [picture(4)])]]


@pytest.mark.parametrize("empty_branch", ["zero", "upstream"])
@pytest.mark.parametrize("image_order", ["natural", "upstream"])
def test_mixed_conversations_answer_in_a_batch_as_alone(image_order: str, empty_branch: str) -> None:
    model = a_model(image_order=image_order, empty_branch=empty_branch)
    processor, told = model.processor, conversations()
    images = [[picture for one in rounds for picture in one.images] for rounds in told]
    batch = processor([processor.conversation(rounds) for rounds in told], images=images)
    alone = [greedy(model, processor.chat(rounds))[0] for rounds in told]
    assert greedy(model, batch) == alone
    assert greedy(model, batch, num_beams=3, cache_implementation="static") == [
        greedy(model, processor.chat(rounds), num_beams=3)[0] for rounds in told
    ]


def test_the_images_of_a_sample_may_stand_backwards() -> None:
    model = a_model()
    texts = [model.processor.conversation(ROUNDS), model.processor.conversation([Round("what", [picture(5)])])]
    batch, turned = (
        model.processor(texts, images=[[picture(i) for i in order], [picture(5)]]) for order in ((0, 1, 2), (2, 1, 0))
    )
    valid, natural = TokenLayout(batch["layout"]).valid, model(**turned).logits
    assert (model(**batch).logits - natural)[0][valid[0]].abs().max() > 0.01
    model.config.image_order = "upstream"
    torch.testing.assert_close(model(**batch).logits[valid], natural[valid])


def test_without_an_open_key_a_branch_adds_nothing_or_a_look_ahead() -> None:
    inputs = mmzoo.create("visualchat-tiny").processor.chat([Round(QUESTION, [picture(0)])])
    early = int(TokenLayout(inputs["layout"]).visual[0].long().argmax())
    changed = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    differences = {}
    for empty_branch in ("zero", "upstream"):
        model = a_model(empty_branch=empty_branch)
        differences[empty_branch] = (model(**inputs).logits - model(**changed).logits)[0, :early].abs().max()
    assert differences["zero"] == 0
    assert differences["upstream"] > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_uniform_fallback_has_the_same_gradients_on_every_backend(attention: str) -> None:
    model = a_model(empty_branch="upstream")
    batch = model.processor.chat([*ROUNDS[:2], Round("say", answer="yes")], padding_side="right", labels=True)
    model.set_attention("eager")
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_attention(attention)
    model(**batch).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tower_and_projection_asks_and_attends(tower: str) -> None:
    model = a_model(**TOWERS[tower])
    model.processor.num_vision_tokens = tokens = model.config.num_vision_tokens
    assert tokens == {"qwen": 4, "clip, perceiver": 9}.get(tower, 17)
    maps = model.attend(picture(), QUESTION, max_new_tokens=3)
    assert maps.answer.text == model.ask(picture(), QUESTION, max_new_tokens=3).text
    assert maps.by_token().shape[-2:] == (1, tokens)
    assert maps.patch_weights.shape == (1, tokens, 16)
    torch.testing.assert_close(maps.patch_weights.sum(-1), torch.ones(1, tokens))
    torch.testing.assert_close(maps.weights.sum(-1), torch.full(maps.weights.shape[:3], 2.0))
    torch.testing.assert_close(sum(maps.by_class().values()), torch.full(maps.weights.shape[:3], 2.0))


def test_attending_to_frames_that_stand_backwards(tmp_path: Path) -> None:
    model = a_model(image_order="upstream")
    video = np.stack([np.full((40, 48, 3), 60 * i, np.uint8) for i in range(4)])
    maps = model.attend(video, QUESTION, max_new_tokens=2)
    assert [frame.mean() for frame in maps.frames] == sorted((frame.mean() for frame in maps.frames), reverse=True)
    pixels = model.processor.pixels([Image.fromarray(frame) for frame in maps.frames])
    torch.testing.assert_close(maps.patch_weights, model.patch_weights(pixels))
    assert maps.draw(tmp_path / "map.png").is_file()


def test_the_command_shares_out_the_whole_of_two_softmaxes(tmp_path: Path) -> None:
    folder = hub.save(a_model(), tmp_path / "model")
    picture().save(tmp_path / "picture.png")
    arguments = ["attend", str(folder), QUESTION, "--image", f"{tmp_path}/picture.png", "-o", f"{tmp_path}/map.png"]
    shown = CliRunner().invoke(cli.app, arguments, catch_exceptions=False).output
    shares = [int(share) for share in re.findall(r"(\d+) %", shown)]
    assert min(shares[:2]) > 0
    assert abs(sum(shares) - 100) <= 1


# Configurations


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"image_order": "sideways"}, "image_order is 'natural' or 'upstream'"),
        ({"empty_branch": "uniform"}, "give 'zero' or 'upstream'"),
        ({"empty_branch": "zero", "rule": "causal"}, "for the rule 'mmca'"),
        ({"empty_branch": "zero", "rule_options": {"empty": "uniform"}}, "without rule_options"),
        ({"projection": "vit"}, "'vit' with 'mmzoo_qwen_vit'"),
        ({"projection": "linear", "vision_config": CLIP}, "'linear' with 'clip_vision_model'"),
        ({"vision_config": {"hidden_size": 16, "num_attention_heads": 2}}, "not 'siglip_vision_model'"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        mmzoo.create("visualchat-tiny", **overrides)


def test_a_saved_model_keeps_its_options(tmp_path: Path) -> None:
    model = a_model(empty_branch="upstream", image_order="upstream", own_prompt_embeddings=True, vision_config=CLIP)
    model.processor.num_vision_tokens = 17
    hub.save(model, tmp_path / "model")
    again = mmzoo.load(str(tmp_path / "model"))
    assert again.rule == model.rule
    assert again.config.image_order == "upstream"
    batch = again.processor.chat(ROUNDS)
    assert greedy(again, batch) == greedy(model, model.processor.chat(ROUNDS))
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("attention", ["flex_attention", "varlen"])
def test_a_uniform_fallback_has_no_fused_form(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmzoo.attention.backends import BACKENDS

    monkeypatch.setattr(type(BACKENDS[attention]), "refuses", lambda *_: None)
    model = a_model(rule_options={"empty": "uniform"})
    with pytest.raises(UnsupportedMask, match="uniform fallback needs the dense mask"):
        model.set_attention(attention)


@pytest.mark.parametrize("built", [lambda: VisualChat(VisualChatConfig(**CONFIGS["visualchat-tiny"])), a_model])
def test_a_pair_of_rules_never_meets_attention_for_one(built: Callable[[], VisualChat]) -> None:
    model = built().eval()
    ids = torch.zeros(1, 5, dtype=torch.long)
    assert model.lang_decoder.config._attn_implementation == "mmzoo_sdpa_pair"
    model(ids)
    model.lang_decoder.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedMask, match="mmca-image \\+ mmca-text.*call set_attention"):
        model(ids)
    model.set_attention("eager")
    model(ids)
    with pytest.raises(UnsupportedMask, match="two or four channels"):
        model.lang_decoder(ids)


# Two embedding tables


def test_prompts_and_decoded_tokens_have_tables_of_their_own() -> None:
    model = a_model(own_prompt_embeddings=True)
    batch = model.processor.chat(ROUNDS)
    outputs = model.generate(
        **batch, max_new_tokens=4, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    layout, said = TokenLayout(batch["layout"]), outputs.sequences[:, batch["input_ids"].shape[1] :]
    prompt = model.embed(batch["input_ids"], layout, batch["pixel_values"])
    text = ~layout.visual
    assert torch.equal(prompt[text], model.lang_embed(batch["input_ids"])[text])
    embeds = torch.cat([prompt, model.lang_decoder.get_input_embeddings()(said)], 1)
    full = model(inputs_embeds=embeds, layout=layout.with_answer(4)).logits
    torch.testing.assert_close(torch.stack(outputs.logits, 1), full[:, -5:-1], atol=1e-4, rtol=1e-4)
    maps = model.attend(picture(), QUESTION, max_new_tokens=3)
    with model._eager():
        inputs = model.processor.ask(QUESTION, image=picture())
        steps = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
        )
    last = torch.stack([layer[0, :, -1] for layer in steps.attentions[-1]])
    torch.testing.assert_close(maps.weights[:, :, -1, : last.shape[-1]], last)


def test_a_new_table_is_a_copy() -> None:
    model = mmzoo.create("visualchat-tiny", own_prompt_embeddings=True)
    assert torch.equal(model.lang_embed.weight, model.lang_decoder.get_input_embeddings().weight)
    assert model.lang_embed.weight is not model.lang_decoder.get_input_embeddings().weight
    assert mmzoo.create("visualchat-tiny").lang_embed is None


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 2}])
def test_what_would_mix_the_tables_is_refused(options: dict[str, Any]) -> None:
    model = a_model(own_prompt_embeddings=True)
    with pytest.raises(InputError, match=f"two tables, which {next(iter(options))}"):
        greedy(model, model.processor.chat(conversations()[1]), **options)
    single = a_model()
    batch = single.processor.chat(conversations()[1] if "prefill_chunk_size" in options else ROUNDS)
    assert greedy(single, batch, **options) == greedy(single, batch)


def test_a_prefill_with_images_is_not_cut() -> None:
    model = a_model()
    with pytest.raises(InputError, match="all media have to stand in the first chunk"):
        greedy(model, model.processor.chat(ROUNDS), prefill_chunk_size=8)


def test_the_example_draws_both_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).resolve().parent.parent / "scripts" / "examples" / "visualchat.py"
    runpy.run_path(str(path))["main"]()
    with Image.open(tmp_path / "visualchat_masks.png") as drawn:
        assert drawn.width > 1.5 * drawn.height
    assert "image x4 | text x" in capsys.readouterr().out


# Towers


def test_positions_are_resized_to_the_patches() -> None:
    torch.manual_seed(0)
    tower = QwenVisionTransformer(QwenVisionConfig(**CONFIGS["visualchat-tiny"]["vision_config"])).eval()
    assert tower.positional_embedding.shape == (4, 24)
    assert tower.patches(torch.randn(1, 3, 32, 32)).shape == (1, 16, 24)
    table = torch.arange(4.0)[:, None]
    assert torch.equal(resized(table, 4), table)
    larger = resized(table, 16)[:, 0].unflatten(0, (4, 4))
    assert bool((larger.diff(dim=0) > 0).all()) and bool((larger.diff(dim=1) > 0).all())


def test_the_tower_is_taken_out_of_a_whole_qwen_vl() -> None:
    tower = QwenVisionTransformer(QwenVisionConfig(**CONFIGS["visualchat-tiny"]["vision_config"]))
    whole = {f"transformer.visual.{name}": tensor for name, tensor in tower.state_dict().items()}
    whole |= {"transformer.visual.proj": torch.zeros(2, 2), "transformer.wte.weight": torch.zeros(2, 2)}
    assert tower_weights(whole).keys() == tower.state_dict().keys()


def _qwen_tower() -> dict[str, tuple[int, ...]]:
    """Names and shapes of Qwen-VL's tower without its last matrix, as its specification gives them."""
    d, wide, out = 1664, 8192, 4096
    names: dict[str, tuple[int, ...]] = {"conv1.weight": (d, 3, 14, 14), "positional_embedding": (256, d)}

    def add(name: str, *shape: int) -> None:
        names.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    add("ln_pre", d)
    for n in range(48):
        block = f"transformer.resblocks.{n}"
        add(f"{block}.ln_1", d)
        add(f"{block}.ln_2", d)
        add(f"{block}.attn.in_proj", 3 * d, d)
        add(f"{block}.attn.out_proj", d, d)
        add(f"{block}.mlp.c_fc", wide, d)
        add(f"{block}.mlp.c_proj", d, wide)
    pool = "attn_pool"
    names |= {f"{pool}.query": (256, out), f"{pool}.pos_embed": (256, out), f"{pool}.kv_proj.weight": (out, d)}
    names |= {f"{pool}.attn.in_proj_weight": (3 * out, out), f"{pool}.attn.in_proj_bias": (3 * out,)}
    add(f"{pool}.attn.out_proj", out, out)
    add(f"{pool}.ln_q", out)
    add(f"{pool}.ln_kv", out)
    add("ln_post", out)
    return {f"vis_encoder.{name}": shape for name, shape in names.items()}


def test_the_large_models_have_the_names_and_shapes_of_the_specification() -> None:
    for name, width in (("visualchat-7b", 4096), ("visualchat-13b", 5120)):
        shapes = {key: tuple(x.shape) for key, x in mmzoo.create(name, device="meta").state_dict().items()}
        assert {key: shape for key, shape in shapes.items() if key.startswith("vis_encoder.")} == _qwen_tower()
        assert {key: shape for key, shape in shapes.items() if key.startswith("projection.")} == {
            "projection.0.weight": (width, 4096),
            "projection.0.bias": (width,),
            "projection.1.weight": (width,),
            "projection.1.bias": (width,),
        }
        assert (
            shapes["lang_decoder.model.embed_tokens.weight"] == shapes["lang_decoder.lm_head.weight"] == (32003, width)
        )


# What the authors' code saves


def saved(folder: Path, model: VisualChat, *, file: str = "pytorch_model.bin", **described: Any) -> Path:
    """A folder as the authors' code leaves it: CLIP's tower below `vision_model`, and with buffers."""
    folder.mkdir(exist_ok=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not isinstance(model.config.vision_config, QwenVisionConfig):
        state = {name.replace("vis_encoder.", "vis_encoder.vision_model."): tensor for name, tensor in state.items()}
        state["vis_encoder.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    state["lang_decoder.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    _write(state, folder / file)
    text = {key: value for key, value in CONFIGS["visualchat-tiny"]["text_config"].items() if key != "vocab_size"}
    config = {**text, "vocab_size": 32000, "pretraining_tp": 1, "rope_theta": 5.0, "enable_mmca_attention": True}
    config |= {"vision_config": model.config.vision_config.to_dict(), **described}
    (folder / "config.json").write_text(json.dumps(config))
    model.processor.tokenizer.save_pretrained(folder)
    return folder


def _write(state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)


def as_trained(**overrides: Any) -> VisualChat:
    """A tiny model as the authors' code trains it; its tables have a row for one more token, `### Image:`."""
    text = {**CONFIGS["visualchat-tiny"]["text_config"], "vocab_size": ROWS, **overrides.pop("text", {})}
    options = {"own_prompt_embeddings": True, "image_order": "upstream"}
    if overrides.get("rule") != "causal":
        options["empty_branch"] = "upstream"
    return a_model(text_config=text, **options, **overrides)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("tower", ["qwen", "clip, baseline", "clip, vit"])
def test_a_model_of_the_authors_is_read(tmp_path: Path, tower: str, file: str) -> None:
    model = as_trained(**TOWERS[tower])
    model.processor.num_vision_tokens = model.config.num_vision_tokens
    again = mmzoo.load(str(saved(tmp_path / "epoch-5", model, file=file)))
    assert {name: getattr(again.config, name) for name in ("projection", "image_order", "own_prompt_embeddings")} == {
        "projection": model.config.projection,
        "image_order": "upstream",
        "own_prompt_embeddings": True,
    }
    assert again.rule == model.rule
    assert again.processor.system == SYSTEM
    again.processor.system = ""
    assert again.processor.tokenizer.pad_token_id == again.processor.tokenizer.eos_token_id
    ours, theirs = model.processor.chat(ROUNDS), again.processor.chat(ROUNDS)
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    torch.testing.assert_close(again(**theirs).logits, model(**ours).logits)


def test_the_perceiver_of_the_authors_is_read(tmp_path: Path) -> None:
    model = as_trained(text={"hidden_size": 128}, vision_config=CLIP, projection="perceiver")
    model.processor.num_vision_tokens = 256
    again = mmzoo.load(str(saved(tmp_path / "epoch-5", model, hidden_size=128)))
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again.visual_tokens(pixels), model.visual_tokens(pixels))
    assert again.processor.num_vision_tokens == 256


def test_a_model_trained_without_its_attention_is_causal(tmp_path: Path) -> None:
    model = as_trained(rule="causal")
    again = mmzoo.load(str(saved(tmp_path / "epoch-5", model, enable_mmca_attention=False)))
    again.processor.system = ""
    batch = again.processor.chat(ROUNDS)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_every_name_and_shape_has_to_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path / "epoch-5", as_trained())
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["projection.1.weight"] = torch.zeros(3)
    state["surplus"] = state.pop("vis_encoder.ln_post.bias")
    _write(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as raised:
        mmzoo.load(str(folder))
    assert raised.value.missing == ["vis_encoder.ln_post.bias"]
    assert raised.value.unexpected == ["surplus"]
    assert raised.value.misshapen == [("projection.1.weight", (3,), (32,))]


def _no_projection(folder: Path) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("projection")}
    _write(kept, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_no_projection, "holds no projection"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "holds no tokenizer"),
        (
            lambda folder: word_tokenizer([f"w{i}" for i in range(200)]).save_pretrained(folder),
            "has 211 tokens, the checkpoint's tables 64 rows",
        ),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"no weights"), "is damaged"),
        (lambda folder: (folder / "pytorch_model.bin").unlink(), "lacks the file model.safetensors"),
    ],
)
def test_a_spoilt_folder_is_refused(tmp_path: Path, spoil: Callable[[Path], Any], said: str) -> None:
    folder = saved(tmp_path / "epoch-5", as_trained())
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        mmzoo.load(str(folder))


@pytest.mark.parametrize("tower", TOWERS)
def test_features_on_a_grid_are_those_of_the_patches(tower: str) -> None:
    """A change of one patch's pixels changes most of all what stands for that patch."""
    model = mmzoo.create("visualchat-tiny", **TOWERS[tower])
    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    pixels = torch.rand(1, 3, side, side)
    changed = pixels.clone()
    changed[:, :, :patch, patch : 2 * patch] += 1
    with torch.no_grad():
        moved = (model.grid_features(changed) - model.grid_features(pixels)).norm(dim=-1)[0]
    assert moved.shape == ((side // patch) ** 2,)
    assert int(moved.argmax()) == 1
