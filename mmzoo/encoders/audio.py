"""Audio encoders: Whisper's from transformers, at any size, and what a second stream has to offer.

Shape legend: N sounds, S samples, M mel bins, F feature frames, T time steps, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mmzoo.errors import InputError
from mmzoo.media import Audio


class SecondAudioEncoder(Protocol):
    """A second audio stream, such as BEATs in video-SALMONN, which no package of ours brings."""

    def __call__(self, waveforms: Tensor) -> Tensor:
        """float [N, T, D] at 50 steps a second, of float32 [N, S] at 16 kHz."""


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
