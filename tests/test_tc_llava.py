"""TC-LLaVA beyond what every model is tested for: clips as spans, pooling, positions, and what may follow a cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

import mmzoo
from mmzoo.attention import prefill_cuts
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.language import CACHE, MultimodalLM
from mmzoo.layout import Modality, TokenLayout, lay_out, text, video
from mmzoo.models import llava, tc_llava


def clip(seed: int = 0, frames: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 20, 30, 3), dtype=np.uint8)


def picture(seed: int = 9) -> Image.Image:
    return Image.fromarray(clip(seed, 1)[0])


def a_model(**overrides: Any) -> MultimodalLM:
    """Weights large enough for every token to matter."""
    torch.manual_seed(0)
    model = mmzoo.create("tc-llava-tiny", **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_clip_is_one_span_and_a_picture_is_an_image() -> None:
    processor = mmzoo.create("tc-llava-tiny").processor
    layout = TokenLayout(processor("what <video> is <image>", videos=[clip()], images=[picture()])["layout"])
    visual = layout.visual[0]
    assert layout.segment[0, visual].unique(return_counts=True)[1].tolist() == [16, 4]
    assert layout.frame[0, visual].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [0] * 4
    assert layout.row[0, visual].tolist() == [0, 0, 1, 1] * 5
    assert layout.column[0, visual].tolist() == [0, 1, 0, 1] * 5
    assert layout.modality[0, visual].tolist() == [int(Modality.VIDEO)] * 16 + [int(Modality.IMAGE)] * 4


def test_positions_grow_by_two_for_text_and_by_a_frame_and_its_tokens() -> None:
    model = a_model()
    model.processor.num_frames = 2
    layout = TokenLayout(model.processor("what <video> is", videos=[clip(frames=2)])["layout"])
    assert model.scheme(layout)[0].tolist() == [0, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14]
    other = a_model(scheme_options={"alpha": 0.5, "beta": 2.0}).scheme(layout)[0]
    assert other.tolist() == [0, 2.5, 5, 5.5, 6, 6.5, 9, 9.5, 10, 10.5, 13]


def test_options_of_rule_and_scheme_matter() -> None:
    logits = []
    for overrides in ({}, {"rule": "full-visual"}, {"rule": "causal"}, {"scheme_options": {"beta": 0.5}}):
        model = a_model(**overrides)
        logits.append(model(**model.processor.ask("what colour", video=clip())).logits[0, -1])
    for i in range(4):
        for j in range(i):
            assert (logits[i] - logits[j]).abs().max() > 1e-3, (i, j)


def test_tokens_are_means_of_four_patches() -> None:
    model = a_model()
    pixels = torch.randn(2, 3, 28, 28)
    patches = model.patch_features(pixels).unflatten(1, (4, 4))
    top_right = patches[:, :2, 2:].mean((1, 2))
    torch.testing.assert_close(model.visual_tokens(pixels)[:, 1], model.mm_projector(top_right))
    weights = model.patch_weights(pixels)
    assert weights.shape == (2, 4, 16)
    assert weights[1, 1].unflatten(0, (4, 4)).tolist() == [[0, 0, 0.25, 0.25]] * 2 + [[0] * 4] * 2


def test_a_grid_that_cannot_be_pooled_is_refused() -> None:
    model = a_model(vision_config={**llava.TINY["vision_config"], "image_size": 35})
    with pytest.raises(InputError, match="25 patches cannot be pooled in squares of 2 x 2"):
        model.ask(clip(), "what colour")


def test_a_mixed_batch_answers_as_its_samples_do() -> None:
    model, options = a_model(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    texts = ["<video> what <|assistant|>", "which <|assistant|>", "<image> is <video> there a <|assistant|>"]
    videos, images = [[clip(0)], [], [clip(1)]], [[], [], [picture()]]
    together = model.generate(**model.processor(texts, images=images, videos=videos), **options)[:, -6:]
    for i, one in enumerate(texts):
        alone = model.generate(**model.processor(one, images=images[i], videos=videos[i]), **options)[:, -6:]
        assert together[i].tolist() == alone[0].tolist()


def test_a_cache_may_end_between_frames_and_not_inside_one() -> None:
    model = a_model()
    layout = lay_out(text(2), video(3, 2, 2), text(3))
    embeds = torch.randn(1, len(layout), 32)
    whole = model(inputs_embeds=embeds, layout=layout).logits
    cuts = prefill_cuts(model.rule, layout)
    assert cuts == [1, 2, 6, 10, 14, 15, 16]
    for cut in range(1, len(layout)):
        cache = DynamicCache(config=model.config.text_config)
        model(inputs_embeds=embeds[:, :cut], layout=layout[:cut], **{CACHE: cache})
        rest = {"inputs_embeds": embeds[:, cut:], "layout": layout, CACHE: cache}
        if cut not in cuts:
            with pytest.raises(UnsupportedMask, match=f"ends at token {cut}"):
                model(**rest)
            continue
        torch.testing.assert_close(model(**rest).logits, whole[:, cut:], atol=1e-4, rtol=1e-4)


def test_where_an_answer_looked_is_told_by_frame() -> None:
    model = a_model()
    maps = model.attend(clip(), "what colour is the square", max_new_tokens=2)
    assert maps.by_frame().shape[-1] == 4
    assert maps.by_patch().shape[-2:] == (4, 16)
    torch.testing.assert_close(maps.by_patch().sum(-1), maps.by_frame())


def test_the_small_sibling_fits_its_budget() -> None:
    config = tc_llava.TCLlavaConfig(**tc_llava.CONFIGS["tc-llava-nano"])
    model = tc_llava.TCLlava._from_config(config).eval()
    model.processor = tc_llava.processor("tc-llava-nano", config)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 500_000
    answer = model.ask(np.zeros((8, 32, 32, 3), np.uint8), "which way does the red object move", max_new_tokens=2)
    assert int(answer.layout.visual.sum()) == 8 * 4
    assert int((answer.layout.segment[answer.layout.visual]).unique().numel()) == 1
