"""Every rule on every backend against a loop over single queries; the plug into transformers; the picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layouts import GRIDS
from PIL import Image
from torch import Tensor

from mmzoo import masks
from mmzoo.attention import BACKENDS, allowed, attend, backend, draw, drawing
from mmzoo.attention.backends import Mask, eager_attention
from mmzoo.attention.drawing import CLASSES, token_classes
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import Modality, Role, Span, TokenLayout, batch, image, lay_out, pack, text, video
from mmzoo.masks import RULES, Rule, see
from mmzoo.masks.ccam import query_layout
from mmzoo.masks.rule import everything, index, not_after, visual
from mmzoo.masks.rule import text as text_class

HEADS, DIM = 4, 8
CPU = torch.device("cpu")
WORKING = [name for name, one in BACKENDS.items() if one.refuses(masks.causal(), CPU) is None]
REFUSING = [name for name in BACKENDS if name not in WORKING]


def mixed_batch(side: str) -> TokenLayout:
    """A packed row of two dialogues, a row that begins with text, and one that begins with a clip."""
    dialogue = lay_out(text(1), image(2, 2), text(2), text(2, Role.ANSWER))
    second = lay_out(image(3, 1), text(1), text(1, Role.ANSWER))
    return batch(
        [pack([dialogue, second]), lay_out(text(2), image(1, 2), text(3)), lay_out(video(2, 2), text(1))], side
    )


def latent_batch(side: str, role: Role = Role.PROMPT) -> TokenLayout:
    clip, short = (Span(Modality.LATENT, frames, 1, role=role) for frames in (7, 3))
    return batch([pack([lay_out(clip), lay_out(short)]), lay_out(clip)], side)


def clean_and_noisy(side: str) -> TokenLayout:
    halves = [Span(Modality.LATENT, 4, role=role) for role in (Role.PROMPT, Role.ANSWER)]
    return batch([lay_out(*halves), lay_out(*(Span(Modality.LATENT, 2, role=half.role) for half in halves))], side)


def projection(side: str) -> tuple[TokenLayout, TokenLayout]:
    """Two clips in one row, one in the other: six queries over seven frames, three over two."""
    clips = [(query_layout(6, 7), lay_out(video(7, 1))), (query_layout(3, 2), lay_out(video(2, 2)))]
    queries, keys = zip(*clips, strict=True)
    return batch([pack(queries), queries[1]], side), batch([pack(keys), keys[1]], side)


def scale_batch(side: str) -> TokenLayout:
    maps = [Span(Modality.LATENT, rows=n, columns=n) for n in (1, 2, 3)]
    return batch([lay_out(*maps), lay_out(*maps[:2])], side)


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sliding-window": [{"window": 3}],
    "causal-qformer": [{"direction": "future"}, {"direction": "past"}],
    "mmca": [{"empty": "zero"}, {"empty": "uniform"}],
    "block-causal": [{"frames_per_block": 3, "window": 4}],
    "sink-window": [{"window": 4, "sink_frames": 1, "frames_per_block": 2}],
    "teacher-forcing": [{"frames_per_block": 2}],
}
LAYOUTS = {
    "causal-qformer": latent_batch,
    "causal-temporal": latent_batch,
    "block-causal": latent_batch,
    "sink-window": latent_batch,
    "teacher-forcing": clean_and_noisy,
    "scale-causal": scale_batch,
    "ccam": projection,
}
CASES = [(name, options) for name in RULES for options in OPTIONS.get(name, [{}])]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[" ".join([name, *map(str, options.values())]) for name, options in CASES]
)
every_backend = pytest.mark.parametrize("attention", WORKING)


def layouts_of(name: str, side: str) -> tuple[TokenLayout, TokenLayout]:
    made = LAYOUTS.get(name, mixed_batch)(side)
    return made if isinstance(made, tuple) else (made, made)


def inputs(queries: TokenLayout, keys: TokenLayout, groups: int = HEADS, dtype: Any = torch.float64) -> list[Tensor]:
    shapes = [(HEADS, len(queries)), (groups, len(keys)), (groups, len(keys))]
    return [torch.randn(len(queries.data), *shape, DIM, dtype=dtype, requires_grad=True) for shape in shapes]


def by_single_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rule: Rule | tuple[Rule, Rule],
    queries: TokenLayout,
    keys: TokenLayout,
    scale: float = DIM**-0.5,
) -> Tensor:
    """The definition: for each row, head and query a softmax over the open keys alone."""
    rules = rule if isinstance(rule, tuple) else (rule,)
    open_pairs = [allowed(one, queries, keys) for one in rules]
    fallbacks = [None if one.fallback is None else allowed(one.fallback, queries, keys) for one in rules]
    per_group = query.shape[1] // key.shape[1]
    rows = []
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:3])).tolist():
        total = torch.zeros_like(query[b, h, q])
        for mask, fallback in zip(open_pairs, fallbacks, strict=True):
            seen = mask[b, q].nonzero()[:, 0]
            if len(seen):
                weights = (scale * key[b, h // per_group, seen] @ query[b, h, q]).exp()
                total = total + weights @ value[b, h // per_group, seen] / weights.sum()
            elif fallback is not None and fallback[b, q].any():
                total = total + value[b, h // per_group, fallback[b, q]].mean(0)
        rows.append(total)
    return torch.stack(rows).unflatten(0, query.shape[:3])


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum(), tensors)


def assert_same(actual: Tensor, expected: Tensor, tensors: list[Tensor], tolerance: float = 1e-10) -> None:
    """Equal outputs and equal gradients of all the tensors."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    for one, other in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@every_case
