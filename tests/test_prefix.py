"""Many questions after one beginning, whose keys and values exist once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_language import GREEDY, a_model, ids_for
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache

from mmzoo.attention import backends, compact
from mmzoo.attention.prefix import PrefixCache, batch_after
from mmzoo.attention.transformers import implementations
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.language import CACHE, LanguageModel
from mmzoo.layout import TokenLayout, image, lay_out, text, video
from mmzoo_kernels.softmax import fast_softmax_attention, softmax_attention

QUESTIONS = (3, 5, 1)
LAYOUTS = [lay_out(text(2), video(3, 2, 2), text(count)) for count in QUESTIONS]
P = 14
Choose = Callable[[LanguageModel, str], None]


def questions() -> tuple[TokenLayout, Tensor, list[Tensor]]:
    """Layout and ids of the batch, and the ids of each question alone."""
    beginning = ids_for(LAYOUTS[0][:P])
    alone = [torch.cat([beginning, ids_for(layout[P:], i + 1)], 1) for i, layout in enumerate(LAYOUTS)]
    layout = batch_after(LAYOUTS, P)
    ids = torch.zeros(layout.sample.shape, dtype=torch.long)
    ids[layout.valid] = torch.cat([row[0] for row in alone])
    return layout, ids, alone


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """`set_attention`, also of backends that refuse a CPU: FlexAttention as its reference, kernels interpreted."""

    def choose(model: LanguageModel, attention: str) -> None:
        if attention == "mmzoo_flash":
            pytest.importorskip("triton")
            if torch.cuda.is_available():
                pytest.skip("kernels are not interpreted where there is a GPU")
        if attention == "flex_attention":
            monkeypatch.setattr(backends, "_compiled_flex", lambda: flex_attention)
        model.language_model.config._attn_implementation = implementations(model.rule)[attention]

    return choose


def shared(model: LanguageModel, layout: TokenLayout, ids: Tensor) -> PrefixCache:
    cache = DynamicCache()
    model(ids[:1, :P], layout[:P].data[:1], use_cache=True, **{CACHE: cache})
    return PrefixCache(cache)


@pytest.mark.parametrize(
    ("backbone", "scheme", "attention"),
    [
        ("llama", "sequential", "eager"),
        ("llama", "temporal-dual", "sdpa"),
        ("qwen3", "temporal-dual", "eager"),
        ("qwen3", "sequential", "sdpa"),
        ("qwen3", "temporal-dual", "flex_attention"),
        ("llama", "sequential", "mmzoo_flash"),
    ],
)
@torch.no_grad()
def test_questions_after_a_shared_prefix_are_answered_as_alone(
    backbone: str, scheme: str, attention: str, choose: Choose
) -> None:
    model = a_model(backbone, rule="frame-block-causal", scheme=scheme)
    layout, ids, alone = questions()
    expected = [model.generate(row, one, **GREEDY)[0, -6:] for row, one in zip(alone, LAYOUTS)]
    choose(model, attention)
    prefix = shared(model, layout, ids)
    for _ in range(2):  # the second time from a fresh cache over the same prefix
        answers = model.generate(ids, layout, **{CACHE: prefix.fresh()}, **GREEDY)
        assert answers[:, -6:].tolist() == torch.stack(expected).tolist()


@pytest.mark.parametrize(
    ("rule", "attention"),
    [
        ("frame-block-causal", "eager"),
        ("frame-block-causal", "flex_attention"),
        ("sliding-window", "sdpa"),
        ("sliding-window", "mmzoo_flash"),
    ],
)
@torch.no_grad()
def test_logits_after_a_shared_prefix_equal_a_full_forward(rule: str, attention: str, choose: Choose) -> None:
    """Under a window, the later of a question's tokens see nothing of the prefix."""
    model = a_model(rule=rule)
    layout, ids, _ = questions()
    expected = model(ids, layout).logits[:, P:]
    prefix = shared(model, layout, ids)
    choose(model, attention)
    before = model.language_model.config._attn_implementation
    logits = model(ids[:, P:], layout, **{CACHE: prefix}).logits
    assert model.language_model.config._attn_implementation == before
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


@pytest.mark.parametrize(
    ("rule", "attention", "reason"),
    [
        ("frame-block-causal", "varlen", "no log-sum-exp.*'eager' or 'sdpa' or 'flex_attention' or 'mmzoo_flash'"),
        ("mmca", "eager", "single rules only"),
        ("frame-block-causal", "sdpa", "no gradient.*attention='eager'[.]$"),
    ],
)
def test_a_backend_that_cannot_attend_apart_is_refused(rule: str, attention: str, reason: str, choose: Choose) -> None:
    model = a_model(rule=rule)
    layout, ids, _ = questions()
    prefix = shared(model, layout, ids)
    choose(model, attention)
    with pytest.raises(UnsupportedMask, match=reason):
        model(ids[:, P:], layout, **{CACHE: prefix})


def test_a_beginning_that_means_something_else_to_each_question_is_refused() -> None:
    model = a_model(rule="frame-block-causal")
    layout, ids, _ = questions()
    mask = compact(model.rule, layout).rows(slice(P, None))
    value = mask.value.clone()
    value[1, 3] += 1
    with pytest.raises(UnsupportedMask, match="tokens before them differ"):
        shared(model, layout, ids).split(replace(mask, value=value), "causal")


@given(seed=st.integers(0, 99), masked=st.sampled_from([None, 1, 4]), groups=st.sampled_from([1, 2, 4]))
def test_torchs_kernels_give_their_log_sum_exp(seed: int, masked: int | None, groups: int) -> None:
    torch.manual_seed(seed)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    mask = None if masked is None else torch.rand(2, masked, 5, 9) < 0.3
    found, right = (one(query, key, value, mask, 0.3) for one in (fast_softmax_attention, softmax_attention))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


def test_torchs_kernels_give_no_gradient_and_run_on_no_other_device() -> None:
    query = torch.randn(1, 1, 2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="no backward"):
        fast_softmax_attention(query, query, query)
    with pytest.raises(ValueError, match="not on meta"), torch.no_grad():
        fast_softmax_attention(*[query.to("meta")] * 3)


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
