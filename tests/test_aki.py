"""AKI beyond what every model is tested for: the released layout, prompts, towers, media in a sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Phi3Config, SiglipVisionConfig

import mmzoo
from mmzoo.errors import CheckpointError, InputError, MissingExtra
from mmzoo.layout import TokenLayout, image, lay_out, pack
from mmzoo.models.aki import CONFIGS, SYSTEM
from mmzoo.processing import word_tokenizer
from mmzoo.world import VOCABULARY


def picture(seed: int = 0, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder in the layout of the authors' release; its base models are folders beside it."""
    tiny, tokenizer = CONFIGS["aki-tiny"], word_tokenizer(VOCABULARY)
    text_config = {key: value for key, value in tiny["text_config"].items() if key != "model_type"}
    Phi3Config(**text_config).save_pretrained(tmp_path / "base-phi")
    SiglipVisionConfig(**tiny["vision_config"]).save_pretrained(tmp_path / "base-siglip")
    tokenizer.save_pretrained(tmp_path / "base-phi")
    folder = tmp_path / "release"
    folder.mkdir()
    described = {
        "lang_model_path": str(tmp_path / "base-phi"),
        "vision_encoder_path": str(tmp_path / "base-siglip"),
        "num_vision_tokens": tiny["num_vision_tokens"],
        "initial_tokenizer_len": tiny["initial_tokenizer_len"],
        "pad_token_id": 7,
        "base_img_size": None,
        "decoder_layers_attr_name": "model.layers",
        "gradient_checkpointing": False,
        "tokenizer": None,
        "n_px": 30,
        "norm_mean": 0.5,
        "norm_std": 0.5,
    }
    (folder / "config.json").write_text(json.dumps(described))
    torch.manual_seed(3)
    # The release is at the resampler's default sizes, which its config.json does not name.
    model = mmzoo.create("aki-tiny", resampler={})
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_a_release_is_read_without_the_base_weights(release: Path) -> None:
    model = mmzoo.load(str(release))
    reference = mmzoo.create("aki-tiny", resampler={})
    reference.load_state_dict(model.state_dict())
    assert model.processor.system == SYSTEM
    model.processor.system = ""
    question = "what colour is the square"
    inputs = model.processor.ask(question, image=picture())
    expected = reference.processor.ask(question, image=picture())
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    torch.testing.assert_close(model(**inputs).logits, reference(**expected).logits)


def test_a_release_with_another_tokenizer_is_refused(release: Path) -> None:
    word_tokenizer([*VOCABULARY, "surplus"]).save_pretrained(release)
    with pytest.raises(CheckpointError, match="gives <image> the id"):
        mmzoo.load(str(release))


def test_prompt_is_the_demos() -> None:
    prompt = mmzoo.create("aki-tiny").processor.prompt("why?", "<image>")
    assert prompt == "<|user|>\n<image>\nwhy?<|end|>\n<|assistant|>\n"


def test_vlmevalkit_puts_nothing_between_image_and_text() -> None:
    prompt = mmzoo.create("aki-tiny").processor.vlmevalkit_prompt("why?")
    assert prompt == "<|user|>\n<image>why?<|end|>\n<|assistant|>\n"


def test_images_and_videos_take_their_places_in_order() -> None:
    processor = mmzoo.create("aki-tiny").processor
    video = np.stack([np.asarray(picture(seed, (16, 16))) for seed in range(4)])
    text = "<|user|> <image> what <video> is <image> <|end|> <|assistant|>"
    batch = processor(text, images=[picture(10), picture(11)], videos=[video])
    layout = TokenLayout(batch["layout"])
    assert batch["pixel_values"].shape[:2] == (1, 6)
    assert int(layout.visual.sum()) == 6 * 5
    in_order = [picture(10), *(Image.fromarray(frame) for frame in video), picture(11)]
    assert torch.equal(batch["pixel_values"][0], processor.pixels(in_order))
    assert layout.segment[layout.visual].unique(return_counts=True)[1].tolist() == [5] * 6


@pytest.mark.parametrize(
    ("text", "images", "videos"),
    [
        ("<image> <image> what", 1, 0),
        ("what", 1, 0),
        ("<video> what", 0, 0),
        ("<image> what", 0, 1),
    ],
)
def test_places_and_media_must_agree(text: str, images: int, videos: int) -> None:
    processor = mmzoo.create("aki-tiny").processor
    with pytest.raises(InputError, match="places, but"):
        processor(text, images=[picture()] * images, videos=[np.zeros((4, 8, 8, 3), np.uint8)] * videos)