@every_backend
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_under_a_rule_equals_its_definition(
    name: str, options: dict[str, Any], attention: str, side: str
) -> None:
    rule, (queries, keys) = masks.rule(name, **options), layouts_of(name, side)
    tensors = inputs(queries, keys, groups=2)
    cross = () if queries is keys else (keys,)
    actual = attend(*tensors, rule, queries, *cross, attention=attention)
    assert_same(actual, by_single_queries(*tensors, rule, queries, keys), tensors)


@every_backend
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_key_heads_are_shared_by_neighbouring_query_heads(attention: str, groups: int) -> None:
    rule, layout = masks.frame_block_causal(), mixed_batch("left")
    tensors = inputs(layout, layout, groups)
    actual = attend(*tensors, rule, layout, attention=attention)
    assert_same(actual, by_single_queries(*tensors, rule, layout, layout), tensors)


@every_backend
def test_the_scale_is_used(attention: str) -> None:
    rule, layout = masks.modality_mutual(), mixed_batch("left")
    tensors = inputs(layout, layout)
    actual = attend(*tensors, rule, layout, attention=attention, scale=0.7)
    assert_same(actual, by_single_queries(*tensors, rule, layout, layout, scale=0.7), tensors)


@every_backend
@pytest.mark.parametrize("rule", [masks.modality_mutual(), masks.multimodal_causal("uniform")], ids=["mma", "mmca"])
def test_a_chunk_of_queries_attends_over_all_keys(attention: str, rule: Rule | tuple[Rule, Rule]) -> None:
    layout = mixed_batch("left")
    tensors = inputs(layout, layout)
    whole = attend(*tensors, rule, layout, attention=attention)
    chunk = attend(tensors[0][:, :, 3:7], *tensors[1:], rule, layout[3:7], layout, attention=attention)
    torch.testing.assert_close(chunk, whole[:, :, 3:7], rtol=0, atol=1e-12)


@every_backend
def test_a_function_is_attended_under(attention: str) -> None:
    def far(queries: TokenLayout, keys: TokenLayout) -> Tensor:
        return (queries.index[:, :, None] - keys.index[:, None]).abs() >= 3

    layout = mixed_batch("right")
    for rule in (Rule("far", function=far), Rule("far", function=far) | masks.sliding_window(1)):
        tensors = inputs(layout, layout)
        actual = attend(*tensors, rule, layout, attention=attention)
        assert_same(actual, by_single_queries(*tensors, rule, layout, layout), tensors)


