"""Training FAVOR and video-SALMONN: cross entropy, and a loss that keeps the queries of a window apart.

Sources: arXiv 2310.05863, arXiv 2406.15704.

Shape legend: B rows, M items of a row, W windows, N queries of a window, C width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmzoo.connectors.causal_qformer import diversity_loss
from mmzoo.errors import InputError
from mmzoo_training.finetune import Finetune


class FAVORFinetune(Finetune):
    """As `Finetune`, for models of FAVOR's family.

    Args:
        diversity: what the mean similarity of a window's queries is multiplied with before it is added to the loss;
            0.01 in the authors' code, and off in the configuration that they released. Fine windows have no part in it.
        second_audio_encoder: of video-SALMONN, frozen; see `mmzoo.encoders.audio.SecondAudioEncoder`.
        **kwargs: as `Finetune` takes them.

    Raises:
        InputError: a second encoder for a model that hears one stream, or none for one that hears two.
    """

    def __init__(
        self, *args: Any, diversity: float = 0.0, second_audio_encoder: nn.Module | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.diversity, self.second = diversity, (second_audio_encoder,)  # a tuple hides it from the state dict
        if second_audio_encoder is not None:
            self.model.set_second_audio_encoder(second_audio_encoder.eval())
        elif self.model.config.second_audio_size is not None:
            raise InputError("This model hears two audio streams. Give second_audio_encoder, which hears the second.")
        self.states: list[Tensor] = []
        self.model.connector.llama_proj.register_forward_pre_hook(lambda _, given: self.states.append(given[0]))

    def on_fit_start(self) -> None:
        if self.second[0] is not None:
            self.second[0].to(self.device)

    def training_step(self, batch: dict[str, Any], number: int) -> Tensor:
        self.states.clear()
        loss = super().training_step(batch, number)
        if not self.diversity or not self.states:
            return loss
        similar = self.similarity(batch)
        self.log("similarity", similar, batch_size=len(batch["input_ids"]))
        return loss + self.diversity * similar

    def similarity(self, batch: Mapping[str, Any]) -> Tensor:
        """`diversity_loss` of the windows that a batch's items have, without those that only pad it."""
        connector, states = self.model.connector, self.states[-1]  # [B * M, W, N, C], after as wide fine ones
        windows = connector.num_windows(torch.maximum(batch["num_frames"], batch["audio_frames"])).flatten()
        real = torch.arange(states.shape[1], device=states.device) < windows[:, None]
        return diversity_loss(states[real][..., -connector.video_query_tokens.shape[-1] :])