def test_pixels_and_layout_must_agree() -> None:
    model = mmzoo.create("aki-tiny")
    batch = model.processor.ask("what colour is the square", image=picture())
    with pytest.raises(InputError, match="no pixel_values"):
        model(batch["input_ids"], batch["layout"])
    with pytest.raises(InputError, match="need the batch's layout"):
        model.embed(batch["input_ids"], None, batch["pixel_values"])
    with pytest.raises(InputError, match="1 images or frames in its layout, pixel_values has 0"):
        model(batch["input_ids"], batch["layout"], pixel_values=batch["pixel_values"][:, :0])


def test_ask_takes_images_and_videos(tmp_path: Path) -> None:
    model = mmzoo.create("aki-tiny")
    picture().save(tmp_path / "a.png")
    answers = [
        model.ask(source, "how many objects are there", max_new_tokens=3) for source in (picture(), tmp_path / "a.png")
    ]
    assert answers[0].text == answers[1].text
    assert answers[0].video is None
    assert 0 < answers[0].confidence <= 1
    clip = model.ask(np.zeros((6, 16, 16, 3), np.uint8), "how many objects are there", max_new_tokens=3)
    assert clip.video is not None
    assert len(clip.video.indices) == model.processor.num_frames


def test_a_model_without_processor_says_so() -> None:
    model = mmzoo.create("aki-tiny")
    model.processor = None
    with pytest.raises(InputError, match="no processor"):
        model.ask(picture(), "why")


def test_the_uncompressed_connector_gives_a_token_a_patch() -> None:
    model = mmzoo.create("aki-tiny", connector="linear", num_vision_tokens=16)
    assert model.ask(picture(), "how many objects are there", max_new_tokens=2).layout.visual.sum() == 16
    with pytest.raises(InputError, match="not 'pooling'"):
        mmzoo.create("aki-tiny", connector="pooling")


def test_frames_of_one_medium_share_its_tokens() -> None:
    model = mmzoo.create("aki-tiny")
    pixels = torch.randn(2, 3, 3, 30, 30)
    tokens = model.visual_tokens(pixels)
    assert tokens.shape == (2, 5, 32)
    torch.testing.assert_close(tokens, model.visual_tokens(pixels.flip(1)))


def test_packed_images_side_by_side_are_two_images() -> None:
    model = mmzoo.create("aki-tiny")
    pixels = model.processor.pixels([picture(0), picture(1)])
    alone = lay_out(image(5, grid=False))
    ids = torch.full((1, 10), model.config.initial_tokenizer_len)
    packed = model.embed(ids, pack([alone, alone]), pixels[None])
    singles = [model.embed(ids[:, :5], alone, one[None, None]) for one in pixels]
    torch.testing.assert_close(packed, torch.cat(singles, 1))


