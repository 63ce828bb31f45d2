"""FAVOR's parity cases: synchronisation and the causal Q-Former, in terms of mmzoo's public code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from parity_cases import Case, Comparison, close, exact
from torch import Tensor

from mmzoo.attention import allowed
from mmzoo.connectors.causal_qformer import AudioVisualQFormer, diversity_loss, synchronise


def _connector(case: Case) -> AudioVisualQFormer:
    config, streams = case.config, [case.config["whisper_d_model"]]
    if config.get("use_beats"):
        streams.append(config["beats_embed_dim"])
    module = AudioVisualQFormer(
        streams,
        config["llm_hidden_size"],
        hidden_size=config["qformer"]["hidden_size"],
        num_queries=config["num_video_query"],
        window=config["groupsize"],
        fine_queries=config.get("low_queries_per_window", 0),
        num_heads=config["qformer"]["num_attention_heads"],
        num_layers=config["qformer"]["num_hidden_layers"],
        intermediate_size=config["qformer"]["intermediate_size"],
        layer_norm_eps=config["qformer"]["layer_norm_eps"],
        audio_per_frame=config["audio_frames_per_video_frame"],
        causal=config["causal_attention"],
    ).eval()
    module.load_state_dict(case.checkpoint)
    return module


def _joint(case: Case, audio: Tensor) -> tuple[Tensor, Tensor]:
    """The synchronised frames, of which none is a batch's padding, and how many there are."""
    inputs, tokens = case.inputs, case.config["tokens_per_video_frame"]
    video = inputs["video_qformer_tokens"].unflatten(1, (-1, tokens))
    joint = synchronise(video, audio, case.config["audio_frames_per_video_frame"], inputs["modality_mask"])
    return joint, torch.full((len(joint),), joint.shape[1])


def joint_qformer(case: Case) -> Iterator[Comparison]:
    """favor, sync: from the encoders' outputs to the tokens of the language model."""
    module, expected = _connector(case), case.expected
    audio = module.audio_features(case.inputs["whisper_hidden_states"])
    yield close("audio_projected", audio, expected["audio_projected"])
    joint, count = _joint(case, audio)
    states, tokens = module.query_states(joint, count), module(joint, count)
    yield close("joint_query_output", states.flatten(0, 1), expected["joint_query_output"])
    yield close("diversity_loss", diversity_loss(states)[None], expected["diversity_loss"])
    yield close("inputs_llama", tokens.flatten(1, 2), expected["inputs_llama"])
    yield exact("atts_llama", torch.ones(tokens.flatten(1, 2).shape[:2]), expected["atts_llama"])
    yield from _inside(case, module, joint, count)


def _inside(case: Case, module: AudioVisualQFormer, joint: Tensor, count: Tensor) -> Iterator[Comparison]:
    expected: dict[str, Any] = case.expected
    padded = F.pad(joint, (0, 0, 0, 0, 0, -joint.shape[1] % module.window))
    queries = module.video_query_tokens
    frames, layouts = module.windows(padded, count, module.window, queries.shape[1])
    yield close("encoder_hidden_in", frames, expected["encoder_hidden_in"])
    opened = allowed(module.query_rule, layouts[0], layouts[2])[:, 0]
    yield exact("cross_attention_mask", opened, expected["cross_attention_mask"])
    if "frame_visible" in expected:
        yield exact("frame_visible", allowed(module.rule, layouts[1])[0], expected["frame_visible"])
    hidden = module.video_Qformer.embedded(queries.expand(len(frames), -1, -1))
    for i, layer in enumerate(module.video_Qformer.layers):
        states = layer.frame_states(frames, module.rule, layouts[1], module.attention)
        if f"encoder_states_after_causal_attn_layer{i}" in expected:
            name = f"encoder_states_after_causal_attn_layer{i}"
            yield close(name, states, expected[name])
        hidden = layer(hidden, frames, (module.rule, module.query_rule), layouts, module.attention)
        yield close(f"qformer_layer{i}_out", hidden, expected[f"qformer_layer{i}_out"])


def multi_resolution(case: Case) -> Iterator[Comparison]:
    """favor, mrc_qformer: the same Q-Former on windows and on single frames."""
    module, inputs, expected = _connector(case), case.inputs, case.expected
    audio = module.audio_features(inputs["whisper_hidden_states"], inputs["beats_hidden_states"])
    yield close("audio_features", audio, expected["audio_features"])
    joint, count = _joint(case, audio)
    states = module.query_states(joint, count)
    yield close("joint_query_output", states.flatten(1, 2), expected["joint_query_output"])
    coarse = states[..., states.shape[-1] // 2 :]
    yield close("diversity_loss", diversity_loss(coarse)[None], expected["diversity_loss"])
    yield close("inputs_llama", module(joint, count).flatten(1, 2), expected["inputs_llama"])


RUNNERS = {("favor", "module", "sync"): joint_qformer, ("favor", "module", "mrc"): multi_resolution}
