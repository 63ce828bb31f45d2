"""Many questions after one beginning, whose keys and values exist once."""

from __future__ import annotations

import pytest
import torch
from test_language import GREEDY, a_model, ids_for
from torch import Tensor
from transformers import DynamicCache

from mmzoo.attention.prefix import PrefixCache, batch_after
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.language import CACHE, LanguageModel
from mmzoo.layout import TokenLayout, image, lay_out, text, video

QUESTIONS = (3, 5, 1)
LAYOUTS = [lay_out(text(2), video(3, 2, 2), text(count)) for count in QUESTIONS]
P = 14


def questions() -> tuple[TokenLayout, Tensor, list[Tensor]]:
    """Layout and ids of the batch, and the ids of each question alone."""
    beginning = ids_for(LAYOUTS[0][:P])
    alone = [torch.cat([beginning, ids_for(layout[P:], i + 1)], 1) for i, layout in enumerate(LAYOUTS)]
    layout = batch_after(LAYOUTS, P)
    ids = torch.zeros(layout.sample.shape, dtype=torch.long)
    ids[layout.valid] = torch.cat([row[0] for row in alone])
    return layout, ids, alone


def shared(model: LanguageModel, layout: TokenLayout, ids: Tensor) -> PrefixCache:
    cache = DynamicCache()
    model(ids[:1, :P], layout[:P].data[:1], use_cache=True, **{CACHE: cache})
    return PrefixCache(cache)


@pytest.mark.parametrize("scheme", ["sequential", "temporal-dual"])
@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
@torch.no_grad()
def test_questions_after_a_shared_prefix_are_answered_as_alone(backbone: str, scheme: str) -> None:
    model = a_model(backbone, rule="frame-block-causal", scheme=scheme)
    layout, ids, alone = questions()
    expected = [model.generate(row, one, **GREEDY)[0, -6:] for row, one in zip(alone, LAYOUTS)]
    model.set_attention("eager")
    prefix = shared(model, layout, ids)
    for _ in range(2):  # the second time from a fresh cache over the same prefix
        answers = model.generate(ids, layout, **{CACHE: prefix.fresh()}, **GREEDY)
        assert answers[:, -6:].tolist() == torch.stack(expected).tolist()


@torch.no_grad()
def test_logits_after_a_shared_prefix_equal_a_full_forward() -> None:
    model = a_model(rule="frame-block-causal")
    layout, ids, _ = questions()
    expected = model(ids, layout).logits[:, P:]
    model.set_attention("eager")
    logits = model(ids[:, P:], layout, **{CACHE: shared(model, layout, ids)}).logits
    torch.testing.assert_close(logits[layout.valid[:, P:]], expected[layout.valid[:, P:]], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_prefix_exists_once_and_is_not_copied() -> None:
    model = a_model(rule="frame-block-causal")
    model.set_attention("eager")
    layout, ids, _ = questions()
    prefix = shared(model, layout, ids)
    cache = prefix.fresh()
    model.generate(ids, layout, **{CACHE: cache}, **GREEDY)
    for before, after in zip(prefix.layers, cache.layers):
        assert after.prefix[0].data_ptr() == before.prefix[0].data_ptr()
        assert after.prefix[0].shape[0] == 1
        assert after.keys.shape[::2] == (3, max(QUESTIONS) + 5)
        assert before.keys is None
    assert cache.get_seq_length() == P + max(QUESTIONS) + 5


def test_beams_follow_their_own_tokens() -> None:
    model = a_model(rule="frame-block-causal")
    layout, ids, alone = questions()
    beams = {**GREEDY, "num_beams": 2}
    expected = [model.generate(row, one, **beams)[0, -6:].tolist() for row, one in zip(alone, LAYOUTS)]
    model.set_attention("eager")
    answers = model.generate(ids, layout, **{CACHE: shared(model, layout, ids)}, **beams)
    assert answers[:, -6:].tolist() == expected


def test_a_prefix_that_sees_its_question_is_refused() -> None:
    model = a_model(rule="modality-mutual")
    model.set_attention("eager")
    layout, ids, _ = questions()
    with pytest.raises(UnsupportedMask, match="earlier tokens see later ones"):
        model(ids[:, P:], layout, **{CACHE: shared(model, layout, ids)})


@pytest.mark.parametrize(("rule", "attention"), [("frame-block-causal", "sdpa"), ("mmca", "eager")])
def test_a_backend_that_would_read_the_prefix_as_absent_is_refused(rule: str, attention: str) -> None:
    model = a_model(rule=rule)
    model.set_attention(attention)
    layout, ids, _ = questions()
    with pytest.raises(UnsupportedMask, match="exist once"):
        model(ids[:, P:], layout, **{CACHE: shared(model, layout, ids)})


@torch.no_grad()
def test_a_prefix_of_several_samples_is_refused() -> None:
    model = a_model(rule="frame-block-causal")
    layout, ids, _ = questions()
    cache = DynamicCache()
    model(ids, layout, use_cache=True, **{CACHE: cache})
    with pytest.raises(InputError, match="batch of one"):
        PrefixCache(cache)


def test_other_beginnings_are_refused() -> None:
    with pytest.raises(InputError, match="2 different beginnings of 9 tokens"):
        batch_after([LAYOUTS[0], lay_out(text(2), image(3, 3), text(4))], 9)
