"""Every registered model: whoever registers one is tested without anyone remembering."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_varlen import by_definition
from torch.nn.attention.flex_attention import flex_attention
from transformers import BatchFeature, DynamicCache, StaticCache

import mmzoo
from mmzoo import hub, masks
from mmzoo.attention import backends
from mmzoo.errors import InputError, NoPretrainedWeights, UnsupportedMask
from mmzoo.language import CACHE, MultimodalLM
from mmzoo.layout import TokenLayout
from mmzoo.registry import entry

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in mmzoo.list_models() if entry(name).library == "transformers"]
SMALL = [name for name in NAMES if name.endswith(("-tiny", "-nano"))]
SHIPPED = [name for name in NAMES if (entry(name).weights or "").startswith("package:")]

# What the specifications give for the full-size models: tensors and parameters.
_LLAVA_7B = (686, 7_062_902_784)
SIZES = {
    "aki-4b": (718, 4_330_957_954),
    "llava-1.5-7b": _LLAVA_7B,
    "cca-llava-7b": _LLAVA_7B,
    "tc-llava-7b": _LLAVA_7B,
    "visualchat-7b": (888, 8_674_063_104),
    "visualchat-13b": (960, 14_955_715_328),
    "video-ccam-4b": (639, 4_240_083_488),
    "video-ccam-9b": (879, 9_249_460_768),
    "video-ccam-14b": (687, 14_381_341_216),
    "video-ccam-4b-v1.1": (639, 4_240_083_488),
    "video-ccam-9b-v1.1": (879, 9_249_460_768),
    "video-ccam-14b-v1.1": (687, 14_381_341_216),
    "video-ccam-4b-v1.2": (639, 4_240_083_488),
    "video-ccam-7b-v1.2": (783, 8_035_145_248),
    "favor-7b": (1663, 8_597_447_168),
    "favor-13b": (1735, 14_875_683_328),
    "video-salmonn-13b": (1738, 14_909_315_584),
}


def clip(seed: int, frames: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 40, 48, 3), dtype=np.uint8)


def a_model(name: str) -> MultimodalLM:
    """A small model whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    model = mmzoo.create(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def media(model: MultimodalLM, batch: BatchFeature) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in model.media_inputs}


def questions(model: MultimodalLM) -> list[str]:
    words = sorted(word for word in model.processor.tokenizer.get_vocab() if word.isalpha())[:8]
    return [" ".join(words[:length]) for length in (3, 7, 5)]


def inputs(model: MultimodalLM, rows: list[int], padding_side: str = "left") -> BatchFeature:
    asked = questions(model)
    texts = [model.processor.prompt(asked[i], "<video>" if i < 2 else "") for i in rows]
    videos = [[clip(i)] if i < 2 else [] for i in rows]
    return model.processor(texts, videos=videos, padding_side=padding_side)


def unused_parts(model: MultimodalLM) -> tuple[str, ...]:
    """Beginnings of the names of parameters that are part of released towers and have no effect."""
    if model.config.model_type == "mmzoo_favor":
        # Of the Q-Former of single frames only the queries are used; a silent film is not heard at all.
        last = (
            f"frame_qformer.encoder.layer.{model.config.qformer_config.num_hidden_layers - 1}."
            if model.frame_qformer
            else "x"
        )
        hearing = ("speech_encoder.", "connector.speech_pre_qformer_proj.", "connector.beats_pre_qformer_proj.")
        return (f"{last}intermediate.", f"{last}output.", *hearing)
    head, layer = "vision_encoder.head.", getattr(model.config, "vision_layer", None)
    if layer is None:
        return (head,)
    last = model.config.vision_config.num_hidden_layers
    layers = [f"vision_tower.encoder.layers.{n}." for n in range(last + 1 + layer, last)]
    return (head, "vision_tower.post_layernorm.", *layers)


@pytest.mark.parametrize("name", NAMES)
def test_builds_on_meta_as_its_specification_says(name: str) -> None:
    model = mmzoo.create(name, device="meta")
    state = model.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    if name in SIZES:
        assert (len(state), sum(p.numel() for p in model.parameters())) == SIZES[name]


