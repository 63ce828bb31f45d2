"""CCA-LLaVA beyond what every model is tested for: grids, several images, and what may follow a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

import mmzoo
from mmzoo.attention import prefill_cuts
from mmzoo.errors import UnsupportedMask
from mmzoo.language import CACHE, MultimodalLM
from mmzoo.layout import TokenLayout, image, lay_out, text
from mmzoo.models import cca_llava, llava


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def a_model(**overrides: Any) -> MultimodalLM:
    """Weights large enough for every token to matter."""
    torch.manual_seed(0)
    model = mmzoo.create("cca-llava-tiny", **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


TEXTS = ["<|user|> what <image> colour <|assistant|>", "<|user|> which <|assistant|>", "<image> is there a <image> red"]
IMAGES = [[picture(0)], [], [picture(1), picture(2)]]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_every_sample_of_a_batch_has_its_own_positions_and_mask(padding_side: str) -> None:
    model = a_model()
    batch = model.processor(TEXTS, images=IMAGES, padding_side=padding_side)
    logits, valid = model(**batch).logits, TokenLayout(batch["layout"]).valid
    for i, (one, pictures) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        alone = model(**model.processor(one, images=pictures)).logits[0]
        torch.testing.assert_close(logits[i, valid[i]], alone, atol=1e-4, rtol=1e-4)


def test_a_mixed_batch_answers_as_its_samples_do() -> None:
    model, options = a_model(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(**model.processor(TEXTS, images=IMAGES), **options)[:, -6:]
    for i, (one, pictures) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        alone = model.generate(**model.processor(one, images=pictures), **options)[:, -6:]
        assert together[i].tolist() == alone[0].tolist()


def test_an_image_costs_as_many_positions_as_it_has_rings() -> None:
    model = a_model()
    layout = TokenLayout(model.processor(TEXTS[2], images=IMAGES[2])["layout"])
    ring = [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    first, second = ([start + one for one in ring] for start in (1, 6))
    assert model.scheme(layout)[0].tolist() == [0, *first, 3, 4, 5, *second, 8]


@pytest.mark.parametrize("name", ["rule", "scheme"])
def test_rule_and_scheme_both_matter(name: str) -> None:
    plain = {"rule": "causal", "scheme": "sequential"}
    logits = []
    for overrides in ({}, {name: plain[name]}):
        model = a_model(**overrides)
        logits.append(model(**model.processor.ask("what colour", image=picture())).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_text_alone_is_plainly_causal() -> None:
    concentric, plain = a_model(), a_model(rule="causal", scheme="sequential")
    inputs = concentric.processor.ask("what colour is the square")
    torch.testing.assert_close(concentric(**inputs).logits, plain(**inputs).logits)


def test_an_odd_grid_is_a_grid() -> None:
    vision = {**llava.TINY["vision_config"], "image_size": 35}
    model = a_model(vision_config=vision)
    answer = model.ask(picture(), "what colour", max_new_tokens=2)
    assert int(answer.layout.visual.sum()) == 25
    layout = answer.layout
    assert int(model.scheme(layout)[0, -1]) == int((~layout.visual).sum()) + 3 - 1


def rectangle(model: MultimodalLM) -> tuple[TokenLayout, Tensor]:
    """Text, an image of 3 x 5 tokens, text: layout and embeddings."""
    layout = lay_out(text(4), image(3, 5), text(6))
    return layout, torch.randn(1, len(layout), model.config.text_config.hidden_size)


def test_several_tokens_may_follow_a_cache() -> None:
    model = a_model()
    layout, embeds = rectangle(model)
    whole = model(inputs_embeds=embeds, layout=layout).logits
    for cut in (2, 19, 21, 24):
        cache = DynamicCache(config=model.config.text_config)
        model(inputs_embeds=embeds[:, :cut], layout=layout[:cut], **{CACHE: cache})
        rest = model(inputs_embeds=embeds[:, cut:], layout=layout, **{CACHE: cache}).logits
        torch.testing.assert_close(rest, whole[:, cut:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("following", [1, 4])
def test_a_cache_may_not_end_inside_an_image(following: int) -> None:
    model = a_model()
    layout, embeds = rectangle(model)
    assert prefill_cuts(model.rule, layout) == [1, 2, 3, 4, 19, 20, 21, 22, 23, 24]
    cache = DynamicCache(config=model.config.text_config)
    model(inputs_embeds=embeds[:, :9], layout=layout[:9], **{CACHE: cache})
    end = 9 + following
    with pytest.raises(
        UnsupportedMask, match="concentric-causal.*ends at token 9, where earlier tokens see later ones"
    ):
        model(inputs_embeds=embeds[:, 9:end], layout=layout[:end], **{CACHE: cache})


def test_a_prefill_is_not_cut_inside_an_image() -> None:
    model = a_model()
    inputs = model.processor.ask("what colour is the square", image=picture())
    with pytest.raises(UnsupportedMask, match="prefill_chunk_size=8 cuts at token 8"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


def test_an_image_may_follow_a_cache() -> None:
    model = a_model()
    inputs = model.processor("what <image> is <image> red", images=[picture(0), picture(1)])
    ids, layout, pixels = inputs["input_ids"], TokenLayout(inputs["layout"]), inputs["pixel_values"]
    cut = 19
    assert layout.visual[0, [cut - 2, cut - 1, cut]].tolist() == [True, False, True]
    cache = DynamicCache(config=model.config.text_config)
    first = model(ids[:, :cut], layout[:cut], pixels[:, :1], **{CACHE: cache}).logits
    second = model(ids[:, cut:], layout, pixels[:, 1:], **{CACHE: cache}).logits
    torch.testing.assert_close(torch.cat([first, second], 1), model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_the_small_sibling_fits_its_budget() -> None:
    config = cca_llava.CCALlavaConfig(**cca_llava.CONFIGS["cca-nano"])
    model = cca_llava.CCALlava._from_config(config).eval()
    model.processor = cca_llava.processor("cca-nano", config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 500_000
    answer = model.ask(np.zeros((8, 32, 32, 3), np.uint8), "which way does the red object move", max_new_tokens=2)
    assert int(answer.layout.visual.sum()) == 8 * 16
    unknown = model.processor.tokenizer.unk_token_id
    assert unknown not in model.processor.ask("which way does the red object move")["input_ids"]
