"""What the parity cases of ViD-GPT mean in terms of mmzoo's public code; see parity_cases.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.schedulers import scheduling_ddpm
from parity_cases import Case, Comparison, close, exact
from torch import Tensor

from mmzoo import masks
from mmzoo.attention import allowed
from mmzoo.layout import Role
from mmzoo.models.vid_gpt import Attention, Denoising, ViDGPT, ViDGPTCache, attend, from_authors, prompt_causal
from mmzoo.rolling_cache import frames_layout
from mmzoo_training.video_diffusion import Chain, losses


def _model(case: Case) -> ViDGPT:
    """The tiny denoiser of a case."""
    said = case.config
    enhance = said["spatial_attn_enhance"]
    chunk = said.get("chunk_len", 3)
    model = ViDGPT(
        sample_size=tuple(said["input_size"][1:]),
        in_channels=said["in_channels"],
        patch_size=said["patch_size"][1],
        hidden_size=said["hidden_size"],
        num_layers=said["depth"],
        num_attention_heads=said["num_heads"],
        mlp_ratio=said["mlp_ratio"],
        learn_sigma=said["pred_sigma"],
        caption_channels=said["caption_channels"],
        caption_length=said["model_max_length"],
        space_scale=said["space_scale"],
        time_scale=said["time_scale"],
        mask_channel=bool(said["temp_extra_in_channels"]),
        temporal_positions=said["relative_tpe_mode"],
        max_frames=said["max_tpe_len"],
        prefix_attention=enhance and "last-frames",
        prefix_frames=int(enhance.rsplit("_", 1)[1]) if enhance else 3,
        window=said.get("kv_cache_max_seqlen", said["max_tpe_len"] - chunk),
        chunk_frames=chunk,
    )
    model.load_state_dict(from_authors(case.checkpoint))
    return model.eval()


def _text(case: Case) -> tuple[Tensor | None, Tensor | None]:
    found = case.inputs
    return (found["y"][:, 0], found["y_mask"]) if "y" in found else (None, None)


def temporal_attention(case: Case) -> Iterator[Comparison]:
    """The rules on the layouts of a block and of what is cached, and rope by places in time."""
    said, x, past = case.config, case.inputs["x"], case.inputs["x_prefix"]
    layer = Attention(said["dim"], said["num_heads"])
    layer.load_state_dict(case.checkpoint)
    count, before, size = x.shape[1], past.shape[1], said["dim"] // said["num_heads"]
    query, key, value = layer.split(x)
    past_query, past_key, past_value = layer.split(past)
    keys, values = torch.cat([past_key, key], 1), torch.cat([past_value, value], 1)
    causal, every = masks.causal_temporal(), frames_layout(range(before + count))
    block = every[before:]

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return layer.proj(attend(query, key, value, mask, "sdpa").flatten(-2))

    alone = frames_layout(range(count))
    some = alone.field("role", (torch.arange(count) >= said["cond_len_partial"])[None].int())
    seen = allowed(causal, block, every)[0]
    outputs = {
        "out_bidirectional": run(query, key, value, None),
        "out_causal": run(query, key, value, allowed(causal, alone)[0]),
        "out_prefix": run(past_query, past_key, past_value, allowed(causal, frames_layout(range(before)))[0]),
        "out_causal_with_cache": run(query, keys, values, seen),
        "out_causal_full": run(torch.cat([past_query, query], 1), keys, values, allowed(causal, every)[0]),
        "out_context_kv": run(query, past_key, past_value, None),
        "out_partial": run(query, key, value, allowed(prompt_causal(), some)[0]),
        "kv_causal": torch.cat([key, value], -2).flatten(-2),
        "kv_prefix": torch.cat([past_key, past_value], -2).flatten(-2),
    }
    for name, role in (("denoise", Role.ANSWER), ("write", Role.PROMPT)):
        layout = frames_layout(range(before + count), role)[before:]
        opened = allowed(prompt_causal(), layout, every)[0]
        outputs[f"out_partial_{name}_with_cache"] = run(query, keys, values, opened)
    turn = get_1d_rotary_pos_embed(size, before + count, said["rope_theta"], use_real=True)
    queries, turned = (apply_rotary_emb(y, turn, sequence_dim=1) for y in (torch.cat([past_query, query], 1), keys))
    outputs["out_rope_full"] = run(queries, turned, values, allowed(causal, every)[0])
    outputs["out_rope_with_cache"] = run(queries[:, before:], turned, values, seen)
    outputs["out_rope_with_cache_q_start_clamped"] = outputs["out_rope_with_cache"]
    yield exact("mask_with_cache", seen, case.expected["mask_with_cache"])
    for name, output in outputs.items():
        yield close(name, output, case.expected[name])


def denoiser(case: Case) -> Iterator[Comparison]:
    """One forward pass over clean and noisy frames."""
    model, found, prompt = _model(case), case.inputs, case.config["prefix_len"]
    seen: dict[str, Tensor] = {}
    model.time_modulation.register_forward_hook(lambda *said: seen.update(t_mlp=said[-1]))
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.update(tokens_in=given[0].flatten(1, 2)))
    model.blocks[0].register_forward_hook(lambda *said: seen.update(block0_out=said[-1].flatten(1, 2)))
    clean = (torch.arange(found["x"].shape[2]) < prompt).float().view(1, 1, -1, 1, 1)
    yield exact("mask_channel", clean.expand_as(found["mask_channel"]), found["mask_channel"])
    first, shifted = case.config["x_temporal_start"]
    outputs = {}
    for name, start, rule in (
        ("out_temporal_start_shifted", shifted, masks.causal_temporal()),
        ("out_non_causal", first, masks.bidirectional()),
        ("out", first, masks.causal_temporal()),
    ):
        model.rule = rule
        outputs[name] = model(found["x"], found["timestep"], *_text(case), num_prompt_frames=prompt, first_frame=start)
    for name, output in {**outputs, **seen}.items():
        yield close(name, output, case.expected[name])


def cached_and_full(case: Case) -> Iterator[Comparison]:
    """Every autoregressive step against the cache and against a full pass, and what the cache holds."""
    model, said, found = _model(case), case.config, case.inputs
    clean, noisy, text = found["z_clean"], found["z_noisy"], _text(case)
    cache, done, chunk = ViDGPTCache(model), said["given_frames"], said["chunk_len"]
    model.write(clean[:, :, :done], cache, *text, first_frame=0)
    yield from _held(case, cache, "after_given")
    for step in range(said["ar_steps"]):
        block = slice(done, done + chunk)
        out = model(noisy[:, :, block], found["timestep"], *text, first_frame=done, cache=cache)
        yield close(f"out_cached_step{step}", out, case.expected[f"out_cached_step{step}"])
        past = min(done, said["kv_cache_max_seqlen"])
        both = torch.cat([clean[:, :, done - past : done], noisy[:, :, block]], 2)
        full = model(both, found["timestep"], *text, num_prompt_frames=past, first_frame=done - past)[:, :, past:]
        yield close(f"out_full_step{step}", full, case.expected[f"out_full_step{step}"])
        model.write(clean[:, :, block], cache, *text, first_frame=done)
        done += chunk
        yield from _held(case, cache, f"after_step{step}", done)
    yield from _held(case, cache, "final")


def _held(case: Case, cache: ViDGPTCache, when: str, done: int = 0) -> Iterator[Comparison]:
    """What was recorded of the cache at that moment: its last frames in their order, and no others."""
    size = case.config["kv_cache_max_seqlen"]
    kept = sorted(cache.temporal.frames)[-size:]
    if f"cache_{when}" in case.expected:
        expected = case.expected[f"cache_{when}"]
        slots = [cache.temporal.frames.index(number) for number in kept]
        held = torch.zeros_like(expected)
        for layer, (key, value) in enumerate(zip(cache.temporal.keys, cache.temporal.values)):
            raw = torch.cat([key, value], -2).flatten(-2)[:, slots]  # [B N, S, 2 C]
            held[layer, :, : len(slots)] = raw.unflatten(0, (expected.shape[1], -1)).transpose(1, 2)
        yield close(f"cache_{when}", held, expected)
    if f"spatial_cache_{when}" in case.expected and cache.context is not None:
        layers = (torch.cat(cache.looked_at(layer), -2).flatten(-2) for layer in range(len(cache.context.keys)))
        expected = case.expected[f"spatial_cache_{when}"]
        held = torch.stack([one.view(expected.shape[1:]) for one in layers])
        yield close(f"spatial_cache_{when}", held, expected)
    counted = f"cache_indicator_{when.removeprefix('after_')}"
    if counted in case.expected:
        yield exact(counted, case.expected[counted].sum(), torch.tensor(done))
        yield exact(f"{counted}: slots", (case.expected[counted] > 0).sum(), torch.tensor(len(kept)))


def sampling_and_loss(case: Case) -> Iterator[Comparison]:
    """Autoregressive sampling with recorded noise, and the loss of one training step."""
    model, said, found = _model(case), case.config, case.inputs
    model.null_caption.copy_(found["y_null"])
    scheduler = model.build_scheduler(said["num_sampling_steps"])
    kept = scheduler.timesteps.flip(0)
    yield exact("timestep_map", kept, case.expected["timestep_map"])
    products = scheduler.alphas_cumprod[kept]
    betas = 1 - products / torch.cat([torch.ones(1), products[:-1]])
    yield close("respaced_betas", betas, case.expected["respaced_betas"])
    chain = Chain(scheduler)
    noised = chain.noised(found["q_x0"], found["q_noise"], found["q_t"])
    yield close("q_sample", noised, case.expected["q_sample"])
    yield from _losses(case, model, chain)
    yield from _clips(case, model.double(), scheduler, RoundedTables(kept, case.expected["respaced_betas"]))


def _clips(case: Case, model: ViDGPT, scheduler: Any, rounded: RoundedTables) -> Iterator[Comparison]:
    """The clips by the authors' rounded tables and by diffusers, with the model in float64.

    Nothing is clipped, so the chain of random weights blows rounding up: 1e-6 of the first chunk is 0.15 in the second
    one, whose recorded values hold the authors' own rounding. So the second chunk has a tolerance of its own;
    `tests/test_vid_gpt_rounding.py` takes the sums in the authors' order, and is within the recorded one.
    """
    cut = case.config["given_frames"] + case.config["chunk_len"]
    for name, cached in (("z_cached", True), ("z_full", False)):
        expected, scale = case.expected[name], case.config["cfg_scale"]
        clip = _sampled(case, Denoising(model, rounded, _text(case), scale), cached)
        yield _within(f"{name}: first chunk", clip[:, :, :cut], expected[:, :, :cut], 1e-4, 5e-3)
        yield _within(f"{name}: second chunk", clip[:, :, cut:], expected[:, :, cut:], 1e-4, 5e-2)
        clip = _sampled(case, Denoising(model, scheduler, _text(case), scale), cached)
        yield _within(f"{name}: diffusers' step", clip[:, :, :cut], expected[:, :, :cut], 2e-4, 5e-3)


class RoundedTables:
    """The ancestral step with the authors' tables, which they make in float32.

    There 1 - product of alphas is off by 1.7e-4 of itself at the last step, and so is the whole clip; diffusers' own
    step, from products in float64, is not.
    """

    config = {"variance_type": "learned_range"}

    def __init__(self, kept: Tensor, betas: Tensor):
        self.timesteps, self.kept = kept.flip(0), kept
        products = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1), products[:-1]])
        variance = betas * (1 - before) / (1 - products)
        self.longest, self.shortest = betas.log(), torch.cat([variance[1:2], variance[1:]]).log()
        self.clean = (1 / products).sqrt(), (1 / products - 1).sqrt()
        self.mean = betas * before.sqrt() / (1 - products), (1 - before) * (1 - betas).sqrt() / (1 - products)

    def step(self, said: Tensor, t: Tensor, sample: Tensor, generator: torch.Generator | None = None) -> Any:
        i = int((self.kept == t).nonzero())
        eps, share = said.chunk(2, 1)
        clean = self.clean[0][i] * sample - self.clean[1][i] * eps
        mean = self.mean[0][i] * clean + self.mean[1][i] * sample
        log_variance = (share + 1) / 2 * self.longest[i] + (1 - share) / 2 * self.shortest[i]
        noise = scheduling_ddpm.randn_tensor(sample.shape, generator=generator) if i else 0
        return SimpleNamespace(prev_sample=mean + noise * (0.5 * log_variance).exp())


@torch.no_grad()
def _sampled(case: Case, denoising: Denoising, cached: bool) -> Tensor:
    """The whole clip; the noise of the steps is the recorded one, in place of what the scheduler would draw."""
    dtype = denoising.model.dtype
    found = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.inputs.items()}
    chunk = case.config["chunk_len"]
    clip, cache = found["given"], ViDGPTCache(denoising.model) if cached else None
    if cache is not None:
        denoising.write(clip, 0, cache)
    for noises in found["step_noise"]:
        done = clip.shape[2]
        drawn = mock.Mock(side_effect=noises)
        with mock.patch.object(scheduling_ddpm, "randn_tensor", drawn):
            noise = found["init_noise"][:, :, done : done + chunk]
            new = denoising.chunk(noise, done, cache, None if cached else clip)
        if cache is not None:
            denoising.write(new, done, cache)
        clip = torch.cat([clip, new], 2)
    return clip


def _losses(case: Case, model: ViDGPT, chain: Chain) -> Iterator[Comparison]:
    found, prompt = case.inputs, case.config["loss_prefix_len"]
    clean, steps = found["train_x0"], torch.full((len(found["train_t"]),), case.config["prefix_perturb_t"])
    given = chain.noised(clean, found["perturb_noise"], steps)[:, :, :prompt]
    for name, shown in (("clean", None), ("perturb", given)):
        mse, bound = losses(
            model, chain, clean, prompt, found["train_t"], found["train_noise"], prompt=shown, text=_text(case)
        )
        yield close(f"loss_{name}_mse", mse, case.expected[f"loss_{name}_mse"])
        yield close(f"loss_{name}_vb", bound, case.expected[f"loss_{name}_vb"])
        yield close(f"loss_{name}_total", mse + bound, case.expected[f"loss_{name}_total"])


def _within(name: str, actual: Tensor, expected: Tensor, rtol: float, atol: float) -> Comparison:
    error = (actual.double() - expected.double()).abs()
    passed = actual.shape == expected.shape and bool((error <= atol + rtol * expected.double().abs()).all())
    return Comparison(name, float(error.max()), atol, passed)


Runner = Callable[[Case], Any]
RUNNERS: dict[tuple[str, str, str], Runner] = {
    ("vid-gpt", "module", "temporal_attention"): temporal_attention,
    ("vid-gpt", "model", "denoiser"): denoiser,
    ("vid-gpt", "cache", "kv_cache_ar"): cached_and_full,
    ("vid-gpt", "sampling", "ar_sampling_and_loss"): sampling_and_loss,
}
