"""Processors: text and media -> ids, pixels and the TokenLayout, padded on one side.

Shape legend: B batch, L tokens, K layout fields, M media of the fullest sample, C channels, H height, W width.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from mmzoo.errors import InputError, MissingExtra
from mmzoo.layout import Modality, Role, Span, TokenLayout, batch, splice
from mmzoo.media import Video, read_image, read_video

IMAGE, VIDEO = "<image>", "<video>"
ACCESS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "trust_remote_code")
"""The options of `from_pretrained` that say where files come from."""


class Turn(NamedTuple):
    """One exchange to train on.

    Attributes:
        question: plain text, without places of media.
        answer: what the model shall say.
        media: the places `<image>` and `<video>` of what arrives with the question.
    """

    question: str
    answer: str
    media: str = ""


class MultimodalProcessor(ProcessorMixin):
    """Base of the families' processors. A family says how many tokens a medium takes and how a question is put.

    Args:
        image_processor: a transformers image processor.
        tokenizer: a transformers tokenizer that knows `<image>` as a single token.
        num_frames: frames taken from a clip.
        answer_marker: the text after which the model speaks.
        turn_marker: the text with which the user speaks again.
    """

    sampling: ClassVar[str] = "linspace"
    """The rule by which frames are taken from a clip: a name in `mmzoo.media.SAMPLING_RULES`."""
    multi_turn: ClassVar[bool] = False
    """Whether `dialogue` takes more than one turn."""
    hears: ClassVar[bool] = False
    """Whether `read_video` reads the sound of a file, too; then there is `with_sound`."""
    before_answer: ClassVar[str] = ""
    """What stands between `prompt` and the answer."""

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
        access = {name: kwargs[name] for name in ACCESS if name in kwargs}
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **access)
        return processor

    def image_span(self, pixels: torch.Tensor) -> Span:
        """The tokens of one image, from its pixels [C, H, W]."""
        raise NotImplementedError

    def spans(self, pixels: torch.Tensor, modality: Modality) -> list[Span]:
        """The tokens of one medium, from its pixels [F, C, H, W]. Here every frame of a clip stands as one image."""
        return [self.image_span(frame) for frame in pixels]

    def frame_places(self, count: int, before: int) -> str:
        """The text in which the `count` spans of a clip stand, after `before` spans of earlier media."""
        return IMAGE * count

    def prompt(self, question: str, media: str = "", *, system: str | None = None) -> str:
        """The text that puts a question.

        Args:
            question: plain text.
            media: the places of what it is about.
            system: in place of the processor's own system text.

        Raises:
            InputError: a system text, for a family that has no place for one.
        """
        raise NotImplementedError

    def dialogue(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """The text of questions with their answers, as the family is trained on it: each answer with its end.

        In each turn media stand before the question.

        Args:
            turns: from the first on.
            system: in place of the processor's own system text.

        Raises:
            InputError: several turns, or a system text, for a family that has no place for them.
        """
        (turn,) = self._single(turns)
        if system is not None:
            raise InputError(f"{type(self).__name__} has no place for a system text.")
        return self.prompt(turn.question, turn.media) + turn.answer + self.tokenizer.eos_token

    def caption(self, text: str, media: str = IMAGE) -> str:
        """The text of a captioned medium, all of it a target."""
        return media + text.strip() + self.tokenizer.eos_token

    def _single(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        if len(turns) != 1:
            raise InputError(f"{type(self).__name__} is trained on single turns, got {len(turns)}.")
        return turns

    def encode(self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """The ids of one sample's text, with one `<image>` for each span."""
        return self.tokenizer(
            text, add_special_tokens=add_special_tokens, truncation=max_length is not None, max_length=max_length
        )["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        *,
        padding_side: str = "left",
        max_length: int | None = None,
        pad_to_multiple_of: int = 1,
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
            pad_to_multiple_of: pad to a length that this divides.
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
        for sample in zip(texts, images_of, videos_of, strict=True):
            sample_ids, layout, media = self.sample(
                *sample, add_special_tokens=add_special_tokens, max_length=max_length
            )
            ids.append(sample_ids)
            layouts.append(layout)
            pixels.append(media)
        return self.collate(
            ids, layouts, pixels, padding_side=padding_side, pad_to_multiple_of=pad_to_multiple_of, labels=labels
        )

    def sample(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any
    ) -> tuple[list[int], TokenLayout, list[torch.Tensor]]:
        """One sample as `collate` takes it: ids, layout [1, L, K], and the pixels [F, C, H, W] of its media in order.

        Options are those of `encode`; errors are those of a call.
        """
        pixels, spans = self._media_in_order(text, list(images), list(videos))
        tokens = self.encode(self.expand(text, spans), **options)
        return *self.lay_out(tokens, [span for standing in spans for span in standing]), pixels

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
        rgb = [image.convert("RGB") for image in images]
        return self.image_processor(rgb, return_tensors="pt")["pixel_values"]

    def lay_out(self, tokens: Sequence[int], media: Sequence[Span]) -> tuple[list[int], TokenLayout]:
        """Ids with media tokens in place, and their layout [1, L, K]."""
        return splice(
            tokens,
            media,
            place_id=self.tokenizer.convert_tokens_to_ids(IMAGE),
            answer_marker=self.marker_ids(self.answer_marker),
            turn_marker=self.marker_ids(self.turn_marker),
        )

    def marker_ids(self, marker: str) -> list[int]:
        """The ids in a row by which a marker is known in an encoded text."""
        return self.tokenizer(marker, add_special_tokens=False)["input_ids"]

    def collate(
        self,
        ids: Sequence[Sequence[int]],
        layouts: Sequence[TokenLayout],
        pixels: Sequence[Sequence[torch.Tensor]],
        *,
        padding_side: str = "left",
        pad_to_multiple_of: int = 1,
        labels: bool = False,
    ) -> BatchFeature:
        """Samples as one batch, padded on one side; `pixels` holds the media [F, C, H, W] of every sample in order."""
        longest = max(len(layout) for layout in layouts)
        layout = batch(layouts, padding_side, longest + -longest % pad_to_multiple_of)
        input_ids = torch.full(layout.sample.shape, self.tokenizer.pad_token_id)
        input_ids[layout.valid] = torch.tensor([token for sample in ids for token in sample], dtype=torch.long)
        data = {"input_ids": input_ids, "attention_mask": layout.attention_mask, "layout": layout.data}
        if any(pixels):
            data["pixel_values"] = _stack([torch.cat(list(media)) if media else torch.zeros(0) for media in pixels])
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

    def _media_in_order(
        self, text: str, images: list[Any], videos: list[Any]
    ) -> tuple[list[torch.Tensor], list[list[Span]]]:
        """Pixels [F, C, H, W] and spans of each of a sample's media, in the order of their places."""
        for place, media in ((IMAGE, images), (VIDEO, videos)):
            if text.count(place) != len(media):
                raise InputError(
                    f"The text has {text.count(place)} {place} places, but {len(media)} were given. "
                    f"Write {place} once for each, and give one for each place."
                )
        frames_of = {
            IMAGE: iter([[read_image(image)] for image in images]),
            VIDEO: iter([self._frames(video) for video in videos]),
        }
        kinds = [piece for piece in _split_at_places(text) if piece in frames_of]
        pixels = [self.pixels(next(frames_of[kind])) for kind in kinds]
        modality = {IMAGE: Modality.IMAGE, VIDEO: Modality.VIDEO}
        return pixels, [self.spans(medium, modality[kind]) for medium, kind in zip(pixels, kinds, strict=True)]

    def expand(self, text: str, spans: Iterable[Sequence[Span]]) -> str:
        """The text with `<image>` for every span; `spans` holds those of each medium, in the order of their places."""
        standing, expanded, before = iter(spans), [], 0
        for piece in _split_at_places(text):
            if piece in (IMAGE, VIDEO):
                count = len(next(standing))
                piece = self.frame_places(count, before) if piece == VIDEO else IMAGE * count
                before += count
            expanded.append(piece)
        return "".join(expanded)

    def read_video(self, source: Any, **options: Any) -> Video:
        """The frames that the family looks at; the options are those of `mmzoo.media.read_video`."""
        return read_video(source, num_frames=self.num_frames, sampling=self.sampling, **options)

    def _frames(self, video: Any) -> list[Image.Image]:
        clip = video if isinstance(video, Video) else self.read_video(video)
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


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a released checkpoint.

    Raises:
        MissingExtra: it is a sentencepiece file, for which transformers needs packages that are not installed.
    """
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        for package in ("sentencepiece", "google.protobuf"):
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise MissingExtra(package, "sentencepiece", f"The tokenizer in {folder}") from error
    return AutoTokenizer.from_pretrained(folder)


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
    """int64 [B, L]: the ids of answer text, -100 on prompts, media and padding.

    A packed sample's first token has none either: nothing of its own stands before it that could predict it.
    """
    trained = layout.valid & (layout.role == int(Role.ANSWER)) & (layout.modality == int(Modality.TEXT))
    trained[:, 1:] &= layout.sample[:, 1:] == layout.sample[:, :-1]
    return torch.where(trained, input_ids, -100)
