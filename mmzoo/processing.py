"""Processors: text and media -> ids, pixels and the TokenLayout, padded on one side.

Shape legend: B batch, L tokens, K layout fields, M media of the fullest sample, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoImageProcessor, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from mmzoo.errors import InputError
from mmzoo.layout import Modality, Role, Span, TokenLayout, batch, splice
from mmzoo.media import Video, read_image, read_video

IMAGE, VIDEO = "<image>", "<video>"


class MultimodalProcessor(ProcessorMixin):
    """Base of the families' processors. A family says how many tokens a medium takes and how a question is put.

    Args:
        image_processor: a transformers image processor.
        tokenizer: a transformers tokenizer that knows `<image>` and the markers as single tokens.
        num_frames: frames taken from a clip.
        answer_marker: the token after which the model speaks.
        turn_marker: the token after which the user speaks again.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_frames: int = 8,
        answer_marker: str = "<|assistant|>",
        turn_marker: str = "<|user|>",
        chat_template: str | None = None,
    ):
        self.num_frames = num_frames
        self.answer_marker, self.turn_marker = answer_marker, turn_marker
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> MultimodalProcessor:
        """The processor saved in a folder. Pixels are made by Pillow: torchvision's differ by up to a grey level."""
        processor = super().from_pretrained(folder, **kwargs)
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        return processor

    def image_span(self, pixels: torch.Tensor) -> Span:
        """The tokens of one image, from its pixels [C, H, W]."""
        raise NotImplementedError

    def prompt(self, question: str, media: str = "") -> str:
        """The text that puts a question; `media` holds the places of what it is about."""
        raise NotImplementedError

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        *,
        padding_side: str = "left",
        max_length: int | None = None,
        labels: bool = False,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """A batch.

        Args:
            text: one string or one a sample, with `<image>` and `<video>` where media stand.
            images: for one string its images; for several strings a list of images each (None where there are none).
            videos: likewise: anything `read_video` takes, or a `Video`.
            padding_side: "left" to generate, "right" to train.
            max_length: longer texts are cut, before media take their places.
            labels: add labels: the ids of answer text, -100 elsewhere.
            add_special_tokens: let the tokenizer add its own (beginning of sequence).

        Returns:
            input_ids and attention_mask int64 [B, L], layout int32 [B, L, K], pixel_values float32 [B, M, C, H, W] if
            there are media, and labels int64 [B, L] if asked for.

        Raises:
            InputError: places and media do not agree.
            VideoReadError: a video cannot be read.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images_of = self._per_sample(images, isinstance(text, str), len(texts), "images")
        videos_of = self._per_sample(videos, isinstance(text, str), len(texts), "videos")
        ids, layouts, pixels = [], [], []
        for sample_text, sample_images, sample_videos in zip(texts, images_of, videos_of, strict=True):
            frames, expanded = self._media_in_order(sample_text, sample_images, sample_videos)
            tokens = self.tokenizer(
                expanded,
                add_special_tokens=add_special_tokens,
                truncation=max_length is not None,
                max_length=max_length,
            )["input_ids"]
            sample_pixels = self.pixels(frames)
            sample_ids, layout = self.lay_out(tokens, [self.image_span(image) for image in sample_pixels])
            ids.append(sample_ids)
            layouts.append(layout)
            pixels.append(sample_pixels)
        return self.collate(ids, layouts, pixels, padding_side=padding_side, labels=labels)

    def ask(self, question: str, *, image: Any = None, video: Any = None) -> BatchFeature:
        """The inputs for one question about an image or a video."""
        places = IMAGE if image is not None else VIDEO if video is not None else ""
        return self(
            self.prompt(question, places),
            images=None if image is None else [image],
            videos=None if video is None else [video],
        )

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """float32 [M, C, H, W]: converted to RGB first, then resized and normalised by the image processor."""
        if not images:
            return torch.zeros(0)
        rgb = [image.convert("RGB") for image in images]
        return self.image_processor(rgb, return_tensors="pt")["pixel_values"]

    def lay_out(self, tokens: Sequence[int], media: Sequence[Span]) -> tuple[list[int], TokenLayout]:
        """Ids with media tokens in place, and their layout [1, L, K]."""
        to_id = self.tokenizer.convert_tokens_to_ids
        return splice(
            tokens,
            media,
            place_id=to_id(IMAGE),
            answer_marker_id=to_id(self.answer_marker),
            turn_marker_id=to_id(self.turn_marker),
        )

    def collate(
        self,
        ids: Sequence[Sequence[int]],
        layouts: Sequence[TokenLayout],
        pixels: Sequence[torch.Tensor],
        *,
        padding_side: str = "left",
        labels: bool = False,
    ) -> BatchFeature:
        """Samples as one batch; everything is padded on the same side."""
        layout = batch(layouts, padding_side)
        input_ids = torch.full(layout.sample.shape, self.tokenizer.pad_token_id)
        input_ids[layout.valid] = torch.tensor([token for sample in ids for token in sample], dtype=torch.long)
        data = {"input_ids": input_ids, "attention_mask": layout.attention_mask, "layout": layout.data}
        if any(len(sample) for sample in pixels):
            data["pixel_values"] = _stack(pixels)
        if labels:
            data["labels"] = answer_labels(input_ids, layout)
        return BatchFeature(data)

    def _per_sample(self, media: Sequence[Any] | None, single: bool, count: int, name: str) -> list[list[Any]]:
        if media is None:
            return [[] for _ in range(count)]
        nested = [list(media)] if single else [list(sample or ()) for sample in media]
        if len(nested) != count:
            raise InputError(f"{count} texts need {count} lists of {name}, got {len(nested)}.")
        return nested

    def _media_in_order(self, text: str, images: list[Any], videos: list[Any]) -> tuple[list[Image.Image], str]:
        """The images of a sample in the order of their places, and its text with `<image>` for every frame."""
        for place, media in ((IMAGE, images), (VIDEO, videos)):
            if text.count(place) != len(media):
                raise InputError(
                    f"The text has {text.count(place)} {place} places, but {len(media)} were given. "
                    f"Write {place} once for each, and give one for each place."
                )
        clips = [self._frames(video) for video in videos]
        parts, frames = [], []
        remaining_images, remaining_clips = iter(images), iter(clips)
        for piece in _split_at_places(text):
            if piece == IMAGE:
                frames.append(read_image(next(remaining_images)))
            elif piece == VIDEO:
                clip = next(remaining_clips)
                frames.extend(clip)
                piece = IMAGE * len(clip)
            parts.append(piece)
        return frames, "".join(parts)

    def _frames(self, video: Any) -> list[Image.Image]:
        clip = video if isinstance(video, Video) else read_video(video, num_frames=self.num_frames)
        return [Image.fromarray(frame) for frame in np.asarray(clip.frames)]


SPECIAL_TOKENS = ("<s>", "<unk>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<pad>")


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words for tiny and nano models, with Phi-3's markers.

    `<image>` and `<|endofchunk|>` get the last two ids, as the added tokens of a released tokenizer do.
    """
    added = (IMAGE, "<|endofchunk|>")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((*SPECIAL_TOKENS, *words, *added)))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in (*SPECIAL_TOKENS, *added)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def is_image(source: Any) -> bool:
    """Whether `ask` takes the source for an image: a PIL image, or a file with an image's suffix."""
    if isinstance(source, (str, Path)):
        return Path(source).suffix.lower() in Image.registered_extensions()
    return isinstance(source, Image.Image)


def _split_at_places(text: str) -> list[str]:
    pieces = []
    for i, part in enumerate(text.split(IMAGE)):
        pieces += [IMAGE] if i else []
        for j, inner in enumerate(part.split(VIDEO)):
            pieces += [VIDEO] if j else []
            pieces.append(inner)
    return pieces


def _stack(pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """[B, M, C, H, W]: media of every sample, missing ones zero."""
    most = max(len(sample) for sample in pixels)
    shape = next(sample.shape[1:] for sample in pixels if len(sample))
    stacked = torch.zeros(len(pixels), most, *shape)
    for row, sample in zip(stacked, pixels, strict=True):
        if len(sample):
            row[: len(sample)] = sample
    return stacked


def answer_labels(input_ids: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """int64 [B, L]: the ids of answer text, -100 on prompts, media and padding."""
    trained = layout.valid & (layout.role == int(Role.ANSWER)) & (layout.modality == int(Modality.TEXT))
    return torch.where(trained, input_ids, -100)