TIMM_SIZES = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def _as_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SigLIP's tensors under timm's names; its attention holds query, key and value in one matrix."""
    names = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "encoder.layers": "blocks",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.out_proj": "attn.proj",
    }
    renamed = {}
    for name, tensor in state.items():
        if ".head." in f".{name}" or "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj", "attn.qkv")
        if name == "embeddings.position_embedding.weight":
            name, tensor = "pos_embed", tensor[None]
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def test_a_tower_through_timm_is_the_same_tower() -> None:
    from mmzoo.encoders.vision import NamedVisionConfig, as_vision_config, build_vision_encoder

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip, width = build_vision_encoder(as_vision_config({**sizes, "image_size": 28, "patch_size": 7}))
    options = {**TIMM_SIZES, "global_pool": "", "act_layer": "gelu_tanh", "class_token": False}
    trunk, timm_width = build_vision_encoder(
        NamedVisionConfig(library="timm", name="vit_base_patch16_siglip_224", options=options)
    )
    trunk.trunk.load_state_dict(_as_timm(siglip.state_dict()))
    pixels = torch.randn(2, 3, 28, 28)
    assert width == timm_width == 24
    torch.testing.assert_close(
        trunk.eval()(pixels).last_hidden_state, siglip.eval()(pixels).last_hidden_state, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-32"])
def test_a_tower_of_open_clip_gives_patches(name: str) -> None:
    with torch.device("meta"):
        model = mmzoo.create("aki-tiny", device="meta", vision_config=f"open_clip:{name}")
        tokens = model.vision_encoder(torch.zeros(1, 3, 224, 224)).last_hidden_state
    assert tokens.shape == (1, 196 if "16" in name else 49, 768)


def test_a_timm_tower_answers() -> None:
    tower = {"model_type": "mmzoo_named_vision", "library": "timm", "name": "test_vit", "options": {"img_size": 32}}
    model = mmzoo.create("aki-tiny", vision_config=tower)
    tokens = model.visual_tokens(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, 5, 32)


@pytest.mark.parametrize(
    ("package", "tower", "extra"), [("timm", "timm:test_vit", "timm"), ("open_clip", "open_clip:ViT-B-32", "openclip")]
)
def test_a_missing_package_names_its_extra(
    package: str, tower: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingExtra, match=rf"mmzoo\[{extra}\]"):
        mmzoo.create("aki-tiny", vision_config=tower)


def _released_tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released checkpoint, as its specification lists them."""
    d, wide, llm, heads = 1152, 4304, 3072, 512

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    vision: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (d, 3, 14, 14),
        "embeddings.patch_embedding.bias": (d,),
        "embeddings.position_embedding.weight": (729, d),
        **norm("post_layernorm", d),
        "head.probe": (1, 1, d),
        "head.attention.in_proj_weight": (3 * d, d),
        "head.attention.in_proj_bias": (3 * d,),
        **linear("head.attention.out_proj", d, d),
        **norm("head.layernorm", d),
        **linear("head.mlp.fc1", wide, d),
        **linear("head.mlp.fc2", d, wide),
    }
    for n in range(27):
        layer = f"encoder.layers.{n}"
        for part in ("q", "k", "v", "out"):
            vision |= linear(f"{layer}.self_attn.{part}_proj", d, d)
        vision |= norm(f"{layer}.layer_norm1", d) | norm(f"{layer}.layer_norm2", d)
        vision |= linear(f"{layer}.mlp.fc1", wide, d) | linear(f"{layer}.mlp.fc2", d, wide)
    resampler: dict[str, tuple[int, ...]] = {"latents": (144, d), **linear("projection", llm, d), **norm("norm", d)}
    for n in range(6):
        resampler |= norm(f"layers.{n}.0.norm_media", d) | norm(f"layers.{n}.0.norm_latents", d)
        resampler |= norm(f"layers.{n}.1.0", d)
        resampler[f"layers.{n}.0.to_q.weight"] = (heads, d)
        resampler[f"layers.{n}.0.to_kv.weight"] = (2 * heads, d)
        resampler[f"layers.{n}.0.to_out.weight"] = (d, heads)
        resampler[f"layers.{n}.1.1.weight"] = (4 * d, d)
        resampler[f"layers.{n}.1.3.weight"] = (d, 4 * d)
    language: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32064, llm),
        "model.embed_tokens.additional_embedding.weight": (2, llm),
        "model.norm.weight": (llm,),
        **linear("lm_head", 32064, llm),
        **linear("lm_head.additional_fc", 2, llm),
    }
    for n in range(32):
        layer = f"model.layers.{n}"
        language[f"{layer}.self_attn.qkv_proj.weight"] = (3 * llm, llm)
        language[f"{layer}.self_attn.o_proj.weight"] = (llm, llm)
        language[f"{layer}.mlp.gate_up_proj.weight"] = (2 * 8192, llm)
        language[f"{layer}.mlp.down_proj.weight"] = (llm, 8192)
        language[f"{layer}.input_layernorm.weight"] = language[f"{layer}.post_attention_layernorm.weight"] = (llm,)
    parts = {"vision_encoder": vision, "vision_tokenizer": resampler, "lang_model": language}
    assert {name: len(part) for name, part in parts.items()} == {
        "vision_encoder": 448,
        "vision_tokenizer": 71,
        "lang_model": 199,
    }
    return {f"{prefix}.{name}": shape for prefix, part in parts.items() for name, shape in part.items()}


def test_aki_4b_has_the_names_and_shapes_of_the_release() -> None:
    state = mmzoo.create("aki-4b", device="meta").state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == _released_tensors()