def test_every_full_size_model_has_a_known_size() -> None:
    assert set(SIZES) == set(NAMES) - set(SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_a_tiny_twin(name: str) -> None:
    assert any(entry(small).family == entry(name).family for small in SMALL if small.endswith("-tiny"))


@pytest.mark.parametrize("name", NAMES)
def test_entry_and_model_agree(name: str) -> None:
    found, model = entry(name), mmzoo.create(name, device="meta")
    assert model.rule == masks.rule(found.rule, **model.config.rule_options)
    assert model.config.scheme == found.scheme
    options = getattr(model.config, "connector_rule_options", {})
    assert model.connector_rule == (masks.rule(found.connector_rule, **options) if found.connector_rule else None)
    assert (found.license is None) == (found.weights is None)
    if found.weights is None:
        with pytest.raises(NoPretrainedWeights, match="weights=None"):
            mmzoo.load(name)


@pytest.mark.parametrize("name", mmzoo.list_models())
def test_card_is_there_and_current(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import cards

    page = (ROOT / "model_cards" / f"{name}.md").read_text()
    assert page == cards.page(name), "run python scripts/cards.py"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", page):
        assert (ROOT / "model_cards" / picture).is_file(), f"run python scripts/draw_masks.py: {picture} is missing"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward(name: str, attention: str) -> None:
    model = a_model(name)
    model.set_attention(attention)
    batch = model.processor(
        [model.processor.prompt(question, "<video>") + question for question in questions(model)[:2]],
        videos=[[clip(0)], [clip(1)]],
        padding_side="right",
        labels=True,
    )
    outputs = model(**batch)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    outputs.loss.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trainable.items() if parameter.grad is None]
    assert all(name.startswith(unused_parts(model)) for name in without)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", SMALL)
def test_backends_agree(name: str) -> None:
    model, results = a_model(name), {}
    batch = inputs(model, [0, 1, 2])
    for attention in ("sdpa", "eager"):
        model.set_attention(attention)
        valid = TokenLayout(batch["layout"]).valid
        results[attention] = model(**batch).logits[valid]
    torch.testing.assert_close(results["sdpa"], results["eager"], atol=1e-4, rtol=1e-4)


@pytest.fixture
def fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention uncompiled, and flash with its kernel written out: what they are handed is as on a GPU."""
    flex, flash = backends.Flex(), backends.Flash("varlen", by_definition)
    for backend in (flex, flash):
        refuses = backend.refuses
        monkeypatch.setattr(
            backend, "refuses", lambda rule, device, head_dim=None, refuses=refuses: refuses(rule, torch.device("cuda"))
        )
        monkeypatch.setitem(backends.BACKENDS, backend.name, backend)
    monkeypatch.setattr(backends, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(backends.Flash, "DTYPES", (torch.float32,))


@pytest.mark.parametrize("attention", ["flex_attention", "varlen"])
@pytest.mark.parametrize("name", SMALL)
def test_fused_backends_agree_or_refuse(name: str, attention: str, fused_on_a_cpu: None) -> None:
    model = a_model(name)
    batch = inputs(model, [0, 1, 2])
    valid = TokenLayout(batch["layout"]).valid
    with torch.no_grad():
        expected = model(**batch).logits[valid]
        rules = model.rule if isinstance(model.rule, tuple) else (model.rule,)
        if any(backends.BACKENDS[attention].refuses(rule, torch.device("cpu")) for rule in rules):
            with pytest.raises(UnsupportedMask, match=attention):
                model.set_attention(attention)
            return
        model.set_attention(attention)
        torch.testing.assert_close(model(**batch).logits[valid], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", SMALL)
def test_batch_equals_singles(name: str, padding_side: str) -> None:
    model = a_model(name)
    batch = inputs(model, [0, 1, 2], padding_side)
    logits, layout = model(**batch).logits, TokenLayout(batch["layout"])
    for i in range(3):
        alone = model(**inputs(model, [i])).logits[0]
        torch.testing.assert_close(logits[i][layout.valid[i]], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("name", SMALL)
def test_batch_answers_as_its_samples_do(name: str, options: dict) -> None:
    model = a_model(name)
    batch = inputs(model, [0, 1, 2])
    length = batch["input_ids"].shape[1]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    together = model.generate(**batch, **options)[:, length:]
    for i in range(3):
        single = inputs(model, [i])
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        assert together[i].tolist() == alone[0].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SMALL)
def test_cached_decoding_equals_a_full_forward(name: str, attention: str) -> None:
    model = a_model(name)
    model.set_attention(attention)
    batch = inputs(model, [0, 1, 2])
    outputs = model.generate(
        **batch, max_new_tokens=5, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    length = batch["input_ids"].shape[1]
    layout = TokenLayout(batch["layout"]).with_answer(5)
    full = model(outputs.sequences, layout, **media(model, batch)).logits
    torch.testing.assert_close(torch.stack(outputs.logits, 1), full[:, length - 1 : -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_visual_tokens_serve_several_questions(name: str) -> None:
    model = a_model(name)
    batch = inputs(model, [0, 1, 2])
    shown = media(model, batch)
    tokens = model.encode_media(batch["layout"], **shown)
    asked = {key: value for key, value in batch.items() if key not in shown}
    torch.testing.assert_close(model(**asked, visual_embeds=tokens).logits, model(**batch).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    again = model.generate(**asked, visual_embeds=tokens, num_beams=2, **options)
    assert torch.equal(again, model.generate(**batch, num_beams=2, **options))
    with pytest.raises(InputError, match="in place of pixel_values"):
        model(**batch, visual_embeds=tokens)
    with pytest.raises(InputError, match="media in its layout, but tokens of 0"):
        model(**asked, visual_embeds=tokens[:, :0])


@pytest.mark.parametrize("name", SMALL)
def test_a_later_turn_with_its_cache_equals_the_whole_conversation(name: str) -> None:
    """The second turn brings a clip of its own; the cache holds the first turn and its answer."""
    model = a_model(name)
    model.processor.num_frames = 4  # the two clips together keep to what some families take of a conversation
    asked = questions(model)
    first = model.processor(model.processor.prompt(asked[0], "<video>"), videos=[clip(0)])
    cache, options = DynamicCache(config=model.config.text_config), {"max_new_tokens": 4, "do_sample": False}
    said = model.generate(**first, **options, eos_token_id=None, **{CACHE: cache})[0, first["input_ids"].shape[1] :]
    tokenizer = model.processor.tokenizer
    text = model.processor.prompt(asked[0], "<video>") + " ".join(tokenizer.convert_ids_to_tokens(said))
    whole = model.processor(text + "<|end|>" + model.processor.prompt(asked[1], "<video>"), videos=[clip(0), clip(1)])
    known = cache.get_seq_length()
    assert torch.equal(whole["input_ids"][0, :known], torch.cat([first["input_ids"][0], said])[:known])
    options |= {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    alone, later = model.generate(**whole, **options), model.generate(**whole, **options, **{CACHE: cache})
    assert torch.equal(alone.sequences, later.sequences)
    torch.testing.assert_close(torch.stack(alone.logits), torch.stack(later.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_a_prefill_in_chunks_does_not_lose_media(name: str) -> None:
    model = a_model(name)
    batch = inputs(model, [0])
    shown = media(model, batch)
    asked = {key: value for key, value in batch.items() if key not in shown}
    tokens = model.encode_media(batch["layout"], **shown)
    for given in (shown, {"visual_embeds": tokens}):
        with pytest.raises((InputError, UnsupportedMask), match="prefill_chunk_size=7"):
            model.generate(**asked, **given, prefill_chunk_size=7, max_new_tokens=2)
    if model.rule == masks.causal():
        last = int(TokenLayout(batch["layout"]).visual[0].nonzero().max())
        cut = model.generate(**asked, visual_embeds=tokens, prefill_chunk_size=last + 1, max_new_tokens=2)
        assert torch.equal(cut, model.generate(**batch, max_new_tokens=2))


@pytest.mark.parametrize("name", SMALL)
def test_save_and_load_round_trip(name: str, tmp_path: Path) -> None:
    model = a_model(name)
    hub.save(model, tmp_path / "model", card="# A card")
    again = mmzoo.load(str(tmp_path / "model"))
    for (key, one), (other_key, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(one, other)
    assert again.processor.to_dict() == model.processor.to_dict()
    question = questions(model)[0]
    before, after = (one.ask(clip(0), question, max_new_tokens=4) for one in (model, again))
    assert before.text == after.text
    assert before.confidence == pytest.approx(after.confidence, rel=1e-5)
    assert (tmp_path / "model" / "README.md").read_text() == "# A card"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load(name: str) -> None:
    model = mmzoo.load(name)
    assert model.processor is not None
    assert sum(parameter.numel() for parameter in model.parameters()) <= 500_000
    assert set(entry(name).sha256) == {"model.safetensors"}


def test_shipped_weights_stay_small() -> None:
    assets = ROOT / "mmzoo" / "assets"
    assert sum(path.stat().st_size for path in assets.rglob("*.safetensors")) < 10e6


def _graph_breaks(model: MultimodalLM, **inputs: object) -> list[str]:
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(**inputs)
    assert found.graph_count >= 1
    return [reason.reason for reason in found.break_reasons]


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_compiles_into_one_graph(name: str) -> None:
    model = a_model(name)
    batch = model.processor(
        [model.processor.prompt(question, "<video>") + question for question in questions(model)[:2]],
        videos=[[clip(0)], [clip(1)]],
        padding_side="right",
        labels=True,
    )
    assert _graph_breaks(model, **batch) == []


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", SMALL)
def test_a_decoding_step_compiles_into_one_graph(name: str, cache_class: type) -> None:
    model = a_model(name)
    batch = inputs(model, [0])
    length = batch["input_ids"].shape[1]
    options = {"config": model.config.text_config}
    cache = cache_class(**options) if cache_class is DynamicCache else cache_class(**options, max_cache_len=length + 8)
    with torch.no_grad():
        model(**batch, use_cache=True, **{CACHE: cache})
        layout = TokenLayout(batch["layout"]).with_answer().data
        assert _graph_breaks(model, input_ids=batch["input_ids"][:, -1:], layout=layout, **{CACHE: cache}) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_compiled_model_gives_the_same_loss_and_gradients(name: str) -> None:
    model, batch = a_model(name), None
    batch = model.processor(
        [model.processor.prompt(question, "<video>") + question for question in questions(model)[:2]],
        videos=[[clip(0)], [clip(1)]],
        padding_side="right",
        labels=True,
    )
    torch._dynamo.reset()
    losses, gradients = [], []
    for step in (model, torch.compile(model, fullgraph=True, dynamic=False)):
        model.zero_grad()
        loss = step(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        # A part that a batch does not use has no gradient, or zeros, by how the step ran.
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses)
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-3)
