"""LLaVA beyond what every model is tested for: checkpoints in its own layout, pictures, prompts and their tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPVisionConfig

import mmzoo
from mmzoo import hub
from mmzoo.errors import CheckpointError, InputError, MissingExtra
from mmzoo.layout import Role, TokenLayout
from mmzoo.models.llava import SYSTEMS, TINY, caption, renamed

Tensors = dict[str, torch.Tensor]
MEAN = (122, 116, 104)


def picture(seed: int = 0, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece file of LLaMA's kind: merges, bytes, and a word's beginning marked by a space."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = f"{SYSTEMS['vicuna_v1']} USER: ASSISTANT: is there a dog in the image? yes no".split()
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    (folder / "corpus.txt").write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def described(tower: Path) -> dict[str, Any]:
    """config.json as LLaVA's code writes it: one flat object."""
    names = ("model_type", "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
    return {
        **{name: value for name, value in TINY["text_config"].items() if name not in names},
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": 360,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_theta": 5000.0,
        "torch_dtype": "float32",
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
        "transformers_version": "4.31.0",
    }


def write_tower(folder: Path, tensors: Tensors) -> None:
    """A whole CLIP, as OpenAI's: the tower beside a text half, in one file that torch wrote."""
    sizes = {name: value for name, value in TINY["vision_config"].items() if name != "model_type"}
    CLIPConfig(vision_config=sizes).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    others = {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.final_layer_norm.weight": torch.ones(3),
        "logit_scale": torch.ones(()),
    }
    torch.save(
        {f"vision_model.{name}": tensor for name, tensor in tensors.items()} | others, folder / "pytorch_model.bin"
    )


def write_shards(folder: Path, tensors: Tensors) -> None:
    """Two files that torch wrote, and their index."""
    names = sorted(tensors)
    halves = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for file, part in halves.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = {
        "metadata": {"total_size": 0},
        "weight_map": {name: file for file, part in halves.items() for name in part},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def split(state: Tensors) -> tuple[Tensors, Tensors]:
    """A model's tensors under LLaVA's names, and its tower's."""
    language = {name.removeprefix("lang_model."): x for name, x in state.items() if name.startswith("lang_model.")}
    projector = {f"model.{name}": x for name, x in state.items() if name.startswith("mm_projector.")}
    tower = {name.removeprefix("vision_tower."): x for name, x in state.items() if name.startswith("vision_tower.")}
    return language | projector, tower


def reference() -> mmzoo.language.MultimodalLM:
    torch.manual_seed(5)
    text = {**TINY["text_config"], "vocab_size": 360, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}
    return mmzoo.create("llava-tiny", text_config=text)


@pytest.fixture
def release(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A folder in the layout of LLaVA's releases; its tower is a folder beside it."""
    folder, tower = tmp_path / "release", tmp_path / "clip"
    folder.mkdir()
    language, vision = split(reference().state_dict())
    write_tower(tower, vision)
    write_shards(folder, {**language, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    (folder / "config.json").write_text(json.dumps(described(tower)))
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("name", "rule", "scheme"),
    [
        ("llava-1.5-7b", "causal", "sequential"),
        ("cca-llava-7b", "concentric-causal", "concentric"),
        ("tc-llava-7b", "frame-block-causal", "temporal-dual(alpha=1.0, beta=1.0)"),
    ],
)
def test_a_release_is_read_under_the_rule_of_its_name(release: Path, name: str, rule: str, scheme: str) -> None:
    model, expected = mmzoo.load(name, weights=str(release)), reference()
    assert (model.rule.name, model.scheme.name) == (rule, scheme)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    inputs = model.processor.ask("is there a dog in the image?", image=picture())
    expected.rule, expected.scheme, expected.config.pool = model.rule, model.scheme, model.config.pool
    torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
    assert model.ask(picture(), "is there a dog in the image?", max_new_tokens=3).confidence > 0


def test_a_release_has_the_type_that_it_names(release: Path) -> None:
    change(release, torch_dtype="bfloat16")
    assert mmzoo.load("llava-1.5-7b", weights=str(release)).dtype == torch.bfloat16
    assert mmzoo.load("llava-1.5-7b", weights=str(release), dtype=torch.float64).dtype == torch.float64


def test_a_tower_has_to_say_how_pictures_are_prepared(release: Path, tmp_path: Path) -> None:
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="does not say how pictures are prepared"):
        mmzoo.load("llava-1.5-7b", weights=str(release))


def test_buffers_of_earlier_versions_are_left_out() -> None:
    one = torch.zeros(1)
    language = {"model.norm.weight": one, "model.layers.0.self_attn.rotary_emb.inv_freq": one}
    tower = {"vision_model.embeddings.position_ids": one, "vision_model.pre_layrnorm.bias": one}
    assert set(renamed(language, tower)) == {"lang_model.model.norm.weight", "vision_tower.pre_layrnorm.bias"}


def test_a_release_says_how_pictures_are_fitted_and_its_family_how_many_frames(release: Path) -> None:
    change(release, image_aspect_ratio=None)
    processors = [mmzoo.load(name, weights=str(release)).processor for name in ("llava-1.5-7b", "tc-llava-7b")]
    assert [processor.image_aspect_ratio for processor in processors] == ["square", "square"]
    assert [processor.num_frames for processor in processors] == [8, 16]
    change(release, image_aspect_ratio="pad")
    assert mmzoo.load("llava-1.5-7b", weights=str(release)).processor.image_aspect_ratio == "pad"


def test_a_release_without_a_name_says_which_names_fit(release: Path) -> None:
    with pytest.raises(CheckpointError, match="fits llava-1.5-7b, cca-llava-7b, tc-llava-7b.*Load it by name"):
        mmzoo.load(str(release))


def test_the_place_of_known_weights_is_as_good_as_their_name(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "locate", lambda place, **access: release)
    assert mmzoo.load("hf-hub:xing0047/cca-llava-1.5-7b").rule.name == "concentric-causal"
    assert mmzoo.load("hf-hub:liuhaotian/llava-v1.5-7b").rule.name == "causal"


def test_a_tower_of_its_own_and_safetensors_are_read(release: Path, tmp_path: Path) -> None:
    language, vision = split(reference().state_dict())
    sizes = {name: value for name, value in TINY["vision_config"].items() if name != "model_type"}
    tower = tmp_path / "tower"
    CLIPVisionConfig(**sizes).save_pretrained(tower)
    (tower / "preprocessor_config.json").write_text((tmp_path / "clip" / "preprocessor_config.json").read_text())
    save_file(vision, tower / "model.safetensors")
    save_file(language, release / "model.safetensors")
    for shard in release.glob("*.bin*"):
        shard.unlink()
    change(release, mm_vision_tower=str(tower))
    state = mmzoo.load("llava-1.5-7b", weights=str(release)).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in reference().state_dict().items())


def test_what_does_not_fit_is_listed(release: Path, tmp_path: Path) -> None:
    language, vision = split(reference().state_dict())
    language.pop("model.mm_projector.2.bias")
    vision.pop("pre_layrnorm.weight")
    surplus = {"model.image_newline": torch.zeros(1), "model.norm.weight": torch.zeros(3)}
    write_shards(release, {**language, **surplus})
    write_tower(tmp_path / "clip", vision)
    with pytest.raises(CheckpointError) as raised:
        mmzoo.load("llava-1.5-7b", weights=str(release))
    assert raised.value.missing == ["mm_projector.2.bias", "vision_tower.pre_layrnorm.weight"]
    assert raised.value.unexpected == ["lang_model.model.image_newline"]
    assert raised.value.misshapen == [("lang_model.model.norm.weight", (3,), (32,))]


class _Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_with_code_in_it_is_refused_and_not_run(release: Path, tmp_path: Path) -> None:
    torch.save({"lm_head.weight": _Code(tmp_path / "ran")}, release / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(
        CheckpointError, match="pytorch_model-00001-of-00002.bin is damaged, or holds more than tensors"
    ):
        mmzoo.load("llava-1.5-7b", weights=str(release))
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_and_a_missing_tower_are_checkpoint_errors(release: Path, tmp_path: Path) -> None:
    change(release, mm_vision_tower=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="Cannot download hf-hub:.*nowhere"):
        mmzoo.load("llava-1.5-7b", weights=str(release))
    (release / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks the file pytorch_model-00002-of-00002.bin"):
        mmzoo.load("llava-1.5-7b", weights=str(release))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_use_im_start_end", True),
        ("image_aspect_ratio", "anyres"),
    ],
)
def test_what_a_release_asks_for_and_is_not_built_is_refused(release: Path, key: str, value: Any) -> None:
    change(release, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key} is {value!r}"):
        mmzoo.load("llava-1.5-7b", weights=str(release))


def test_older_files_are_downloaded_only_where_there_are_no_others(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo: str, revision: str | None, allow_patterns: list[str], **access: None) -> str:
        asked.append((repo, revision, "pytorch_model*.bin" in allow_patterns))
        return str(release)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.locate("hf-hub:some/thing@abc") == release
    assert asked == [("some/thing", "abc", False), ("some/thing", "abc", True)]
    asked.clear()
    (release / "model.safetensors").touch()
    assert hub.locate("hf-hub:some/thing") == release
    assert asked == [("some/thing", None, False)]


def test_a_sentencepiece_file_names_its_extra(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"mmzoo\[sentencepiece\]"):
        mmzoo.load("llava-1.5-7b", weights=str(release))


@pytest.fixture
def processor(release: Path) -> Any:
    return mmzoo.load("llava-1.5-7b", weights=str(release)).processor


def test_text_around_images_is_tokenized_piece_by_piece(processor: Any) -> None:
    def ids(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    place = processor.tokenizer.convert_tokens_to_ids("<image>")
    text = "is there <image>\na dog<image><image> in"
    expected = [1, *ids("is there "), place, *ids("\na dog"), place, place, *ids(" in")]
    assert processor.encode(text) == expected
    assert processor.encode(text, add_special_tokens=False) == expected[1:]
    assert processor.encode(text, max_length=5) == expected[:5]
    assert processor.encode(caption("a dog"))[:2] == [1, place]


def test_every_token_that_is_given_has_a_row_in_the_embedding(processor: Any) -> None:
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 360
    batch = processor("USER: <image>\nis ASSISTANT:", images=[picture()])
    layout = TokenLayout(batch["layout"])
    assert batch["input_ids"][layout.visual].tolist() == [0] * 16
    assert int(batch["input_ids"].max()) < 360


def test_questions_and_answers_take_turns(processor: Any) -> None:
    turns = [("<image>\nis there a dog in the image?", "yes"), ("is there a user?", "no")]
    text = processor.conversation(turns)
    assert text == f"{SYSTEMS['vicuna_v1']} USER: {turns[0][0]} ASSISTANT: yes</s>USER: {turns[1][0]} ASSISTANT: no</s>"
    batch = processor(text, images=[picture()], labels=True)
    layout, ids = TokenLayout(batch["layout"]), batch["input_ids"][0]
    answers = (layout.role == int(Role.ANSWER))[0]
    assert [said.strip() for said in processor.tokenizer.decode(ids[answers]).split("</s>")] == ["yes", "no", ""]
    assert layout.turn[0, answers].unique(return_counts=True)[0].tolist() == [0, 1]
    assert torch.equal(batch["labels"][0], ids.masked_fill(~answers, -100))


def test_the_prompt_asks_under_the_system_text(processor: Any) -> None:
    assert processor.prompt("why?", "<image>") == f"{SYSTEMS['vicuna_v1']} USER: <image>\nwhy? ASSISTANT:"
    processor.system = SYSTEMS["llava_v1"]
    assert processor.prompt("why?") == f"{SYSTEMS['llava_v1']} USER: why? ASSISTANT:"
    processor.system = ""
    assert processor.prompt("why?") == "USER: why? ASSISTANT:"


@pytest.mark.parametrize("size", [(20, 31), (31, 20), (24, 24)])
def test_pictures_are_padded_to_a_square_with_the_mean_colour(size: tuple[int, int]) -> None:
    processor = mmzoo.create("llava-tiny").processor
    height, width = size
    side = max(size)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, 3), MEAN, np.uint8)
    square[top : top + height, left : left + width] = np.asarray(picture(size=size))
    expected = processor.image_processor([Image.fromarray(square)], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.pixels([picture(size=size)]), expected)
    assert expected.shape == (1, 3, 28, 28)
    processor.image_aspect_ratio = "square"
    assert torch.equal(processor.pixels([picture(size=size)]), expected) == (height == width)


def test_an_unknown_way_to_fit_pictures_is_refused() -> None:
    processor = mmzoo.create("llava-tiny").processor
    with pytest.raises(InputError, match="'pad' or 'square', not 'anyres'"):
        type(processor)(processor.image_processor, processor.tokenizer, image_aspect_ratio="anyres")


def test_a_video_is_a_row_of_images() -> None:
    processor = mmzoo.create("llava-tiny").processor
    video = np.stack([np.asarray(picture(seed, (16, 16))) for seed in range(4)])
    layout = TokenLayout(processor("<video> what <image>", videos=[video], images=[picture()])["layout"])
    assert layout.segment[layout.visual].unique(return_counts=True)[1].tolist() == [16] * 5
    assert layout.row[0, layout.visual[0]].max() == layout.column[0, layout.visual[0]].max() == 3
