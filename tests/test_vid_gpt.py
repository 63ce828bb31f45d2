"""ViD-GPT: what is cached is what would be computed again, nothing leaks back in time, and rollouts go on exactly."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.models.vid_gpt import CONFIGS, Denoising, ViDGPT, ViDGPTCache, looked_at, progressive

ATTENTIONS = [None, "last-frames", "joint", "first-frame"]


def build(**fields: Any) -> ViDGPT:
    """A tiny float64 model of which every weight counts."""
    torch.manual_seed(0)
    small = {"sample_size": (4, 4), "hidden_size": 16, "caption_channels": 0, "window": 6, "chunk_frames": 3}
    model = ViDGPT(**{**CONFIGS["vid-gpt-tiny"], **small, **fields})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval().requires_grad_(False)


def latents(frames: int, model: ViDGPT, batch: int = 1, seed: int = 0) -> Tensor:
    shape = (batch, model.config.in_channels, frames, *model.config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both_ways(model: ViDGPT, parts: list[int], chunk: int) -> tuple[Tensor, Tensor]:
    """The denoiser on a chunk after clean frames that were written in parts, and in one pass over the window."""
    done, cache = sum(parts), ViDGPTCache(model)
    clean, noisy, t = latents(done, model), latents(chunk, model, seed=1), torch.tensor([700])
    start = 0
    for part in parts:
        model.write(clean[:, :, start : start + part], cache, first_frame=start)
        start += part
    cached = model(noisy, t, first_frame=done, cache=cache)
    past = min(done, model.config.window)
    both = torch.cat([clean[:, :, done - past :], noisy], 2)
    whole = model(both, t, num_prompt_frames=past, first_frame=done - past)[:, :, past:]
    return cached, whole


@pytest.mark.parametrize("positions", ["cyclic", "absolute", "rope"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("depth", [1, 3])
def test_before_eviction_cached_is_recomputed(depth: int, attention: str | None, positions: str) -> None:
    for rule in ("causal-temporal", "prompt-causal"):
        model = build(num_layers=depth, prefix_attention=attention, temporal_positions=positions, rule=rule)
        # Parts shorter than the frames looked back at, too: the true last frames are kept.
        for parts in ([1], [1, 3], [3, 1, 1]):
            cached, whole = both_ways(model, parts, 3)
            torch.testing.assert_close(cached, whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("attention", [None, "last-frames", "joint"])
def test_after_eviction_only_one_layer_forgets(attention: str | None) -> None:
    cached, whole = both_ways(build(num_layers=1, prefix_attention=attention), [1, 3, 3, 3], 3)
    torch.testing.assert_close(cached, whole, atol=1e-10, rtol=1e-10)
    # Deeper layers keep keys that were made when the evicted frames were still seen.
    cached, whole = both_ways(build(num_layers=2, prefix_attention=attention), [1, 3, 3, 3], 3)
    assert (cached - whole).abs().max() > 1e-3


@pytest.mark.parametrize("attention", [None, "first-frame"])
@pytest.mark.parametrize("parts", [[1, 3], [3, 3, 1], [1, 3, 3, 3]])
def test_what_is_seen_are_the_last_frames_and_a_cache_can_begin_anew(parts: list[int], attention: str | None) -> None:
    model = build(num_layers=1, prefix_attention=attention)
    done, cache = sum(parts), ViDGPTCache(model)
    clean, noisy, t = latents(done, model), latents(3, model, seed=1), torch.tensor([700])

    def run(clean: Tensor) -> Tensor:
        cache.reset()
        for first, part in zip(np.cumsum([0, *parts]).tolist(), parts):
            model.write(clean[:, :, first : first + part], cache, first_frame=first)
        return model(noisy, t, first_frame=done, cache=cache)

    before = run(clean)
    seen = [i for i in range(done) if (run(changed(clean, i)) - before).abs().max() > 0]
    window = list(range(max(0, done - model.config.window), done))
    assert seen == sorted({*window, 0} if attention else window)


def changed(clip: Tensor, frame: int) -> Tensor:
    clip = clip.clone()
    clip[:, :, frame] += 1
    return clip


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("rule", ["causal-temporal", "prompt-causal", "bidirectional"])
def test_who_sees_whom(rule: str, attention: str | None) -> None:
    model, prompt = build(rule=rule, prefix_attention=attention), 3
    clip, t = latents(6, model), torch.tensor([400])
    before = model(clip, t, num_prompt_frames=prompt)
    for frame in range(6):
        moved = (model(changed(clip, frame), t, num_prompt_frames=prompt) - before).abs().amax((0, 1, 3, 4))
        causal = [other >= frame for other in range(6)]
        noisy = [other >= prompt or c for other, c in enumerate(causal)]
        expected = {"causal-temporal": causal, "prompt-causal": noisy, "bidirectional": [True] * 6}[rule]
        looks = attention == "first-frame" and frame == 0
        assert (moved > 0).tolist() == [True if looks else e for e in expected], "a leak is not small but zero"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_frame_stands_in_for_those_before_it(count: int) -> None:
    assert looked_at(count, 3) == {1: [0, 0, 0], 2: [1, 0, 0], 5: [4, 3, 2]}[count]


def test_a_batch_is_its_rows_and_hidden_text_does_not_count() -> None:
    model = build(caption_channels=8)
    clip, t = latents(5, model, batch=2), torch.tensor([300, 900])
    text, mask = torch.randn(2, 6, 8).double(), torch.tensor([[1] * 6, [1] * 2 + [0] * 4])
    whole = model(clip, t, text, mask, num_prompt_frames=2)
    for i in (0, 1):
        one = model(clip[i : i + 1], t[i : i + 1], text[i : i + 1], mask[i : i + 1], num_prompt_frames=2)
        torch.testing.assert_close(one, whole[i : i + 1])
    cut = model(clip[1:], t[1:], text[1:, :2], num_prompt_frames=2)
    torch.testing.assert_close(cut, whole[1:])
    assert (model(clip[1:], t[1:], text[1:], num_prompt_frames=2) - cut).abs().max() > 1e-3


def test_eager_is_sdpa_and_no_other_backend() -> None:
    model = build(caption_channels=8)
    clip, t = latents(5, model), torch.tensor([300])
    given = (torch.randn(1, 6, 8).double(), torch.tensor([[1, 1, 1, 0, 0, 0]]))
    fused = model(clip, t, *given, num_prompt_frames=2)
    model.set_attention("eager")
    torch.testing.assert_close(model(clip, t, *given, num_prompt_frames=2), fused)
    with pytest.raises(UnsupportedMask, match="flex_attention"):
        model.set_attention("flex_attention")


def test_clean_frames_have_timestep_0_and_the_mask_channel_tells_them() -> None:
    model = build()
    clip = latents(4, model)
    said = model(clip, torch.tensor([800]), num_prompt_frames=2)
    by_frame = model(clip, torch.tensor([[0, 0, 800, 800]]), num_prompt_frames=2)
    assert torch.equal(said, by_frame)
    assert (model(clip, torch.tensor([[0, 0, 800, 800]])) - said).abs().max() > 1e-3


def test_only_the_mask_channel_tells_frames_at_the_same_timestep_apart() -> None:
    for mask_channel in (True, False):
        model = build(mask_channel=mask_channel, prefix_attention=None)
        clip, t = latents(4, model), torch.zeros(1, 4)
        same = torch.equal(model(clip, t, num_prompt_frames=2), model(clip, t, num_prompt_frames=0))
        assert same != mask_channel


def test_joint_attention_is_one_softmax_over_a_frame_and_those_looked_back_at() -> None:
    model = build(num_layers=1, prefix_attention="joint", rule="causal-temporal")
    block, x = model.blocks[0], torch.randn(1, 5, 4, 16).double()
    step = SimpleNamespace(prompt=3, cache=None, attention="sdpa")
    query, key, value = block.attn.split(x)
    for frame in range(5):
        seen = [frame, *([2, 1, 0] if frame >= 3 else [])]
        keys, values = (y[0, seen].flatten(0, 1) for y in (key, value))
        weights = (torch.einsum("qhd,khd->hqk", query[0, frame], keys) * 8**-0.5).softmax(-1)
        expected = block.attn.proj(torch.einsum("hqk,khd->qhd", weights, values).flatten(-2))
        torch.testing.assert_close(block.in_frames(block.attn, x, step, True, own=True)[0, frame], expected)


def test_a_recomputed_rollout_sees_its_window_and_no_more() -> None:
    model, seen = build(), []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    list(model.rollout(15, given=frames(2), cached=False, steps=2))
    assert seen[::2] == [2 + 3, 5 + 3, 6 + 3, 6 + 3, 6 + 3]


def test_cyclic_positions_come_round_and_absolute_ones_end() -> None:
    model = build()
    clip, t = latents(3, model), torch.tensor([100])
    assert torch.equal(model(clip, t, first_frame=2), model(clip, t, first_frame=2 + 9))
    assert not torch.equal(model(clip, t, first_frame=2), model(clip, t, first_frame=3))
    with pytest.raises(InputError, match="end at 9 frames"):
        build(temporal_positions="absolute")(clip, t, first_frame=7)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_cache_is_as_large_as_its_formula(attention: str | None) -> None:
    model = build(prefix_attention=attention)
    cache, config = ViDGPTCache(model), model.config
    assert cache.nbytes == 0
    model.write(latents(3, model, batch=2), cache, first_frame=0)
    looked = {None: 0, "first-frame": 1}.get(attention, config.prefix_frames)
    frames = config.window + config.chunk_frames + looked
    assert cache.nbytes == 2 * config.num_layers * 2 * model.tokens_per_frame * config.hidden_size * frames * 8


def test_builds_on_meta_as_its_specification_says() -> None:
    with torch.device("meta"):
        model = ViDGPT.build(CONFIGS["vid-gpt-xl"], torch.float32)
    c = 1152
    block = 4 * (4 * c * c + 4 * c) + (8 * c * c + 5 * c) + 6 * c
    merge, patches, final = (c + 1) * c + c, 16 * c + c, 32 * c + 32 + 2 * c
    times, text = 257 * c + (c + 1) * c + 6 * (c + 1) * c, 4097 * c + (c + 1) * c
    assert sum(one.numel() for one in model.parameters()) == 28 * block + merge + patches + final + times + text
    assert model.tokens_per_frame == 256


@pytest.mark.parametrize("name", ["vid-gpt-tiny", "vid-gpt-nano"])
def test_saved_and_loaded_it_says_the_same(name: str, tmp_path: Path) -> None:
    model = ViDGPT.build(CONFIGS[name], torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = ViDGPT.from_pretrained(tmp_path).eval()
    assert again.config.scheduler == model.config.scheduler and again.rule == model.rule
    one, other = (torch.cat(list(each.rollout(5, seed=3, steps=2))) for each in (model, again))
    assert torch.equal(one, other)


def frames(count: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("given_frames", [0, 1, 4])
def test_a_cached_rollout_is_a_recomputed_one_until_frames_are_forgotten(given_frames: int) -> None:
    model = build(progressive_noise=2.0, window=7, max_frames=10)
    given = frames(given_frames) if given_frames else None
    options = {"seed": 5, "given": given, "perturb": 20}
    once, again = (model.rollout(7, cached=cached, **options) for cached in (True, False))
    for _ in range(2):
        torch.testing.assert_close(once.next_latents(), again.next_latents(), atol=1e-8, rtol=1e-8)


def test_given_frames_come_first_and_chunks_follow() -> None:
    model = build()
    blocks = list(model.rollout(9, given=frames(2)))
    assert [len(block) for block in blocks] == [2, 3, 3, 1]
    assert np.array_equal(blocks[0].numpy(), frames(2))
    assert all(block.dtype == torch.uint8 and block.shape[1:] == (4, 4, 3) for block in blocks)
    assert [len(block) for block in model.rollout(4)] == [3, 1]
    larger = list(model.rollout(2, given=np.full((1, 8, 12, 3), 77, np.uint8)))
    assert (larger[0] == 77).all() and larger[0].shape == (1, 4, 4, 3)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_resumed_rollout_goes_on_as_the_unbroken_one(after: int, cached: bool) -> None:
    model = build()
    options = {"seed": 2, "given": frames(2), "cached": cached, "perturb": 20}
    whole = torch.cat(list(model.rollout(14, **options)))
    first = model.rollout(14, **options)
    begun = [next(first) for _ in range(after)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    list(first)  # what goes on must not reach the saved state
    file.seek(0)
    second = model.rollout(14, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.cat([*begun, *second]), whole)
    assert not torch.equal(torch.cat(list(model.rollout(14, **{**options, "seed": 3}))), whole)
    with pytest.raises(InputError, match="the reverse"):
        model.rollout(14, **{**options, "cached": not cached}).load_state_dict(first.state_dict())


def test_guidance_goes_from_the_null_caption_towards_the_prompt() -> None:
    model = build(caption_channels=8)
    text, mask = torch.randn(1, 6, 8).double(), torch.tensor([[1, 1, 1, 0, 0, 0]])
    noise = latents(3, model)
    scheduler = model.build_scheduler(2)
    said, (null, mean) = (
        noise,
        (
            model(noise, torch.zeros(1), words.double(), mask).chunk(2, 1)[0]
            for words in (model.null_caption[None], text)
        ),
    )
    scheduler.timesteps = torch.tensor([0])
    scale = 3.0
    clean = Denoising(model, scheduler, (text, mask), scale).chunk(noise, 0)
    kept = scheduler.alphas_cumprod[0]
    expected = (said - (1 - kept).sqrt() * (null + scale * (mean - null))) / kept.sqrt()
    torch.testing.assert_close(clean, expected)


def test_another_prompt_changes_what_comes_and_a_switch_is_kept_in_the_state() -> None:
    model = build(caption_channels=8)
    words = [(torch.randn(1, 6, 8).double(), torch.ones(1, 6).long()) for _ in range(2)]
    one, other = (model.rollout(9, given=frames(1), prompt=prompt) for prompt in (words[0], words[0]))
    assert all(torch.equal(one.next_latents(), other.next_latents()) for _ in range(2))
    other.switch(words[1])
    resumed = model.rollout(9, given=frames(1), prompt=words[0])
    resumed.load_state_dict(other.state_dict())
    expected = other.next_latents()
    assert torch.equal(resumed.next_latents(), expected) and not torch.equal(one.next_latents(), expected)


def test_prompts_take_turns_at_their_frames(tmp_path: Path) -> None:
    model = build(caption_channels=8)
    words = [(torch.randn(1, 6, 8).double(), torch.ones(1, 6).long()) for _ in range(2)]
    options = {"given": frames(1), "prompt": words, "switches": [5]}
    planned, by_hand = model.rollout(13, **options), model.rollout(13, given=frames(1), prompt=words[0])
    for begin in (0, 1, 4, 7, 10):  # the chunk from frame 4 on began before the switch
        assert planned.done == begin
        if begin == 7:
            by_hand.switch(words[1])
            resumed = model.rollout(13, **options)
            resumed.load_state_dict(planned.state_dict())
        assert torch.equal(next(planned), next(by_hand))
        if begin >= 7:
            next(resumed)
            assert torch.equal(resumed.denoising.text[0], words[1][0])
    assert torch.equal(planned.cache.temporal.keys[1], resumed.cache.temporal.keys[1])


@given(st.floats(0, 4))
def test_progressive_noise_stays_standard(alpha: float) -> None:
    noise = torch.randn(1, 4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    walked = progressive(noise, alpha)
    assert torch.equal(walked[:, :, 0], noise[:, :, 0]) and progressive(noise, None) is noise
    assert abs(walked[:, :, 2].std() - 1) < 0.05
    together = (walked[:, :, 1] * walked[:, :, 0]).mean()
    assert abs(together - alpha / (1 + alpha**2) ** 0.5) < 0.05


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rule": "causal"}, "causal-temporal"),
        ({"window": 7}, "as many positions"),
        ({"sample_size": (5, 4)}, "5 x 4"),
    ],
)
def test_fields_that_do_not_fit(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(**wrong)


def test_what_a_rollout_refuses() -> None:
    model = build()
    for options, said in (
        ({"prompt": "a sky"}, "takes no prompt"),
        ({"guidance": 2.0}, "give one"),
        ({"switches": [3]}, "need 0 frames"),
        ({"prompt": ["a", "b", "c"], "switches": [3, 2]}, "ascending"),
        ({"prompt": ["a", "b"], "switches": [4]}, "within the clip"),
        ({"steps": 0}, "not 0"),
        ({"steps": -2}, "not -2"),
        ({"steps": 1001}, "not 1001"),
        ({"steps": 1}, "noise would be taken"),
        ({"perturb": 5000}, "timestep"),
        ({"perturb": -5}, "timestep"),
        ({"seed": -1}, "seed"),
        ({"given": frames(4)}, "nothing would be made"),
        ({"given": frames(0)}, "uint8"),
        ({"given": frames(2)[0]}, "uint8"),
        ({"given": frames(2)[..., :2]}, "uint8"),
        ({"given": frames(2) / 255}, "uint8"),
    ):
        with pytest.raises(InputError, match=said):
            model.rollout(4, **options)
    with pytest.raises(InputError, match="cannot be kept"):
        build(rule="bidirectional").rollout(4, cached=True)
    assert build(rule="bidirectional").rollout(4).cache is None
    with pytest.raises(InputError, match="load_parts"):
        build(caption_channels=8).rollout(4, prompt="a sky")
    with pytest.raises(InputError, match="names no vae"):
        next(build(in_channels=4).rollout(4))
    with pytest.raises(InputError, match="all frames of a block are noisy"):
        model(latents(3, model), torch.zeros(1), num_prompt_frames=1, cache=ViDGPTCache(model))
    with pytest.raises(InputError, match="Write the clean frames first"):
        model(latents(3, model), torch.zeros(1), cache=ViDGPTCache(model))
    with pytest.raises(InputError, match="no text"):
        model(latents(3, model), torch.zeros(1), torch.zeros(1, 2, 8))


def test_a_short_part_sees_no_more_than_the_window() -> None:
    """A part of one frame leaves slots to frames that are older than the window: they are not seen."""
    model = build(num_layers=1, temporal_positions="rope", prefix_attention=None)
    clean, cut, whole = latents(10, model), ViDGPTCache(model), ViDGPTCache(model)
    for start in range(0, 9, 3):
        model.write(clean[:, :, start : start + 3], cut, first_frame=start)
    model.write(clean[:, :, 9:], cut, first_frame=9)
    model.write(clean[:, :, 3:9], whole, first_frame=3)
    noisy, t = latents(1, model, seed=1), torch.tensor([700])
    for count, cache in ((10, cut), (9, whole)):
        past = clean[:, :, count - 6 : count]
        full = model(torch.cat([past, noisy], 2), t, num_prompt_frames=6, first_frame=count - 6)[:, :, 6:]
        torch.testing.assert_close(model(noisy, t, first_frame=count, cache=cache), full)


def test_what_a_cache_refuses() -> None:
    model = build()
    cache = ViDGPTCache(model)
    with pytest.raises(InputError, match="more than the 9"):
        model.write(latents(12, model), cache, first_frame=0)
    model.write(latents(3, model), cache, first_frame=0)
    with pytest.raises(InputError, match="batch of"):
        model.write(latents(3, model, batch=2), cache, first_frame=3)
    cache.reset()
    with pytest.raises(InputError, match="Write the clean frames first"):
        model(latents(3, model), torch.zeros(1), cache=cache)


def test_given_frames_that_were_written_large_are_the_small_ones() -> None:
    model, small = build(in_channels=3), torch.from_numpy(frames(2))
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(model.encode_frames(large), model.encode_frames(small), atol=1e-6, rtol=1e-6)


def test_the_chain_is_no_coarser_than_float32() -> None:
    model, kinds = build().bfloat16(), set()
    scheduler = model.build_scheduler(2)
    step = scheduler.step
    scheduler.step = lambda said, t, sample, **options: kinds.add(sample.dtype) or step(said, t, sample, **options)
    assert Denoising(model, scheduler).chunk(latents(3, model).bfloat16(), 0).dtype == torch.bfloat16
    assert kinds == {torch.float32}


def test_a_switch_before_the_first_frame_counts() -> None:
    model = build(caption_channels=8)
    words = [(torch.randn(1, 6, 8).double(), torch.ones(1, 6).long()) for _ in range(2)]
    switched, expected = model.rollout(6, prompt=words[0]), model.rollout(6, prompt=words[1])
    switched.switch(words[1])
    assert torch.equal(switched.next_latents(), expected.next_latents())


def test_the_autoencoder_stands_between_pixels_and_latents() -> None:
    from diffusers import AutoencoderKL

    model = build(in_channels=4, vae="somewhere/else")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=[4] * 4, norm_num_groups=2, layers_per_block=1, latent_channels=4)
    model.load_parts(vae=vae.double().eval())
    assert "vae" not in dict(model.named_children())
    shown = list(model.rollout(4, given=frames(1, 32)))
    assert [block.shape for block in shown] == [(1, 32, 32, 3), (3, 32, 32, 3)]
    latent = model.encode_frames(torch.from_numpy(frames(2, 32)), torch.Generator().manual_seed(0))
    assert latent.shape == (1, 4, 2, 4, 4)
    pixels = torch.from_numpy(frames(2, 32)).movedim(-1, 1).double() / 127.5 - 1
    expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0)) * 0.18215
    torch.testing.assert_close(latent[0].transpose(0, 1), expected)
    shown = vae.decode(latent[0].transpose(0, 1) / 0.18215).sample
    assert torch.equal(model.decode_frames(latent), ((shown + 1) * 127.5).round().clamp(0, 255).byte().movedim(1, -1))
