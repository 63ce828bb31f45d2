"""LongLive: what the cache gives is what the rule's mask gives, whatever was evicted, recached, resumed or streamed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import mmzoo
from mmzoo import masks
from mmzoo.errors import CheckpointError, InputError
from mmzoo.models import longlive
from mmzoo.models.longlive import CONFIGS, LongLive, Stream, StreamingDecoder, example_inputs, example_options
from mmzoo.registry import entry

DATA = Path(__file__).parent / "data" / "parity" / "longlive"
SMALL = {**CONFIGS["longlive-tiny"], "sample_size": (4, 6)}  # 6 tokens a frame


def a_model(**fields: Any) -> LongLive:
    """A small model whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    model = LongLive(**{**SMALL, **fields}).eval()
    for name, parameter in model.named_parameters():
        sharp = name.endswith(("norm_q.weight", "norm_k.weight"))
        torch.nn.init.normal_(parameter, mean=1.5 * sharp, std=0.25)
    return model


def features(model: LongLive, batch: int = 1, seed: int = 0) -> Tensor:
    shape = (batch, model.config.text_length, model.config.text_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(model: LongLive, frames: int, batch: int = 1, seed: int = 1) -> Tensor:
    shape = (batch, model.config.in_channels, frames, *model.config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(model: LongLive, x: Tensor) -> tuple[Tensor, ...]:
    return x.split(model.config.frames_per_block, 2)


def fed(model: LongLive, x: Tensor, prompts: Tensor, **options: Any) -> Stream:
    """A stream that has x behind it."""
    stream = Stream(model, prompts, **options)
    for block in blocks_of(model, x):
        stream.keep(block)
    return stream


@torch.no_grad()
def last_flows(stream: Stream, block: Tensor, timesteps: tuple[float, ...]) -> list[Tensor]:
    return [stream.flow(block, timestep) for timestep in timesteps]


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 2e-3)


# What a block sees.


@settings(max_examples=12, deadline=None)
@given(
    sink=st.integers(0, 3), block=st.integers(1, 3), more=st.integers(1, 3), count=st.integers(1, 6),
    layers=st.integers(1, 3), attention=st.sampled_from(["sdpa", "eager"]),
)  # fmt: skip
def test_the_cache_gives_what_the_rule_gives_over_the_whole_clip(
    sink: int, block: int, more: int, count: int, layers: int, attention: str
) -> None:
    """At every depth, and after eviction: each frame was computed when it saw what the rule lets it see."""
    window = block * (-(-sink // block) + more)
    model = a_model(num_layers=layers, sink=sink, frames_per_block=block, window=window)
    model.set_attention(attention)
    x, prompts = latents(model, count * block), features(model)
    stream = Stream(model, prompts)
    for number, part in enumerate(blocks_of(model, x)):
        for timestep in (1000.0, 625.0):  # passes of the same block, each of which overwrites the last
            cached = last_flows(stream, part, (timestep,))[0]
            times = torch.zeros(1, number * block + block)
            times[:, number * block :] = timestep
            with torch.no_grad():
                whole = model(x[:, :, : times.shape[1]], times, prompts).sample
            assert_close(cached, whole[:, :, -block:])
        stream.keep(part)


def test_frames_that_are_seen_are_not_all_that_counts_but_in_one_layer() -> None:
    """Recomputed from the visible frames alone, a block is the same in a model of one layer, and no other."""
    for layers, equal in ((1, True), (2, False)):
        model = a_model(num_layers=layers)
        x, prompts = latents(model, 10), features(model)
        stream = fed(model, x[:, :, :8], prompts)
        cached = last_flows(stream, x[:, :, 8:], (0.0,))[0]
        seen = torch.tensor([0, 1, 6, 7, 8, 9])
        assert sorted(stream.cache.frames.frames) == seen.tolist()
        again = Stream(model, prompts)
        again.cache.frames.begin([0, 1])
        with torch.no_grad():
            for first, part in ((0, x[:, :, :2]), (6, x[:, :, 6:8]), (8, x[:, :, 8:])):
                recomputed = model(
                    part, torch.zeros(1), prompts, cache=again.cache, first_frame=first, rule=masks.bidirectional()
                ).sample
        assert differ(cached, recomputed) is not equal


def test_relative_positions_begin_anew_in_every_window() -> None:
    absolute, relative = (a_model(num_layers=1, positions=one) for one in ("absolute", "relative"))
    x, prompts = latents(absolute, 10, batch=2), features(absolute, 2)
    before = [fed(model, x[:, :, :4], prompts) for model in (absolute, relative)]
    flows = [last_flows(stream, x[:, :, 4:6], (500.0,))[0] for stream in before]
    assert_close(*flows)
    stream = fed(relative, x[:, :, :8], prompts)
    cached = last_flows(stream, x[:, :, 8:], (0.0,))[0]
    with torch.no_grad():
        seen = absolute(x[:, :, [0, 1, 6, 7, 8, 9]], torch.zeros(2), prompts, rule=masks.bidirectional()).sample
    assert_close(cached, seen[:, :, -2:])
    assert differ(cached, last_flows(fed(absolute, x[:, :, :8], prompts), x[:, :, 8:], (0.0,))[0])


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_batch_gives_what_its_clips_give(positions: str) -> None:
    model = a_model(positions=positions)
    x, prompts, later = latents(model, 8, batch=2), features(model, 2), features(model, 2, seed=5)
    both = fed(model, x, prompts)
    both.switch(later)
    block = latents(model, 2, batch=2, seed=9)
    flow = last_flows(both, block, (833.0,))[0]
    for i in range(2):
        one = fed(model, x[i, None], prompts[i, None])
        one.switch(later[i, None])
        assert_close(flow[i, None], last_flows(one, block[i, None], (833.0,))[0])


def test_no_frame_sees_a_later_block() -> None:
    model = a_model()
    x = latents(model, 6).requires_grad_()
    flow = model(x, torch.full((1, 6), 500.0), features(model)).sample
    (gradient,) = torch.autograd.grad(flow[:, :, 2:4].sum(), x)
    by_frame = gradient.abs().amax((0, 1, 3, 4))
    assert (by_frame[4:] == 0).all() and (by_frame[:4] > 0).all()


def test_it_is_diffusers_wan_where_all_see_all() -> None:
    model = a_model()
    wan = WanTransformer3DModel(**{name: model.config[name] for name in longlive._WAN}).eval()
    wan.load_state_dict(model.state_dict())
    x, timestep, prompts = latents(model, 4, batch=2), torch.tensor([937.5, 250.0]), features(model, 2)
    with torch.no_grad():
        assert_close(
            model(x, timestep, prompts, rule=masks.bidirectional()).sample,
            wan(x, timestep, prompts, return_dict=False)[0],
        )


def test_a_frame_costs_the_same_once_the_window_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = a_model(), longlive.attend
    counts: list[int] = []

    def counting(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        counts.append(key.shape[1])
        return real(query, key, *rest)

    monkeypatch.setattr(longlive, "attend", counting)
    stream, costs = Stream(model, features(model)), []
    for block in blocks_of(model, latents(model, 20)):
        counts.clear()
        stream.keep(block)
        assert set(counts[1::2]) == {model.config.text_length}
        costs.append(set(counts[::2]))
    tokens = 6
    assert costs == [{2 * tokens}, {4 * tokens}] + [{6 * tokens}] * 8
    width, number = 2 * 16, 4
    assert stream.cache.nbytes == 2 * 2 * 1 * 6 * tokens * width * number


# Changes of the prompt.


def held(stream: Stream) -> dict[int, Tensor]:
    """Frame -> the last layer's keys and values, which hang on the prompt."""
    frames = stream.cache.frames
    parts = [x[-1].unflatten(1, (frames.window, -1)) for x in (frames.keys, frames.values)]
    return {frame: torch.stack([part[:, slot] for part in parts]) for slot, frame in enumerate(frames.frames)}


def same(a: dict[int, Tensor], b: dict[int, Tensor], frames: set[int]) -> bool:
    return all(torch.allclose(a[frame], b[frame], atol=2e-5) for frame in frames)


def test_a_block_causal_recache_is_the_clip_made_under_the_new_prompt() -> None:
    model = a_model()
    x, prompts = latents(model, 6), features(model, 2)
    stream = fed(model, x, prompts[:1], recache="block-causal")
    before = held(stream)
    stream.switch(prompts[1:])
    assert same(held(stream), held(fed(model, x, prompts[1:])), set(range(6)))
    assert not any(same(held(stream), before, {frame}) for frame in range(6))
    both_ways = fed(model, x, prompts[:1])
    both_ways.switch(prompts[1:])
    assert not any(same(held(stream), held(both_ways), {frame}) for frame in range(4))


@pytest.mark.parametrize("recache", ["bidirectional", "block-causal"])
def test_a_global_sink_stays_and_frames_that_give_way_to_it_are_not_missed(recache: str) -> None:
    model = a_model(num_layers=3)
    x, prompts = latents(model, 10), features(model, 2)
    ours, whole = (fed(model, x, prompts[:1], recache=recache) for _ in range(2))
    before = held(ours)
    ours.switch(prompts[1:])
    whole.cache.drop_text()
    with torch.no_grad():  # as the authors' code: all frames of the window, of which the sink's number is not kept
        options = {"cache": whole.cache, "first_frame": 4, "keep_sink": True, "rule": whole.recache_rule}
        model(x[:, :, 4:], torch.zeros(1), prompts[1:], **options)
    assert set(before) == {0, 1, 6, 7, 8, 9}
    assert same(held(ours), held(whole), set(before))
    assert same(held(ours), before, {0, 1})
    assert not any(same(held(ours), before, {frame}) for frame in (6, 7, 8, 9))


def test_without_a_global_sink_the_oldest_frames_become_it() -> None:
    model = a_model()
    x, prompts = latents(model, 12), features(model, 2)
    stream = fed(model, x[:, :, :10], prompts[:1], global_sink=False)
    stream.switch(prompts[1:])
    assert set(held(stream)) == set(range(4, 10))
    kept = held(stream)
    for block in blocks_of(model, x[:, :, 10:]):
        stream.keep(block)
    stream.keep(latents(model, 2, seed=7))
    assert set(held(stream)) == {4, 5, 10, 11, 12, 13}
    assert same(held(stream), kept, {4, 5})
    resumed, block = Stream(model, prompts[:1], global_sink=False), latents(model, 2, seed=8)
    resumed.load_state_dict(saved(stream.state_dict()))
    assert torch.equal(*(last_flows(one, block, (500.0,))[0] for one in (stream, resumed)))
    few = fed(model, x[:, :, :10], prompts[:1], global_sink=False, recache_frames=4)
    few.switch(prompts[1:])
    assert set(held(few)) == {6, 7, 8, 9}


def test_the_new_prompt_rules_from_the_next_pass_on() -> None:
    model = a_model()
    x, prompts = latents(model, 4), features(model, 2)
    block = latents(model, 2, seed=3)
    stream = fed(model, x, prompts[:1], recache="block-causal")
    old = last_flows(stream, block, (500.0,))[0]
    stream.switch(prompts[:1])
    assert_close(old, last_flows(stream, block, (500.0,))[0])
    stream.switch(prompts[1:])
    assert differ(old, last_flows(stream, block, (500.0,))[0])
    fresh = Stream(model, prompts[:1])
    fresh.switch(prompts[1:])
    assert_close(last_flows(fresh, block, (0.0,))[0], last_flows(Stream(model, prompts[1:]), block, (0.0,))[0])


@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_a_larger_cache_than_the_window_shows_what_the_window_shows(positions: str) -> None:
    model = a_model(positions=positions)
    x, prompts = latents(model, 12), features(model)
    small, large = (fed(model, x[:, :, :10], prompts, window=window) for window in (None, 12))
    assert len(large.cache.frames.frames) == 10
    flows = [last_flows(stream, x[:, :, 10:], (625.0,))[0] for stream in (small, large)]
    assert_close(*flows)


# Gradients.


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_with_gradients_reads_the_cache_and_leaves_it(positions: str, checkpointing: bool) -> None:
    model = a_model(positions=positions)
    x, prompts = latents(model, 10), features(model)
    stream = fed(model, x[:, :, :8], prompts)
    before = held(stream)
    block = x[:, :, 8:].clone().requires_grad_()
    written = last_flows(fed(model, x[:, :, :8], prompts), block.detach(), (500.0,))[0]
    if checkpointing:
        model.enable_gradient_checkpointing()
    flow = stream.flow(block, 500.0, write=False)
    assert_close(flow.detach(), written)
    assert same(held(stream), before, {0, 1, 6, 7})
    stream.keep(block.detach())  # which overwrites what the pass saw
    (found,) = torch.autograd.grad(flow.square().sum(), block)
    if positions == "absolute":
        model.disable_gradient_checkpointing()
        times = torch.tensor([[0.0] * 8 + [500.0] * 2])
        parts = torch.cat([x[:, :, :8], again := block.detach().clone().requires_grad_()], 2)
        whole = model(parts, times, prompts).sample[:, :, 8:]
        # Earlier frames do not see the block, so nothing else flows back to it.
        (wanted,) = torch.autograd.grad(whole.square().sum(), again)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_a_cache_is_not_written_with_gradients() -> None:
    model = a_model()
    stream = Stream(model, features(model))
    with pytest.raises(InputError, match="no_grad"):
        stream.flow(latents(model, 2), 0.0)


# Clips.


def a_vae() -> AutoencoderKLWan:
    torch.manual_seed(3)
    sizes = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    moments = {"latents_mean": [0.1, -0.2, 0.3], "latents_std": [1.5, 0.5, 2.0]}
    vae = AutoencoderKLWan(**sizes, **moments, scale_factor_spatial=4).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vae


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_decoding_as_blocks_come_is_decoding_at_once(sizes: list[int]) -> None:
    vae = a_vae()
    x = torch.randn(1, 3, sum(sizes), 4, 6, generator=torch.Generator().manual_seed(0))
    decoder = StreamingDecoder(vae)
    parts = [decoder(part) for part in x.split(sizes, 2)]
    mean, deviation = (torch.tensor(y).view(1, -1, 1, 1, 1) for y in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        whole = vae.decode(x * deviation + mean).sample
    assert torch.cat(parts, 2).shape == (1, 3, 1 + 4 * (sum(sizes) - 1), 16, 24)
    assert (whole.abs() < 1).any(), "all clamped: this would prove nothing"
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-4)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("vae", [False, True])
def test_a_resumed_clip_is_the_unbroken_one(vae: bool) -> None:
    model = a_model()
    if vae:
        model.load_parts(vae=a_vae())
    options = {"seed": 3, "prompt": features(model, 3), "switches": [6, 20]}
    unbroken, whole, states = model.rollout(26, **options), [], []
    for block in unbroken:
        whole.append(block)
        states.append(saved(unbroken.state_dict()))
    assert sum(map(len, whole)) == 26
    assert whole[0].dtype == torch.uint8 and whole[0].shape == ((5, 16, 24, 3) if vae else (2, 4, 6, 3))
    for number in (0, 1, len(whole) // 2):
        resumed = model.rollout(26, **options)
        resumed.load_state_dict(states[number])
        rest = list(resumed)
        assert torch.equal(torch.cat(rest), torch.cat(whole[number + 1 :]))
    assert not torch.equal(next(model.rollout(26, **{**options, "seed": 4})), whole[0])


def test_prompts_change_where_they_are_told_to() -> None:
    model = a_model()
    prompts = features(model, 2)

    def clip(**options: Any) -> list[Tensor]:
        return list(model.rollout(12, **options))

    first, second = (clip(prompt=prompts[i, None]) for i in range(2))
    both = clip(prompt=prompts, switches=[5])  # in effect from the block that begins with frame 6
    assert [torch.equal(a, b) for a, b in zip(both, first, strict=True)] == [True] * 3 + [False] * 3
    rollout, live = model.rollout(12, prompt=prompts[:1]), []
    for block in rollout:
        live.append(block)
        if rollout.done == 6:
            rollout.switch(prompts[1:])
    assert all(map(torch.equal, both, live))
    assert not torch.equal(both[-1], second[-1])


def test_ways_to_recache_are_told_to_the_stream() -> None:
    """With a window of one block more, so that a frame which saw later ones in the recache is still seen."""
    model, kept = a_model(window=8), []
    for options in ({}, {"recache": "block-causal"}, {"global_sink": False}):
        told = model.rollout(14, prompt=features(model, 2), switches=[10], **options)
        assert len(list(told)) == 7
        kept.append(told.stream.latents)
    for other in kept[1:]:
        assert torch.equal(kept[0][:, :, :4], other[:, :, :4])  # frames 6 to 9, before the change
        assert (kept[0][:, :, 4:] - other[:, :, 4:]).abs().max() > 1e-4


def test_a_window_of_all_frames_is_as_long_as_the_clip() -> None:
    model = a_model(window=None)
    rollout = model.rollout(9, prompt=features(model))
    assert sum(len(block) for block in rollout) == 9
    assert rollout.stream.cache.frames.frames == list(range(10))
    with pytest.raises(InputError, match="how many"):
        Stream(model, features(model))


def test_words_become_features_with_zeros_behind() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    from mmzoo.processing import word_tokenizer

    model, tokenizer = a_model(), word_tokenizer(["cat", "runs"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sizes = {"d_model": 20, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    model.load_parts(text_encoder=UMT5EncoderModel(UMT5Config(**sizes)).eval(), tokenizer=tokenizer)
    found = model.encode_prompts(["cat", "cat  runs &amp;amp; "])
    assert found.shape == (2, 8, 20)
    counts = [int((row.abs().sum(-1) > 0).sum()) for row in found]
    assert 0 < counts[0] < counts[1] < 8
    torch.testing.assert_close(found[:1], model.encode_prompts("cat"))
    assert len(next(model.rollout(3, prompt="cat"))) == 2


def test_what_cannot_be_is_said() -> None:
    model = a_model()
    prompts = features(model, 2)
    with pytest.raises(InputError, match="names no tokenizer"):
        model.rollout(3, prompt="a cat")
    with pytest.raises(InputError, match="2 prompts of a clip of 3 frames need 1 frames"):
        model.rollout(3, prompt=prompts)
    with pytest.raises(InputError, match="ascending"):
        model.rollout(9, prompt=features(model, 3), switches=[6, 4])
    with pytest.raises(InputError, match="within the clip"):
        model.rollout(9, prompt=features(model, 2), switches=[9])
    with pytest.raises(InputError, match="no room for a block"):
        a_model(window=6, sink=5)
    with pytest.raises(InputError, match="smaller than the model's window"):
        Stream(model, features(model), window=4)
    with pytest.raises(InputError, match="no whole blocks"):
        Stream(model, features(model), recache_frames=0)
    with pytest.raises(InputError, match="patches of 2 x 2"):
        model.rollout(3, prompt=prompts[:1], height=5)
    with pytest.raises(InputError, match=r"\[prompts, tokens, 20\]"):
        model.rollout(3, prompt=prompts[..., :4])
    with pytest.raises(InputError, match="recache"):
        model.rollout(3, prompt=prompts[:1], recache="none")
    with pytest.raises(InputError, match="needs prompts"):
        model(latents(model, 2), torch.zeros(1))
    with pytest.raises(InputError, match="whole blocks"):
        a_model(window=5)
    with pytest.raises(InputError, match="patch_size"):
        a_model(patch_size=(2, 2, 2))
    with pytest.raises(InputError, match="'rotary'"):
        a_model(positions="rotary")
    with pytest.raises(InputError, match="whole blocks"):
        Stream(model, prompts, recache_frames=3)
    with pytest.raises(InputError, match="no pixels"):
        a_model(out_channels=4, in_channels=4).rollout(3, prompt=prompts[:1])
    short = a_model(rope_max_seq_len=6)
    with pytest.raises(InputError, match='number 6.*positions="relative"'):
        short.rollout(8, prompt=prompts[:1])
    with pytest.raises(InputError, match='number 6 frames.*positions="relative"'):
        fed(short, latents(short, 8), prompts[:1])
    relative = a_model(rope_max_seq_len=6, positions="relative")
    assert sum(map(len, relative.rollout(8, prompt=prompts[:1]))) == 8
    with pytest.raises(InputError, match="Use a cache"):
        relative(latents(model, 8), torch.zeros(1), prompts[:1])
    with pytest.raises(InputError, match="another size"):
        Stream(model, prompts).load_state_dict(Stream(model, prompts[:1]).state_dict())
    named = a_model(vae="nowhere/at-all")
    with pytest.raises(CheckpointError, match="vae cannot be loaded from"):
        _without_network(named)


def _without_network(model: LongLive) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return model.part("vae")


# Weights in and out.


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the authors' is, of the recorded tiny model and its adapter; names as their trainer leaves them."""
    monkeypatch.setitem(CONFIGS, "longlive-tiny", {**SMALL, "in_channels": 4, "out_channels": 4})
    base = load_file(DATA / "lora" / "checkpoint.safetensors")
    wrapped = {name.replace("blocks.", "blocks.", 1).replace("model.", "model._fsdp_wrapped_module.", 1): x for name, x in base.items()}  # fmt: skip  # noqa: E501
    (tmp_path / "models").mkdir()
    torch.save({"generator_ema": wrapped}, tmp_path / longlive.BASE)
    torch.save({"generator_lora": load_file(DATA / "lora" / "lora.safetensors")}, tmp_path / longlive.LORA)
    return tmp_path


def test_the_authors_release_is_read(release: Path) -> None:
    assert longlive.is_in_parts(release) and not longlive.is_in_parts(release / "models")
    model = longlive.read_parts(release, "longlive-tiny")
    given, said = (load_file(DATA / "lora" / f"{name}.safetensors") for name in ("inputs", "expected"))
    with torch.no_grad():
        flow = model(given["x"].transpose(1, 2), given["timestep"], given["prompt_embeds"]).sample
    torch.testing.assert_close(flow.transpose(1, 2), said["flow_pred"], atol=1e-4, rtol=1e-4)
    named = mmzoo.load("longlive-tiny", weights=str(release))
    assert torch.equal(named.blocks[0].attn1.to_q.weight, model.blocks[0].attn1.to_q.weight)
    (release / longlive.LORA).unlink()
    base = longlive.read_parts(release, "longlive-tiny", dtype=torch.bfloat16)
    assert base.dtype == torch.bfloat16
    assert differ(base.blocks[0].attn1.to_q.weight.float(), model.blocks[0].attn1.to_q.weight)


def test_an_adapter_counts_as_much_as_its_alpha_says() -> None:
    state = {"a.weight": torch.zeros(3, 4)}
    lora = {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(3, 2)}
    for alpha, expected in ((None, 2.0), (2, 2.0), (8, 8.0)):
        assert (longlive.merge_lora(state, lora, alpha=alpha)["a.weight"] == expected).all()
    with pytest.raises(CheckpointError, match="unexpected: b"):
        longlive.merge_lora({"b.weight": torch.zeros(3, 4)}, {name.replace("a.", "b.", 1): x for name, x in lora.items()} | {"b.lora_C": torch.ones(1)})  # fmt: skip  # noqa: E501


def test_an_authors_file_that_does_not_fit_is_an_error(release: Path) -> None:
    base, lora = release / longlive.BASE, release / longlive.LORA
    held, adapter = torch.load(base)["generator_ema"], torch.load(lora)["generator_lora"]
    torch.save({"generator": {name: x for name, x in held.items() if "head.head" not in name}}, base)
    with pytest.raises(CheckpointError, match=r"missing: proj_out.bias"):
        longlive.read_parts(release, "longlive-tiny")
    torch.save({"generator": {**held, "extra": torch.ones(1)}}, base)
    with pytest.raises(CheckpointError, match="unexpected: extra"):
        longlive.read_parts(release, "longlive-tiny")
    with pytest.raises(CheckpointError, match="misshapen"):
        longlive.read_parts(release)
    torch.save({"critic": held}, base)
    with pytest.raises(CheckpointError, match="none of generator"):
        longlive.read_parts(release, "longlive-tiny")
    torch.save({"generator": held, "code": Stream}, base)
    with pytest.raises(CheckpointError, match="more than tensors"):
        longlive.read_parts(release, "longlive-tiny")
    torch.save({"generator": held}, base)
    first = next(iter(adapter))
    torch.save({"generator_lora": {name: x for name, x in adapter.items() if name != first}}, lora)
    with pytest.raises(CheckpointError, match="missing: blocks"):
        longlive.read_parts(release, "longlive-tiny")
    torch.save({"generator_lora": {**adapter, first: adapter[first][:, :3]}}, lora)
    with pytest.raises(CheckpointError, match="misshapen: blocks"):
        longlive.read_parts(release, "longlive-tiny")
    with pytest.raises(InputError, match="device_map"):
        longlive.read_parts(release, device_map="auto")


def test_a_wan_of_diffusers_is_read(tmp_path: Path) -> None:
    sizes = {name: SMALL[name] for name in longlive._WAN if name in SMALL}
    wan = WanTransformer3DModel(**sizes)
    wan.save_pretrained(tmp_path)
    described = dict(LongLive.load_config(tmp_path))
    assert longlive.is_release(described) and not longlive.is_release({**described, "image_dim": 8})
    fields, processor = longlive.read_release(tmp_path, described)
    assert processor is None and fields["num_attention_heads"] == 2
    model = LongLive.from_pretrained(tmp_path)
    assert all(torch.equal(x, wan.state_dict()[name]) for name, x in model.state_dict().items())
    model.save_pretrained(tmp_path / "own")
    again = LongLive.from_pretrained(tmp_path / "own", torch_dtype=torch.bfloat16)
    assert again.config.window == 12 and {x.dtype for x in again.state_dict().values()} == {torch.bfloat16}


def test_the_registered_models() -> None:
    full = mmzoo.create("longlive-1.3b", device="meta")
    assert (len(full.state_dict()), sum(p.numel() for p in full.parameters())) == (825, 1_418_996_800)
    assert all(x.is_meta for x in full.state_dict().values())
    tiny = mmzoo.create("longlive-tiny")
    for model, name in ((full, "longlive-1.3b"), (tiny, "longlive-tiny")):
        assert model.rule == masks.rule(entry(name).rule, **model.rule_options)
    assert full.rule == masks.rule("sink-window")
    with torch.no_grad():
        assert tiny(**example_inputs(tiny, 2)).sample.shape == (2, 3, 4, 16, 16)
    assert sum(map(len, tiny.rollout(7, **example_options(tiny)))) == 7


@torch.no_grad()
def test_half_precision_turns_positions_in_full() -> None:
    model = a_model().to(torch.bfloat16)
    x = latents(model, 2).to(torch.bfloat16)
    flows = [
        model(x, torch.zeros(1), features(model).to(torch.bfloat16), first_frame=first).sample for first in (0, 1000)
    ]
    # What frames of one pass see of each other hangs on how far they are apart, and not on where they are.
    assert (flows[0] - flows[1]).abs().max() < 0.1 * flows[0].abs().max()
