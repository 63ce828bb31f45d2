"""LongLive's parity cases in terms of mmzoo's public code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from parity_cases import Case, Comparison, close, exact
from torch import Tensor

from mmzoo.models import longlive
from mmzoo.models.longlive import LongLive, Stream, from_authors, merge_lora
from mmzoo_training.self_forcing import FlowSchedule

ROTARY_ROWS = 32


def model_of(config: dict[str, Any], **fields: Any) -> LongLive:
    """A model of a configuration in the authors' terms; without a transformer's, of one attention layer."""
    window = config["local_attn_size"]
    relative = config.get("use_infinite_attention") or config.get("relative_rope")
    sizes: dict[str, Any] = {
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["dim"] // config["num_heads"],
        "in_channels": config.get("in_dim", 4),
        "out_channels": config.get("in_dim", 4),
        "text_dim": config.get("text_dim", 8),
        "text_length": config.get("text_len", 4),
        "freq_dim": config.get("freq_dim", 8),
        "ffn_dim": config.get("ffn_dim", 8),
        "num_layers": config.get("num_layers", 1),
        "eps": config["eps"],
        "window": None if window == -1 else window,
        "sink": config["sink_size"],
        "frames_per_block": config["num_frame_per_block"],
        "positions": "relative" if relative else "absolute",
        "denoising_steps": tuple(config.get("denoising_step_list", (1000,))),
        "timestep_shift": config.get("timestep_shift", 5.0),
        "context_noise": config.get("context_noise", 0),
        "sample_size": (config.get("latent_h", 4), config.get("latent_w", 4)),
    }
    return LongLive(**{**sizes, **fields}).eval()


class Recorder(Stream):
    """A stream that keeps what the model was given and said."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[Tensor, float, Tensor]] = []

    def flow(self, x: Tensor, timestep: float | Tensor, **options: Any) -> Tensor:
        flow = super().flow(x, timestep, **options)
        self.calls.append((x, float(timestep), flow))
        return flow


def in_order(stream: Stream, keys: Tensor) -> Tensor:
    """What a layer holds [B, S N, H, D], by frames in ascending order and not by slots, filled up with zeros."""
    frames = stream.cache.frames
    order = sorted(range(len(frames.frames)), key=lambda slot: frames.frames[slot])
    parts = keys.unflatten(1, (frames.window, -1))
    free = torch.zeros_like(parts[:, : frames.window - len(order)])
    return torch.cat([parts[:, order], free], 1).flatten(1, 2)


def indices(stream: Stream) -> list[int]:
    """The authors' two counters: tokens made, tokens held."""
    frames = stream.cache.frames
    return [stream.frame * frames.tokens_per_frame, len(frames.frames) * frames.tokens_per_frame]


def frames_second(x: Tensor) -> Tensor:
    """[..., B, F, C, H, W] of [..., B, C, F, H, W], and back."""
    return x.transpose(-4, -3)


def run_blocks(case: Case, stream: Recorder) -> Iterator[int]:
    """Make all blocks from the recorded noise; yields before each."""
    noise, renoise = frames_second(case.inputs["noise"]), frames_second(case.inputs["renoise"])
    for number, block in enumerate(noise.split(stream.model.config.frames_per_block, 2)):
        yield number
        # The scheduler also draws noise after the last step, and multiplies it by 0.
        drawn = iter([*renoise[number], torch.zeros_like(block)])
        with patch("diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor", lambda *_, **__: next(drawn)):  # noqa: B023
            stream.keep(stream.denoise(block, None))