ONLY_PICTURES = Rule("only-pictures", (see(text_class, visual, not_after(index)),))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_query_without_an_open_key_gives_exactly_zero(attention: str, dtype: torch.dtype) -> None:
    layout = batch([lay_out(text(2), image(2), text(2)), lay_out(text(3)), lay_out()], "left")
    tensors = inputs(layout, layout, groups=2, dtype=dtype)
    output = attend(*tensors, ONLY_PICTURES, layout, attention=attention)
    closed = ~allowed(ONLY_PICTURES, layout).any(-1)
    assert closed.sum() == 4 + 6 + 6
    assert (output.transpose(1, 2)[closed] == 0).all()
    assert (output.transpose(1, 2)[~closed] != 0).all()
    found = gradients(output, tensors)
    assert all(gradient.isfinite().all() and gradient.abs().max() < 100 for gradient in found)
    assert (found[0].transpose(1, 2)[closed] == 0).all()


@every_backend
def test_padding_rows_of_a_uniform_fallback_give_zero(attention: str) -> None:
    layout = batch([lay_out(text(2), image(2), text(1)), lay_out(text(1))], "left")
    tensors = inputs(layout, layout)
    output = attend(*tensors, masks.multimodal_causal("uniform"), layout, attention=attention)
    assert (output.transpose(1, 2)[~layout.valid] == 0).all()


@every_backend
def test_early_text_reads_the_mean_of_later_images_only_under_the_uniform_fallback(attention: str) -> None:
    layout = lay_out(text(1), image(2))
    query, key, value = inputs(layout, layout)
    zero, uniform = (
        attend(query, key, value, masks.multimodal_causal(empty), layout, attention=attention)[:, :, 0]
        for empty in ("zero", "uniform")
    )
    torch.testing.assert_close(zero, value[:, :, 0])
    torch.testing.assert_close(uniform, value[:, :, 0] + value.mean(2))


