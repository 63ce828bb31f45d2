"""Audio encoders: Whisper's from transformers, at any size, and what a second stream has to offer.

Shape legend: N sounds, S samples, M mel bins, F feature frames, T time steps, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmzoo.errors import InputError
from mmzoo.media import Audio


class SecondAudioEncoder(Protocol):
    """A second audio stream, such as BEATs in video-SALMONN, which no package of ours brings."""

    def __call__(self, waveforms: Tensor) -> Tensor:
        """float [N, T, D] at 50 steps a second, of float32 [N, S] at 16 kHz; fewer steps are filled up with 0."""


class SpectrogramTransformer(nn.Module):
    """transformers' Audio Spectrogram Transformer as a second stream, at any size, with random weights.

    Its patches stand moment by moment, those of all frequencies of a moment together. With 128 mel bins and strides of
    16, that is 50 steps a second. It is no BEATs, and reads none of its weights.

    Args:
        config: max_length, in steps of 10 ms, is what it hears: a longer sound is cut, a shorter one filled up.
    """

    def __init__(self, config: ASTConfig | dict[str, Any]):
        super().__init__()
        config = config if isinstance(config, ASTConfig) else ASTConfig(**config)
        self.model = ASTModel(config)
        self.extractor = ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)

    def forward(self, waveforms: Tensor) -> Tensor:
        """float [N, T, D] of float32 [N, S] at 16 kHz."""
        sounds, config = list(waveforms.float().cpu().numpy()), self.model.config
        features = self.extractor(sounds, sampling_rate=self.extractor.sampling_rate, return_tensors="pt")
        states = self.model(features["input_values"].to(self.model.device, self.model.dtype)).last_hidden_state
        frequencies = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        patches = states[:, 2:]  # after the two that stand for the whole
        return patches.unflatten(1, (frequencies, -1)).transpose(1, 2).flatten(1, 2)


def build_audio_encoder(config: WhisperConfig | dict[str, Any]) -> tuple[WhisperEncoder, int]:
    """Whisper's encoder with random weights, and its width D.

    It takes log-mel features [N, M, F] of a fixed length and gives [N, T, D], T = F / 2. A small one serves the nano
    model; ours is trained from scratch.
    """
    config = config if isinstance(config, WhisperConfig) else WhisperConfig(**config)
    return WhisperEncoder(config), config.d_model


def log_mel(extractor: WhisperFeatureExtractor, sounds: Sequence[Audio]) -> Tensor:
    """float32 [N, M, F] of sounds, each cut or filled up with silence to the extractor's length.

    Raises:
        InputError: a sound at another rate than the extractor's.
    """
    rates = {sound.sample_rate for sound in sounds} - {extractor.sampling_rate}
    if rates:
        raise InputError(f"The encoder hears {extractor.sampling_rate} samples a second, the sound has {rates.pop()}.")
    waveforms = [np.ascontiguousarray(sound.waveform) for sound in sounds]
    made = extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    return torch.as_tensor(made["input_features"])
