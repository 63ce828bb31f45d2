"""What only a GPU can show. Run with `pytest -m gpu`, and with `-n 8` (pytest-xdist) where there are cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mmzoo
from mmzoo import masks
from mmzoo.attention import attend
from mmzoo.attention.backends import BACKENDS
from mmzoo.attention.verdicts import EXAMPLES, SCENARIOS, verdict
from mmzoo.layout import TokenLayout, batch, lay_out, pack, text, video
from mmzoo.world import make_clip
from mmzoo_kernels.contexts import (
    TEXT,
    Chunks,
    mixture_of_contexts,
    naive_mixture_of_contexts,
    route,
    torch_varlen,
)
from mmzoo_kernels.softmax import fast_softmax_attention, softmax_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
FUSED = ("flex_attention", "varlen", "mmzoo_flash")


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("rule", EXAMPLES)
def test_every_rule_is_equal_or_refused(rule: str, attention: str) -> None:
    for scenario in SCENARIOS:
        here, there = (verdict(rule, attention, scenario, device) for device in ("cuda", "cpu"))
        expected = {"contents equal": "equal"}.get(there.kind, there.kind)
        assert here.kind == expected, (scenario, here, there)


def a_batch(lengths: tuple[int, ...], frames: int = 3, side: int = 9) -> TokenLayout:
    rows = [lay_out(text(n), video(frames, side, side), text(n)) for n in lengths]
    return batch([pack(rows[:2]), rows[-1]], "left").to("cuda")


@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 8, 64), (8, 2, 128), (14, 2, 80)])
@pytest.mark.parametrize("attention", FUSED)
def test_larger_layouts_in_bfloat16(attention: str, heads: int, groups: int, head_dim: int) -> None:
    """Lengths that are no multiple of a tile, packed and padded rows, grouped heads; NaN where nothing is written."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    layout, rule = a_batch((45, 20, 83)), masks.frame_block_causal()
    shapes = [(2, n, len(layout), head_dim) for n in (heads, groups, groups)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    results = []
    for name in (attention, "eager"):
        output = attend(*inputs, rule, layout, attention=name)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    for fused, eager in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, atol=6e-2, rtol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_kernels_give_their_log_sum_exp(masked: bool, dtype: torch.dtype) -> None:
    shapes = [(3, 14, 5, 64), (3, 2, 203, 64), (3, 2, 203, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
    mask = torch.rand(3, 1, 5, 203, device="cuda") < 0.3 if masked else None
    if mask is not None:
        mask[1, 0, 2] = False
    found, right = (one(*inputs, mask) for one in (fast_softmax_attention, softmax_attention))
    rounding = 2e-2 if dtype is torch.bfloat16 else 2e-3
    torch.testing.assert_close(found, right, atol=rounding, rtol=rounding)


@torch.no_grad()
def test_mixture_of_contexts_by_torchs_kernel() -> None:
    chunks = Chunks(*torch.tensor([[30, 200, 7, 90, 140], [TEXT, 0, 0, 1, 2]], device="cuda"))
    inputs = [torch.randn(2, 4, 467, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    chosen = route(*inputs[:2], chunks, 1)
    found = mixture_of_contexts(*inputs, chunks, chosen, torch_varlen)
    right = naive_mixture_of_contexts(*inputs, chunks, chosen)
    torch.testing.assert_close(found, right, atol=2e-2, rtol=2e-2)


def test_new_layouts_and_rules_of_as_many_terms_do_not_recompile() -> None:
    def run(rule: masks.Rule, layout: TokenLayout) -> None:
        tensors = [torch.randn(2, 4, len(layout), 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        attend(*tensors, rule, layout, attention="flex_attention")

    with torch.no_grad():
        for lengths in ((45, 20, 83), (70, 60, 211)):
            run(masks.modality_mutual(), a_batch(lengths))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for lengths in ((9, 8, 20), (100, 3, 45), (300, 200, 140)):
                run(masks.modality_mutual(), a_batch(lengths, frames=5))
                run(masks.frame_block_causal(), a_batch(lengths, side=4))


@pytest.mark.parametrize("rule", ["frame-block-causal", "mmca"])
@pytest.mark.parametrize("attention", FUSED)
def test_a_language_model_trains_and_answers_as_with_sdpa(attention: str, rule: str) -> None:
    from test_language import GREEDY, SIZES, LanguageModel, MultimodalConfig

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 128, "model_type": "llama"}
    model = LanguageModel(MultimodalConfig(text_config=sizes, rule=rule)).cuda()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = model.to(torch.bfloat16 if attention == "varlen" else torch.float32)
    layout = batch([lay_out(text(n), video(3, 5, 5), text(40)) for n in (3, 60, 130)], "left").to("cuda")
    ids = torch.randint(3, SIZES["vocab_size"], layout.sample.shape, device="cuda")
    found: dict[str, Any] = {}
    for name in (attention, "sdpa"):
        model.set_attention(name)
        model.zero_grad()
        loss = model(ids, layout, labels=ids.masked_fill(~layout.valid, -100)).loss
        loss.backward()
        gradient = model.get_input_embeddings().weight.grad.clone()
        found[name] = (loss.detach(), gradient, model.generate(ids, layout, **GREEDY))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if attention == "varlen" else {"atol": 1e-4, "rtol": 1e-3}
    for fused, plain in zip(found[attention][:2], found["sdpa"][:2], strict=True):
        torch.testing.assert_close(fused, plain, **tolerance)
    assert attention == "varlen" or torch.equal(found[attention][2], found["sdpa"][2])


def test_a_compiled_training_step_with_flex_attention() -> None:
    from test_language import SIZES, LanguageModel, MultimodalConfig

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 128, "model_type": "llama"}
    model = LanguageModel(MultimodalConfig(text_config=sizes, rule="modality-mutual")).cuda()
    layout = batch([lay_out(text(n), video(3, 5, 5), text(40)) for n in (3, 60)], "right").to("cuda")
    ids = torch.randint(3, SIZES["vocab_size"], layout.sample.shape, device="cuda")
    labels = ids.masked_fill(~layout.valid, -100)
    expected = model(ids, layout, labels=labels).loss
    model.set_attention("flex_attention")
    inputs = {"attention_mask": model.mask(layout, len(layout)), "position_ids": model.scheme(layout)}
    loss = torch.compile(model)(ids, labels=labels, **inputs).loss
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", mmzoo.list_models("*-nano", library="transformers", pretrained=True))
def test_what_ships_answers_on_a_gpu_as_on_a_cpu(name: str) -> None:
    clip = make_clip(0, split="test", size=32)
    questions = [question.text for question in clip.questions]
    expected = [mmzoo.load(name).ask(clip.frames, question).text for question in questions]
    for attention in ("sdpa", "flex_attention"):
        model = mmzoo.load(name, device="cuda", attention=attention)
        assert [model.ask(clip.frames, question).text for question in questions] == expected