def few_step_sampler(case: Case) -> Iterator[Comparison]:
    """longlive, model_ar: every call of the model, the clip, and what the caches hold at the end."""
    expected = case.expected
    for attention in ("sdpa", "eager"):
        model = model_of(case.config)
        model.load_state_dict(from_authors(case.checkpoint))
        model.set_attention(attention)
        stream = Recorder(model, case.inputs["prompt_embeds"])
        clip = [stream.latents for _ in run_blocks(case, stream)]
        count, schedule = expected["flow_pred"].shape[1], FlowSchedule(model.config.timestep_shift)
        flows = [frames_second(flow) for _, _, flow in stream.calls]
        clean = [schedule.clean(x, flow, torch.tensor([t])) for x, t, flow in stream.calls]
        whole = torch.stack(flows).unflatten(0, (-1, count))
        yield close(f"flow_pred {attention}", whole, expected["flow_pred"])
        x0 = torch.stack([frames_second(x) for x in clean]).unflatten(0, (-1, count))
        yield close(f"x0_pred {attention}", x0, expected["x0_pred"])
        blocks = [x[:, :, -model.config.frames_per_block :] for x in (*clip[1:], stream.latents)]
        yield close(f"latents {attention}", frames_second(torch.cat(blocks, 2)), expected["latents"])
        yield close("timesteps_used", torch.tensor([t for _, t, _ in stream.calls[:count]]), expected["timesteps_used"])
        warped = model.build_scheduler().timesteps
        yield close("denoising_step_list_warped", warped, expected["denoising_step_list_warped"])
        yield exact("final_indices", torch.tensor([indices(stream)] * len(model.blocks)), expected["final_indices"])
        for layer in range(len(model.blocks)):
            held = {"k": stream.cache.frames.keys[layer], "v": stream.cache.frames.values[layer]}
            text = dict(zip("kv", stream.cache.text[layer], strict=True))
            for name in "kv":
                yield close(f"final_cache_{name} {layer}", in_order(stream, held[name]), expected[f"final_cache_{name}_block{layer}"])  # fmt: skip  # noqa: E501
                yield close(f"final_cross_{name} {layer}", text[name], expected[f"final_cross_{name}_block{layer}"])


def recache(case: Case) -> Iterator[Comparison]:
    """longlive, kv_recache: the caches around two changes of the prompt, and the clip."""
    expected, config = case.expected, case.config
    model = model_of(config)
    model.load_state_dict(from_authors(case.checkpoint))
    prompts, switches = case.inputs["prompt_embeds"], config["switch_frame_indices"]
    stream = Recorder(model, prompts[:1], global_sink=config["global_sink"])
    clip, part = [], 0
    for _ in run_blocks(case, stream):
        clip.append(stream.latents)
        if part < len(switches) and stream.frame >= switches[part]:
            yield from _held(stream, f"switch{part}_cache_{{}}_before_block{{}}", expected)
            yield exact(f"switch{part}_indices", torch.tensor([*indices(stream), stream.frame]), expected[f"switch{part}_indices"])  # fmt: skip  # noqa: E501
            stream.switch(prompts[part + 1, None])
            yield from _held(stream, f"switch{part}_cache_{{}}_block{{}}", expected)
            part += 1
    blocks = [x[:, :, -model.config.frames_per_block :] for x in (*clip[1:], stream.latents)]
    yield close("latents", frames_second(torch.cat(blocks, 2)), expected["latents"])


def _held(stream: Stream, name: str, expected: dict[str, Tensor]) -> Iterator[Comparison]:
    for kind, buffers in (("k", stream.cache.frames.keys), ("v", stream.cache.frames.values)):
        for layer, buffer in enumerate(buffers):
            said = name.format(kind, layer)
            if said in expected:
                yield close(said, in_order(stream, buffer), expected[said])