@every_backend
def test_a_sample_attends_as_it_would_alone(attention: str) -> None:
    alone = [lay_out(text(2), image(2, 2), text(1)), lay_out(image(2), text(2))]
    packed = pack(alone)
    tensors = inputs(packed, packed)
    together = attend(*tensors, masks.modality_mutual(), packed, attention=attention)
    parts = [[tensor[:, :, :7] for tensor in tensors], [tensor[:, :, 7:] for tensor in tensors]]
    one_by_one = [
        attend(*part, masks.modality_mutual(), layout, attention=attention)
        for part, layout in zip(parts, alone, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(one_by_one, 2), rtol=0, atol=1e-12)


def test_eager_weights_are_the_softmax_over_open_keys() -> None:
    layout = mixed_batch("left")
    mask = allowed(ONLY_PICTURES, layout)
    query, key, value = inputs(layout, layout, groups=2, dtype=torch.bfloat16)
    output, weights = eager_attention(query, key, value, mask)
    assert weights.dtype == torch.bfloat16
    assert not weights[~mask[:, None].expand_as(weights)].any()
    sums = weights.float().sum(-1)
    torch.testing.assert_close(sums, mask.any(-1)[:, None].float().expand_as(sums), rtol=0, atol=0.02)
    torch.testing.assert_close(output, weights @ value.repeat_interleave(2, 1))
    assert torch.equal(output, eager_attention(query, key, value, mask[:, None])[0])


def test_eager_drops_weights_only_when_asked() -> None:
    layout = lay_out(text(40))
    query, key, value = inputs(layout, layout)
    mask = allowed(masks.bidirectional(), layout)
    _, kept = eager_attention(query, key, value, mask)
    _, dropped = eager_attention(query, key, value, mask, dropout=0.5)
    assert (kept > 0).all()
    assert 0.4 < (dropped == 0).double().mean() < 0.6


# Refusals.


@pytest.mark.parametrize("attention", REFUSING)
@pytest.mark.parametrize("name", ["modality-mutual", "mmca"])
def test_a_backend_that_cannot_express_a_rule_refuses_it(attention: str, name: str) -> None:
    layout, rule = lay_out(text(2)), masks.rule(name)
    rule_name = rule[0].name if isinstance(rule, tuple) else rule.name
    with pytest.raises(UnsupportedMask) as refusal:
        attend(*inputs(layout, layout), rule, layout, attention=attention)
    assert (refusal.value.backend, refusal.value.rule) == (attention, rule_name)
    assert refusal.value.reason == BACKENDS[attention].refuses(rule[0] if isinstance(rule, tuple) else rule, CPU)
    for part in (repr(attention), repr(rule_name), refusal.value.reason, "'sdpa'"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("attention", [name for name in REFUSING if name.startswith("flash")])
def test_a_refusing_backend_does_not_run(attention: str) -> None:
    query, layout = torch.zeros(1, 1, 2, 4), lay_out(text(2))
    with pytest.raises(UnsupportedMask, match=attention):
        BACKENDS[attention](query, query, query, Mask(masks.causal(), layout, layout, slice(None)), 1.0)


def test_the_known_backends_run_or_refuse() -> None:
    assert {"eager", "sdpa"} <= set(WORKING)
    assert {f"flash_attention_{version}" for version in (2, 3, 4)} <= set(REFUSING)
    assert all(backend(name).name == name for name in BACKENDS)


def test_an_unknown_backend_is_an_error_that_names_the_known_ones() -> None:
    layout = lay_out(text(2))
    with pytest.raises(InputError, match="'spda'.*eager, sdpa"):
        attend(*inputs(layout, layout), masks.causal(), layout, attention="spda")


# transformers.


@pytest.fixture(scope="module")
def plug() -> Any:
    from mmzoo.attention import transformers

    return transformers


def filled(cache: Any, length: int, layers: int = 2) -> Any:
    """The cache after `length` tokens."""
    states = torch.zeros(1, 1, length, 4)
    for layer in range(layers):
        cache.update(states, states, layer)
    return cache


def qwen(**options: Any) -> Any:
    from transformers import Qwen2Config

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 16}
    return Qwen2Config(num_hidden_layers=2, vocab_size=11, **sizes, **options)


LAYOUT = batch([lay_out(text(2), image(2, 2), text(2), text(1, Role.ANSWER)), lay_out(image(2), text(3))], "left")
CACHED_RULES = [masks.modality_mutual(), masks.concentric_causal(), masks.sliding_window(3)]
every_cached_rule = pytest.mark.parametrize("rule", CACHED_RULES, ids=lambda rule: rule.name)


@every_cached_rule
@pytest.mark.parametrize("num_queries", [9, 4, 1])
def test_the_mask_without_a_cache_is_the_last_rows(plug: Any, rule: Rule, num_queries: int) -> None:
    mask = plug.mask_for(rule, LAYOUT, num_queries)
    assert mask.dtype == torch.bool
    assert torch.equal(mask[:, 0], allowed(rule, LAYOUT)[:, -num_queries:])


@every_cached_rule
@pytest.mark.parametrize("past", [0, 5, 8])
def test_the_mask_over_a_dynamic_cache_covers_the_tokens_so_far(plug: Any, rule: Rule, past: int) -> None:
    from transformers import DynamicCache

    cache = filled(DynamicCache(), past) if past else DynamicCache()
    mask = plug.mask_for(rule, LAYOUT, len(LAYOUT) - past, cache)
    assert torch.equal(mask[:, 0], allowed(rule, LAYOUT)[:, past:])


@every_cached_rule
@pytest.mark.parametrize("past", [0, 5, 8])
def test_the_mask_over_a_static_cache_closes_the_slots_to_come(plug: Any, rule: Rule, past: int) -> None:
    from transformers import StaticCache

    cache = StaticCache(qwen(), max_cache_len=14)
    if past:
        filled(cache, past)
    mask = plug.mask_for(rule, LAYOUT, len(LAYOUT) - past, cache)
    assert mask.shape == (2, 1, len(LAYOUT) - past, 14)
    assert torch.equal(mask[:, 0, :, : len(LAYOUT)], allowed(rule, LAYOUT)[:, past:])
    assert not mask[..., len(LAYOUT) :].any()


@every_cached_rule
def test_the_mask_over_a_sliding_cache_covers_the_slots_that_are_left(plug: Any, rule: Rule) -> None:
    from transformers import DynamicCache

    config = qwen(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    assert config.layer_types == ["sliding_attention"] * 2
    cache = filled(DynamicCache(config=config), 7)
    slots, first = cache.get_mask_sizes(2, 0)
    assert (slots, first) == (5, 4)
    assert torch.equal(plug.mask_for(rule, LAYOUT, 2, cache)[:, 0], allowed(rule, LAYOUT)[:, 7:, 4:])


@pytest.mark.parametrize("config", [SimpleNamespace(), SimpleNamespace(layer_types=["full_attention"] * 2)], ids=str)
def test_a_backbone_of_one_kind_of_layers_takes_one_mask(plug: Any, config: Any) -> None:
    mask = plug.backbone_mask(masks.modality_mutual(), LAYOUT, 3, None, config)
    assert torch.equal(mask, plug.mask_for(masks.modality_mutual(), LAYOUT, 3))


def sliding_config(*types: str) -> Any:
    names = [f"{name}_attention" for name in types]
    return qwen(use_sliding_window=True, sliding_window=3, layer_types=names)


@every_cached_rule
@pytest.mark.parametrize("num_queries", [9, 4, 1])
def test_a_sliding_layer_keeps_its_window_on_top_of_the_rule(plug: Any, rule: Rule, num_queries: int) -> None:
    """Keys at a distance of the window or more are closed; nearer ones, later ones too, are as the rule says."""
    mask = plug.mask_for(rule, LAYOUT, num_queries)
    by_type = plug.backbone_mask(rule, LAYOUT, num_queries, None, sliding_config("full", "sliding"))
    assert set(by_type) == {"full_attention", "sliding_attention"}
    assert torch.equal(by_type["full_attention"], mask)
    place = torch.arange(len(LAYOUT))
    back = place[-num_queries:, None] - place
    assert not by_type["sliding_attention"][..., back >= 3].any()
    assert torch.equal(by_type["sliding_attention"][..., back.abs() < 3], mask[..., back.abs() < 3])


@pytest.mark.parametrize("types", [("full", "sliding"), ("sliding", "full"), ("sliding", "sliding")])
@pytest.mark.parametrize("past", [0, 2, 7])
@pytest.mark.parametrize("static", [False, True])
def test_every_layer_gets_a_mask_over_its_own_slots(plug: Any, types: tuple[str, str], past: int, static: bool) -> None:
    from transformers import DynamicCache, StaticCache

    config, rule = sliding_config(*types), masks.causal()
    cache = StaticCache(config, max_cache_len=14) if static else DynamicCache(config=config)
    if past:
        filled(cache, past)
    num_queries = len(LAYOUT) - past
    by_type = plug.backbone_mask(rule, LAYOUT, num_queries, cache, config)
    assert set(by_type) == {f"{name}_attention" for name in types}
    whole = allowed(rule, LAYOUT)[:, past:]
    for layer, name in enumerate(config.layer_types):
        slots, first = cache.get_mask_sizes(num_queries, layer)
        window = 3 if name == "sliding_attention" else 99
        mask = by_type[name][:, 0]
        assert mask.shape == (2, num_queries, slots)
        place = torch.arange(first, first + slots)
        near = torch.arange(past, len(LAYOUT))[:, None] - place < window
        held = place < len(LAYOUT)
        assert torch.equal(mask[..., held], whole[..., place[held]] & near[:, held])
        assert not mask[..., ~held].any()


def test_a_layer_that_takes_no_mask_is_refused(plug: Any) -> None:
    config = SimpleNamespace(layer_types=["full_attention", "linear_attention"])
    with pytest.raises(UnsupportedMask, match="'linear_attention'"):
        plug.backbone_mask(masks.causal(), LAYOUT, 3, None, config)


def test_transformers_names_of_the_backends(plug: Any) -> None:
    assert plug.implementation("sdpa", masks.causal()) == "sdpa"
    assert plug.implementation("eager", masks.causal()) == "mmzoo_eager"
    with pytest.raises(UnsupportedMask, match="'flash_attention_2'.*'modality-mutual'"):
        plug.implementation("flash_attention_2", masks.modality_mutual())


@pytest.fixture(scope="module")
def backbone(plug: Any) -> Iterator[Any]:
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    yield Qwen2ForCausalLM(qwen(layer_types=["full_attention"] * 2)).eval()


@every_cached_rule
def test_a_backbone_gives_the_same_under_both_backends(plug: Any, backbone: Any, rule: Rule) -> None:
    """In rows that see something; both backends leave the others at 0, where sdpa of transformers agrees."""
    logits, gradient = [], []
    for attention in WORKING:
        backbone.set_attn_implementation(plug.implementation(attention, rule))
        embeds = torch.randn(*LAYOUT.shape[:2], 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mask = plug.mask_for(rule, LAYOUT, len(LAYOUT))
        position_ids = torch.arange(len(LAYOUT))[None]
        output = backbone(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False)
        logits.append(output.logits)
        gradient.extend(torch.autograd.grad(output.logits[LAYOUT.valid].square().sum(), [embeds]))
    for other, other_gradient in zip(logits[1:], gradient[1:], strict=True):
        torch.testing.assert_close(other, logits[0])
        torch.testing.assert_close(other_gradient, gradient[0], rtol=1e-4, atol=1e-5)


def test_the_eager_backend_decodes_under_an_ordinary_padding_mask(plug: Any, backbone: Any) -> None:
    from transformers import DynamicCache

    from mmzoo.language import CACHE

    backbone.set_attn_implementation(plug.implementation("eager", masks.causal()))
    ids = torch.randint(0, 11, (2, 6))
    for padding in (torch.ones(2, 6, dtype=torch.int64), torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])):
        cache = {CACHE: DynamicCache()}
        with torch.no_grad():
            whole = backbone(ids, attention_mask=padding).logits[:, -1]
            backbone(ids[:, :5], attention_mask=padding[:, :5], **cache)
            step = backbone(ids[:, 5:], attention_mask=padding, **cache).logits[:, -1]
        torch.testing.assert_close(step, whole)


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_the_eager_backend_refuses_what_it_would_ignore(plug: Any, argument: str) -> None:
    from transformers import AttentionInterface

    query = torch.zeros(1, 1, 2, 4)
    run = AttentionInterface()["mmzoo_eager"]
    with pytest.raises(UnsupportedMask, match=argument):
        run(torch.nn.Identity(), query, query, query, None, **{argument: torch.ones(1)})


# The picture.


def colours(path: Path) -> set[str]:
    """The colours of whole areas; the edges of letters have many others."""
    with Image.open(path) as picture:
        found = picture.convert("RGB").getcolors(maxcolors=2**24)
    return {"#{:02x}{:02x}{:02x}".format(*colour) for count, colour in found if count > 100}


PICTURED = batch([lay_out(text(2), image(2, 2), text(2), text(2, Role.ANSWER)), lay_out(video(2, 2), text(1))])


def test_a_picture_is_a_png_in_the_colours_of_its_tokens(tmp_path: Path) -> None:
    path = draw(masks.modality_mutual(), PICTURED, tmp_path / "new" / "mask.png")
    assert path == tmp_path / "new" / "mask.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    assert {CLASSES[name] for name in ("prompt text", "answer text", "image")} <= colours(path)
    assert CLASSES["video"] not in colours(path)
    assert CLASSES["padding"] not in colours(path)
    assert [file.name for file in path.parent.iterdir()] == ["mask.png"]


def test_the_row_of_the_batch_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    shown = colours(draw(masks.causal(), PICTURED, str(tmp_path / "mask.png"), row=1))
    assert {CLASSES[name] for name in ("video", "prompt text", "padding")} <= shown
    assert CLASSES["answer text"] not in shown


def test_a_pair_of_rules_is_drawn_side_by_side(tmp_path: Path) -> None:
    one, two = masks.causal(), masks.multimodal_causal()
    sizes = [Image.open(draw(rule, PICTURED, tmp_path / f"{n}.png")).size for n, rule in enumerate((one, two))]
    assert sizes[1][0] == pytest.approx(2 * sizes[0][0], abs=2)
    assert sizes[1][1] == sizes[0][1]


@pytest.mark.parametrize("grid", GRIDS[:3])
def test_queries_and_keys_may_differ_in_a_picture(tmp_path: Path, grid: tuple[int, int]) -> None:
    queries, keys = query_layout(5, 3), lay_out(video(3, *grid))
    shown = colours(draw(masks.causal_cross_attention(), queries, tmp_path / "mask.png", keys))
    assert {CLASSES["query"], CLASSES["video"]} <= shown


def test_a_dark_cell_is_an_open_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    queries = batch([query_layout(2, 1), query_layout(5, 3)])
    keys = batch([lay_out(video(1, 2)), lay_out(video(3, 2))])
    draw(masks.causal_cross_attention(), queries, tmp_path / "mask.png", keys, row=1, title="CCAM")
    (axis, *_) = figures[0].axes
    assert axis.get_title() == "CCAM"
    cells = torch.tensor(axis.images[0].get_array())
    mask = allowed(masks.causal_cross_attention(), queries, keys)[1]
    assert cells.shape == (*mask.shape, 3)
    assert (cells[~mask] > 0.95).all()
    assert (cells[mask].amin(-1) < 0.6).all()
    left, right, bottom, top = axis.images[0].get_extent()
    assert (right - left, bottom - top) == (6, 5), "keys to the right, queries downwards"


def test_a_picture_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def half(self: Figure, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half a picture")
        raise OSError("disk full")

    path = tmp_path / "mask.png"
    path.write_bytes(b"an earlier picture")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        draw(masks.causal(), PICTURED, path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("mask.png", b"an earlier picture")]
    with pytest.raises(IndexError):
        draw(masks.causal(), PICTURED, tmp_path / "other.png", row=2)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]


def test_a_mask_over_too_many_tokens_or_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MAX_DRAWN", 8)
    few, many = lay_out(text(8)), lay_out(text(9))
    draw(masks.causal(), few, tmp_path / "mask.png")
    for queries, keys in ((many, None), (few, many)):
        with pytest.raises(InputError, match="has 9 tokens; a mask is drawn over at most 8"):
            draw(masks.causal(), queries, tmp_path / "other.png", keys)
    for queries, keys in ((lay_out(), None), (few, lay_out())):
        with pytest.raises(InputError, match="no tokens"):
            draw(masks.causal(), queries, tmp_path / "other.png", keys)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]


