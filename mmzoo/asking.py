"""The short way: a question about an image or a video, its answer, and where the answer looked.

Shape legend: A answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature

from mmzoo.attention.maps import AttentionMaps
from mmzoo.errors import InputError
from mmzoo.layout import TokenLayout
from mmzoo.media import Video, read_image
from mmzoo.processing import is_image


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: the answer.
        confidence: geometric mean of the probabilities of its tokens, the end token included.
        layout: of the prompt; for drawing the mask.
        video: the frames that were read, with decoder and version; None for an image.
    """

    text: str
    confidence: float
    layout: TokenLayout
    video: Video | None = None

    def __str__(self) -> str:
        return self.text


class Asking:
    """What a model with a processor offers beside `forward` and `generate`."""

    processor: Any = None

    def ask(self, source: Any, question: str, *, max_new_tokens: int = 64, deadline: float = 60.0) -> Answer:
        """Answer a question about an image or a video.

        Args:
            source: an image (path or PIL image), or a video: anything `read_video` takes.
            question: plain text.
            max_new_tokens: at most this many.
            deadline: seconds after which a video that cannot be read is given up.

        Raises:
            InputError: the model has no processor.
            VideoReadError: the video cannot be read.
        """
        inputs, media = self._asked(source, question, deadline)
        return self._answered(inputs, media.get("video"), max_new_tokens)[0]

    def attend(self, source: Any, question: str, *, max_new_tokens: int = 64, deadline: float = 60.0) -> AttentionMaps:
        """Ask, and say where the answer looked: the weights of every layer and head, through the same rule.

        Arguments and errors are those of `ask`. The weights come from a second pass on the eager backend.
        """
        inputs, media = self._asked(source, question, deadline)
        frames = media["video"].frames if "video" in media else np.asarray(read_image(media["image"]))[None]
        return self.attention_maps(inputs, frames, media.get("video"), max_new_tokens=max_new_tokens)

    def attention_maps(
        self,
        inputs: Mapping[str, Tensor],
        frames: np.ndarray,
        video: Video | None = None,
        *,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> AttentionMaps:
        """Answer a batch of one without padding, and say where the answer looked, as `attend` does.

        Args:
            inputs: of a prompt with media, as the processor makes them.
            frames: uint8 [N, H, W, 3], the images or frames that it shows, for drawing.
            video: that they are of.
            max_new_tokens: at most this many.
            **options: other options of `generate`.

        Raises:
            InputError: the prompt shows nothing.
        """
        if any(inputs.get(name) is None for name in self.media_inputs) or not self.media_inputs:
            raise InputError("An answer about text alone looks at no picture. Give a prompt with media.")
        answer, tokens = self._answered(inputs, video, max_new_tokens, **options)
        layout = TokenLayout(inputs["layout"])
        told = layout if len(tokens) == 1 else layout.with_answer(len(tokens) - 1)
        shown = {name: inputs[name] for name in self.media_inputs}
        with torch.no_grad(), self._eager():
            asked, said = self.embed(inputs["input_ids"], layout, **shown), self.embed(tokens[None, :-1], None)
            outputs = self(inputs_embeds=torch.cat([asked, said], 1), layout=told, output_attentions=True)
            shown["pixel_values"] = self.as_input(shown["pixel_values"])
            patches = self.patch_weights(**{name: one[0] for name, one in shown.items()})
        rows = torch.stack([layer[0, :, len(layout) - 1 :] for layer in outputs.attentions])
        words = [self.processor.tokenizer.decode(token) for token in tokens]
        return AttentionMaps(answer, words, rows.float().cpu(), told.to("cpu"), patches.float().cpu(), frames)

    @contextmanager
    def _eager(self) -> Iterator[None]:
        before = self.language_model.config._attn_implementation
        self.set_attention("eager")
        try:
            yield
        finally:
            self.set_attn_implementation(before)

    def _asked(self, source: Any, question: str, deadline: float) -> tuple[BatchFeature, dict[str, Any]]:
        if self.processor is None:
            raise InputError("This model has no processor. Load it by name, or set model.processor.")
        media: dict[str, Any] = {"image": source}
        if not is_image(source):
            media = {"video": self.processor.read_video(source, deadline=deadline)}
        return self.processor.ask(question, **media).to(self.device), media

    @torch.no_grad()
    def _answered(
        self, inputs: Mapping[str, Tensor], video: Video | None, max_new_tokens: int, **options: Any
    ) -> tuple[Answer, Tensor]:
        """The answer and its tokens [A], the end token included."""
        outputs = self.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        tokens = outputs.sequences[0, inputs["input_ids"].shape[1] :]
        chosen = torch.stack(outputs.logits, 1)[0].float().log_softmax(-1).gather(1, tokens[:, None])
        said = self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        layout = TokenLayout(inputs["layout"].cpu())
        return Answer(said, float(chosen.mean().exp()), layout, video), tokens