def attention_layer(case: Case) -> Iterator[Comparison]:
    """longlive, self_attention: one layer over several chunks and passes, and all that its cache holds.

    Where the sink is larger than a block, as the authors' code has it.
    """
    config, expected, given = case.config, case.expected, case.inputs["x"]
    size = (2 * config["grid_h"], 2 * config["grid_w"])
    model = model_of(config, sample_size=size)
    block, per_block = model.blocks[0], config["num_frame_per_block"]
    named = from_authors({f"blocks.0.self_attn.{name}": x for name, x in case.checkpoint.items()})
    block.attn1.load_state_dict({name.removeprefix("blocks.0.attn1."): x for name, x in named.items()})
    window = config["cache_tokens"] // config["frame_seq_length"]
    prompts = torch.zeros(given.shape[2], 1, model.config.text_dim)
    stream = Stream(model, prompts, window=window, authors_large_sink=config["sink_size"] > per_block)
    outputs, counters = [], []
    for chunk in range(len(given)):
        for number in range(given.shape[1]):
            x = given[chunk, number].unflatten(1, (per_block, -1))
            outputs.append(_one_layer(stream, x))
            frames = stream.cache.frames
            made = (chunk + 1) * per_block
            held = sum(frame < made for frame in frames.frames)
            counters.append([made * frames.tokens_per_frame, held * frames.tokens_per_frame])
            call = chunk * given.shape[1] + number
            for kind, buffers in (("k", frames.keys), ("v", frames.values)):
                if (name := f"cache_{kind}_call{call}") in expected:
                    yield close(name, in_order(stream, buffers[0]), expected[name])
        stream.frame += per_block
    yield close("out", torch.stack(outputs).view_as(expected["out"]), expected["out"])
    yield exact("indices", torch.tensor(counters), expected["indices"])
    table = longlive.rotary(model.config.attention_head_dim, tuple(range(ROTARY_ROWS)), ROTARY_ROWS, ROTARY_ROWS, torch.device("cpu"))  # fmt: skip  # noqa: E501
    for name, part in zip(("freqs_real", "freqs_imag"), table, strict=True):
        cubic = part.view(ROTARY_ROWS, ROTARY_ROWS, ROTARY_ROWS, -1)
        diagonal = cubic[(torch.arange(ROTARY_ROWS),) * 3]
        yield close(name, diagonal, expected[name])


@torch.no_grad()
def _one_layer(stream: Stream, x: Tensor) -> Tensor:
    """What self-attention alone gives, for tokens [B, F, N, C]; passes are those of `LongLive.forward`."""
    model, said = stream.model, []

    def forward(block: Any, _: Tensor, step: Any, past: Any) -> Tensor:
        said.append(block._over_frames(x, step, past))
        return x

    with patch.object(longlive.Block, "forward", forward):
        stream.flow(torch.zeros(len(x), model.config.in_channels, x.shape[1], *stream.size), 0.0)
    return said[0].flatten(1, 2)


def lora(case: Case) -> Iterator[Comparison]:
    """longlive, lora: the adapter merged into the model."""
    options = case.config["lora"]
    model = model_of(case.config)
    adapter = from_authors(case.tensors("lora"))
    model.load_state_dict(merge_lora(from_authors(case.checkpoint), adapter, alpha=options["alpha"]))
    x, timestep = frames_second(case.inputs["x"]), case.inputs["timestep"]
    stream = Stream(model, case.inputs["prompt_embeds"])
    with torch.no_grad():
        flow = model(x, timestep, stream.prompts, cache=stream.cache).sample
    yield close("flow_pred", frames_second(flow), case.expected["flow_pred"])
    clean = FlowSchedule(model.config.timestep_shift).clean(x, flow, timestep)
    yield close("x0_pred", frames_second(clean), case.expected["x0_pred"])


def flow_schedule(case: Case) -> Iterator[Comparison]:
    """longlive, sampling: the schedule of training, and the shifted steps of generation."""
    inputs, expected = case.inputs, case.expected
    schedule, timestep = FlowSchedule(case.config["shift"]), inputs["timestep"]
    noisy = schedule.add_noise(inputs["x"], inputs["noise"], timestep)
    yield close("sigmas", schedule.sigmas, expected["sigmas"])
    yield close("timesteps", schedule.timesteps, expected["timesteps"])
    yield close("x_t", noisy, expected["x_t"])
    yield close("training_weights", schedule.training_weights(), expected["training_weights"])
    clean = schedule.clean(noisy, inputs["flow"], timestep)
    yield close("x0_from_flow", clean, expected["x0_from_flow"])
    yield close("flow_from_x0", schedule.flow(noisy, clean, timestep), expected["flow_from_x0"])
    steps = {"denoising_steps": tuple(case.config["denoising_step_list"]), "timestep_shift": case.config["shift"]}
    with torch.device("meta"):
        model = LongLive(num_layers=0, **steps)
    yield close("warped_steps", model.build_scheduler().timesteps, expected["warped_steps"])


RUNNERS = {
    ("longlive", "model", "model_ar"): few_step_sampler,
    ("longlive", "model", "lora"): lora,
    ("longlive", "cache", "kv_recache"): recache,
    ("longlive", "cache", "self_attention"): attention_layer,
    ("longlive", "sampling", "flow_scheduler"): flow_schedule,
}