def test_drawing_leaves_the_backend_of_matplotlib_as_it_was(tmp_path: Path) -> None:
    """In a notebook it is the user's, who wants to see later figures."""
    import matplotlib

    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        draw(masks.causal(), PICTURED, tmp_path / "mask.png")
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)


def test_drawing_leaves_no_figure_open(tmp_path: Path) -> None:
    from matplotlib import pyplot

    pyplot.close("all")
    draw(masks.causal(), PICTURED, tmp_path / "mask.png")
    with pytest.raises(IndexError):
        draw(masks.causal(), PICTURED, tmp_path / "other.png", row=2)
    assert pyplot.get_fignums() == []


def test_token_classes_are_named_for_the_legend() -> None:
    layout = batch([lay_out(text(1), text(1, Role.ANSWER), image(1), video(1, 1)), lay_out(Span(Modality.AUDIO))])
    assert token_classes(layout) == ["prompt text", "answer text", "image", "video"]
    assert token_classes(layout, 1) == ["audio", "padding", "padding", "padding"]
    assert token_classes(lay_out(Span(Modality.LATENT))) == ["latent"]
    assert {Modality(m).name.lower() for m in Modality if m != Modality.TEXT} <= set(CLASSES)


def test_attention_over_everything_is_plain_attention() -> None:
    """The tests above lean on `allowed`; this one does not."""
    layout = lay_out(text(6))
    query, key, value = inputs(layout, layout)
    plain = torch.softmax(query @ key.transpose(-1, -2) / DIM**0.5, -1) @ value
    rule = Rule(
        "all", (see(everything, everything, not_after(index)), see(everything, everything, masks.Relation("always")))
    )
    for attention in WORKING:
        torch.testing.assert_close(attend(query, key, value, rule, layout, attention=attention), plain)
