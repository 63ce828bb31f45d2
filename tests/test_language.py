"""Stock Hugging Face backbones driven by layout + rule + scheme."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

from mmzoo import masks, positions
from mmzoo.attention import attend, prefill_cuts
from mmzoo.attention.transformers import implementation, mask_for
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.language import CACHE, LanguageModel, MultimodalConfig
from mmzoo.layout import Role, TokenLayout, batch, image, lay_out, pack, text, video
from mmzoo.processing import word_tokenizer

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "phi3": {"model_type": "phi3"},
    "phi3, a window and no layer types": {"model_type": "phi3", "sliding_window": 6},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, sliding layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}
RULES = {
    "modality-mutual": masks.modality_mutual(),
    "frame-block-causal": masks.frame_block_causal(),
    "concentric-causal": masks.concentric_causal(),
    "sliding-window": masks.sliding_window(5),
    "prefix": masks.prefix(),
    "mmca": masks.multimodal_causal(),
    "mmca, upstream": masks.multimodal_causal(empty="uniform"),
}
SCHEMES = {
    "sequential": positions.sequential,
    "concentric": positions.concentric,
    "temporal-dual": positions.temporal_dual(beta=0.5),
}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def a_model(backbone: str = "llama", rule: str = "modality-mutual", scheme: str = "sequential") -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(MultimodalConfig(text_config={**SIZES, **BACKBONES[backbone]})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.rule, model.scheme = RULES[rule], SCHEMES[scheme]
    model.set_attention("sdpa")
    return model


def samples() -> list[TokenLayout]:
    return [
        lay_out(text(3), video(2, 2, 2), text(4)),
        lay_out(text(2), image(3, 3), text(2), image(2, 4), text(5)),
        lay_out(text(6)),
    ]


def ids_for(layout: TokenLayout, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, layout.sample.shape, generator=generator)


def a_batch(side: str = "left") -> tuple[torch.Tensor, TokenLayout, list[torch.Tensor]]:
    """Ids and layout of three samples in one batch, and the ids of each alone."""
    layouts = samples()
    alone = [ids_for(layout, seed) for seed, layout in enumerate(layouts)]
    layout = batch(layouts, side)
    ids = torch.zeros(layout.sample.shape, dtype=torch.long)
    ids[layout.valid] = torch.cat([row[0] for row in alone])
    return ids, layout, alone


@pytest.mark.parametrize("backbone", BACKBONES)
def test_text_alone_under_a_causal_rule_is_the_stock_model(backbone: str) -> None:
    model = a_model(backbone)
    model.rule = masks.causal()
    stock = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    stock.load_state_dict(model.model.state_dict())
    layout = batch([lay_out(text(9)), lay_out(text(5))], "left")
    ids, mask = ids_for(layout).masked_fill(~layout.valid, 0), layout.attention_mask
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    expected = stock(ids, attention_mask=mask, position_ids=position_ids).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[layout.valid], expected[layout.valid])
    expected_tokens = stock.generate(ids, attention_mask=mask, **GREEDY)
    assert model.generate(ids, attention_mask=mask, **GREEDY).tolist() == expected_tokens.tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rule", RULES)
def test_cached_decoding_equals_a_full_forward(rule: str, scheme: str) -> None:
    model = a_model(rule=rule, scheme=scheme)
    ids, layout, _ = a_batch()
    outputs = model.generate(ids, layout, output_logits=True, return_dict_in_generate=True, **GREEDY)
    full = model(outputs.sequences, layout.with_answer(6)).logits
    actual = torch.stack(outputs.logits, 1)
    torch.testing.assert_close(actual, full[:, ids.shape[1] - 1 : -1], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_batch_answers_as_its_samples_do(backbone: str, options: dict[str, Any]) -> None:
    model = a_model(backbone)
    ids, layout, alone = a_batch()
    together = model.generate(ids, layout, **GREEDY, **options)[:, ids.shape[1] :]
    rows = options.get("num_return_sequences", 1)
    for i, (own_ids, own_layout) in enumerate(zip(alone, samples(), strict=True)):
        single = model.generate(own_ids, own_layout, **GREEDY, **options)[:, own_ids.shape[1] :]
        assert together[i * rows : (i + 1) * rows].tolist() == single.tolist()


def test_packed_samples_answer_as_they_do_alone() -> None:
    model = a_model()
    layouts = samples()
    alone = [ids_for(layout, seed) for seed, layout in enumerate(layouts)]
    packed = model(torch.cat(alone, 1), pack(layouts)).logits[0]
    single = torch.cat([model(ids, layout).logits[0] for ids, layout in zip(alone, layouts, strict=True)])
    torch.testing.assert_close(packed, single, atol=1e-4, rtol=1e-4)


def test_the_rule_matters() -> None:
    model = a_model()
    ids, layout, _ = a_batch()
    mutual = model(ids, layout).logits
    model.rule = masks.causal()
    assert (model(ids, layout).logits - mutual)[layout.valid].abs().max() > 0.1


def test_sampling_is_reproducible_and_streams() -> None:
    model, layout = a_model(), samples()[0]
    ids = ids_for(layout)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(model.generate(ids, layout, do_sample=True, top_p=0.9, max_new_tokens=8, eos_token_id=None))
    assert drawn[0].tolist() == drawn[1].tolist()
    tokenizer = word_tokenizer([f"w{i}" for i in range(VOCABULARY - 10)])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    tokens = model.generate(ids, layout, streamer=streamer, **GREEDY)
    assert "".join(streamer) == tokenizer.decode(tokens[0, ids.shape[1] :])


def test_stop_strings_end_an_answer() -> None:
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, [])))
    tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.decoder = ByteLevel(), ByteLevelDecoder()
    config = MultimodalConfig(text_config={**SIZES, **BACKBONES["llama"], "vocab_size": len(alphabet)})
    model, layout = LanguageModel(config).eval(), samples()[0]
    ids = ids_for(layout)
    free = model.generate(ids, layout, **GREEDY)[0, ids.shape[1] :]
    seen = tokenizer.decode(free[:3])
    stopped = model.generate(ids, layout, stop_strings=[seen], tokenizer=tokenizer, **GREEDY)[0, ids.shape[1] :]
    assert stopped.tolist() == free[:3].tolist()


def test_prompt_lookup_gives_the_greedy_answer() -> None:
    model, layout = a_model(), samples()[0]
    ids = ids_for(layout)
    expected = model.generate(ids, layout, **GREEDY)
    assert model.generate(ids, layout, prompt_lookup_num_tokens=3, **GREEDY).tolist() == expected.tolist()


def test_a_prefill_may_be_cut_where_nothing_looks_ahead() -> None:
    model = a_model(rule="frame-block-causal")
    layout = samples()[0]
    ids, cache = ids_for(layout), DynamicCache()
    cuts = [0, *prefill_cuts(model.rule, layout)[1::2], len(layout)]
    parts = [
        model(ids[:, start:end], layout[:end], use_cache=True, **{CACHE: cache}).logits
        for start, end in zip(cuts, cuts[1:])
    ]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, layout).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rule", "cuts"), [("mmca", list(range(1, 9))), ("mmca, upstream", [7, 8])])
def test_a_pair_is_cut_where_neither_branch_nor_its_fallback_looks_ahead(rule: str, cuts: list[int]) -> None:
    assert prefill_cuts(RULES[rule], lay_out(text(3), image(2, 2), text(2))) == cuts


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("backbone", ["llama", "qwen2, sliding layers"])
def test_a_pair_answers_in_a_batch_as_alone(backbone: str, cache: str | None) -> None:
    model = a_model(backbone, "mmca, upstream")
    ids, layout, alone = a_batch()
    options = {**GREEDY, "num_beams": 2, "cache_implementation": cache}
    together = model.generate(ids, layout, **options)[:, ids.shape[1] :]
    for i, (own_ids, own_layout) in enumerate(zip(alone, samples(), strict=True)):
        assert together[i].tolist() == model.generate(own_ids, own_layout, **options)[0, own_ids.shape[1] :].tolist()


@pytest.mark.parametrize("rule", ["mmca", "mmca, upstream"])
def test_a_pair_attends_in_a_backbone_as_it_does_by_itself(rule: str) -> None:
    layout, branches = samples()[1], RULES[rule]
    shapes = [(1, 4, len(layout), 8), (1, 2, len(layout), 8), (1, 2, len(layout), 8)]
    mask, generator = mask_for(branches, layout, len(layout)), torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    expected = attend(*leaves, branches, layout, attention="eager").transpose(1, 2)
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weight).sum(), leaves)
    for name in ("eager", "sdpa"):
        function = AttentionInterface()[implementation(name, branches)]
        output, weights = function(module, *leaves, mask)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad((output * weight).sum(), leaves), gradients)
        if name == "eager":
            values = leaves[2].repeat_interleave(2, 1)
            torch.testing.assert_close((weights @ values).transpose(1, 2), expected)


def test_a_fallback_for_half_a_pair_or_for_one_rule_is_refused() -> None:
    clean, uniform = RULES["mmca"], RULES["mmca, upstream"]
    for rule in (uniform[0], (uniform[0], clean[1])):
        with pytest.raises(UnsupportedMask, match="uniform fallback"):
            implementation("sdpa", rule)


def test_generate_cuts_a_prefill_only_where_it_may() -> None:
    model, layout = a_model(), samples()[2]
    ids = ids_for(layout)
    expected = model.generate(ids, layout, **GREEDY)
    assert model.generate(ids, layout, prefill_chunk_size=2, **GREEDY).tolist() == expected.tolist()
    layout = samples()[0]
    with pytest.raises(UnsupportedMask, match="prefill_chunk_size=5 cuts at token 5"):
        model.generate(ids_for(layout), layout, prefill_chunk_size=5, **GREEDY)


def test_padding_on_the_right_is_no_place_to_generate() -> None:
    ids, layout, _ = a_batch("right")
    with pytest.raises(InputError, match="padding on the left"):
        a_model().generate(ids, layout, **GREEDY)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_a_backend_that_would_drop_the_mask_is_refused(attention: str) -> None:
    model, layout = a_model(), samples()[0]
    for choose in (model.set_attention, model.set_attn_implementation):
        with pytest.raises(UnsupportedMask, match=attention):
            choose(attention)
    model.model.config._attn_implementation = attention
    with pytest.raises(UnsupportedMask, match=attention):
        model(ids_for(layout), layout)


def test_labels_are_shifted_and_masked() -> None:
    model, layout = a_model(), lay_out(text(4), text(3, Role.ANSWER))
    ids = ids_for(layout)
    labels = torch.where(layout.role == Role.ANSWER, ids, -100)
    outputs = model(ids, layout, labels=labels)
    log_probabilities = outputs.logits[0].log_softmax(-1)
    expected = -torch.stack([log_probabilities[i - 1, ids[0, i]] for i in (4, 5, 6)]).mean()
    torch.testing.assert_close(outputs.loss, expected)


def test_a_padding_mask_of_another_length_is_an_error() -> None:
    model = a_model()
    with pytest.raises(InputError, match=r"\(1, 3\)"):
        model(torch.ones(1, 5, dtype=torch.long), attention_mask=torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_finished_mask_of_another_format_is_an_error(dtype: torch.dtype) -> None:
    model, (ids, layout, _) = a_model(), a_batch()
    mask, positions = model.mask(layout, len(layout)), model.scheme(layout)
    expected = model(ids, layout).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, position_ids=positions).logits, expected)
    with pytest.raises(InputError, match=f"{dtype}.*model.mask"):
        model(ids, attention_mask=mask.to(dtype), position_ids=positions)
    with pytest.raises(InputError, match="position_ids"):
        model(ids, attention_mask=mask)


def test_positions_that_transformers_would_take_for_packing_are_an_error() -> None:
    model, layout = a_model(scheme="concentric"), samples()[1]
    ids = ids_for(layout)
    restarts = torch.tensor([[*range(4), *range(len(layout) - 4)]])
    for irregular in (model.scheme(layout), restarts, 2 * torch.arange(len(layout))[None]):
        with pytest.raises(InputError, match=r"packed samples.*layout"):
            model(ids, position_ids=irregular)
    packed = model(ids, pack([lay_out(text(4)), lay_out(text(len(layout) - 4))]), position_ids=restarts)
    alone = model(ids[:, 4:]).logits
    torch.testing.assert_close(packed.logits[:, 4:], alone, atol=1e-4, rtol=1e-4)
