"""FAVOR and video-SALMONN: sound and video together, read in windows by a causal Q-Former.

Sources: "Fine-grained Audio-Visual Joint Representations for Multimodal Large Language Models" (FAVOR), arXiv
2310.05863; "video-SALMONN: Speech-Enhanced Audio-Visual Large Language Models", arXiv 2406.15704.

Shape legend: B rows, M items (a video with its sound, either alone, or an image) of a row, F frames of a row, T frames
of an item, P patches, V tokens of a frame, C width of these, S audio steps, A of them a frame, W windows, N tokens of a
window, D width of the language model, L tokens, K layout fields, Q tokens of a question.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchFeature,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from mmzoo.connectors.causal_qformer import AudioVisualQFormer, synchronise
from mmzoo.encoders.audio import SecondAudioEncoder, build_audio_encoder, log_mel
from mmzoo.errors import CheckpointError, InputError
from mmzoo.language import MultimodalConfig, MultimodalLM, media_starts
from mmzoo.layout import Modality, Span, TokenLayout, batch, video
from mmzoo.media import Audio, Video, read_audio, read_image, read_video, streams
from mmzoo.models.visualchat import clip_image_processor
from mmzoo.processing import IMAGE, VIDEO, MultimodalProcessor, Turn, answer_labels, word_tokenizer
from mmzoo.world_sound import SOUND_VOCABULARY

logger = logging.getLogger(__name__)


class FAVORConfig(MultimodalConfig):
    """Configuration of FAVOR and video-SALMONN.

    Attributes:
        vision_config: of InstructBLIP's tower.
        qformer_config: of the Q-Former that reads single frames; None gives every patch a token of its own.
        num_query_tokens: V of that Q-Former.
        instruction: whether it reads the question, too, so that what a frame says depends on it.
        audio_config: of Whisper, whose encoder is used.
        second_audio_size: width of a second audio stream, such as BEATs; None for none.
        connector: options of `AudioVisualQFormer`; its widths are those of its neighbours.
    """

    model_type = "mmzoo_favor"
    sub_configs = {
        "text_config": AutoConfig,
        "vision_config": InstructBlipVisionConfig,
        "qformer_config": InstructBlipQFormerConfig,
        "audio_config": WhisperConfig,
    }

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        qformer_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_query_tokens: int = 32,
        instruction: bool = True,
        audio_config: PreTrainedConfig | dict[str, Any] | None = None,
        second_audio_size: int | None = None,
        connector: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if instruction and qformer_config is None and vision_config is not None:
            raise InputError("Without a Q-Former for single frames nothing reads the question: set instruction=False.")
        self.vision_config = _as(InstructBlipVisionConfig, vision_config or {})
        with_qformer = qformer_config is not None or vision_config is None
        self.qformer_config = _as(InstructBlipQFormerConfig, qformer_config or {}) if with_qformer else None
        self.audio_config = _as(WhisperConfig, audio_config or {})
        self.num_query_tokens, self.instruction = num_query_tokens, instruction
        self.second_audio_size, self.connector = second_audio_size, connector or {}
        super().__init__(text_config=text_config or {"model_type": "llama"}, **kwargs)

    @property
    def connector_rule_options(self) -> dict[str, Any]:
        """Options of the frame mask that the connector names."""
        return {name: self.connector[name] for name in ("direction", "mask_padding") if name in self.connector}


def _as(kind: type[PreTrainedConfig], config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    return config if isinstance(config, PreTrainedConfig) else kind(**config)


class FAVOR(MultimodalLM):
    """FAVOR. `processor(...)` gives what `forward` and `generate` take.

    A batch holds pixel_values [B, F, 3, H, W], the frames of a row's items one after another; num_frames int64 [B, M],
    how many each item has; input_features [B, M, mel, time] and audio_frames int64 [B, M], how many half seconds of
    sound; question_ids int64 [B, M, Q], -1 where there is none, and second_waveforms [B, M, samples] if the model takes
    them. An item without sound has 0 audio frames, a sound without video 0 frames.
    """

    config: FAVORConfig
    config_class = FAVORConfig
    media_inputs = (
        "pixel_values", "num_frames", "input_features", "audio_frames", "question_ids", "second_waveforms"
    )  # fmt: skip

    def __init__(self, config: FAVORConfig):
        super().__init__(config)
        self.vision_encoder = InstructBlipVisionModel(config.vision_config)
        self.frame_qformer, self.query_tokens, self.frame_proj = None, None, None
        width, options = config.vision_config.hidden_size, dict(config.connector)
        if config.qformer_config is not None:
            self.frame_qformer = InstructBlipQFormerModel(config.qformer_config)
            size = config.qformer_config.hidden_size
            self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.num_query_tokens, size))
            options["hidden_size"] = size
        else:
            self.frame_proj = nn.Linear(width, options.get("hidden_size", 768))
        self.speech_encoder, heard = build_audio_encoder(config.audio_config)
        second = [] if config.second_audio_size is None else [config.second_audio_size]
        self.connector = AudioVisualQFormer([heard, *second], config.text_config.hidden_size, **options)
        self.llama_model = AutoModelForCausalLM.from_config(config.text_config)
        taken = {"question_ids": config.instruction, "second_waveforms": bool(second)}
        self.media_inputs = tuple(name for name in self.media_inputs if taken.get(name, True))
        self._second_audio_encoder: tuple[SecondAudioEncoder | None] = (None,)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every part has initialised itself."""

    @property
    def language_model(self) -> PreTrainedModel:
        return self.llama_model

    @property
    def second_audio_encoder(self) -> SecondAudioEncoder | None:
        """What hears second_waveforms, such as BEATs."""
        return self._second_audio_encoder[0]

    def set_second_audio_encoder(self, encoder: SecondAudioEncoder | None) -> None:
        """Plug in what hears second_waveforms. It is frozen and no part of the model: neither saved nor moved with it.

        Raises:
            InputError: the model has no second stream.
        """
        if self.config.second_audio_size is None:
            raise InputError("This model hears one audio stream: its second_audio_size is None.")
        self._second_audio_encoder = (encoder,)  # a tuple hides it from the state dict

    @property
    def masked_connector(self) -> nn.Module:
        return self.connector

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        """[N, P + 1, width]: InstructBLIP's features, the class token first."""
        return self.vision_encoder(pixel_values).last_hidden_state

    def grid_features(self, pixel_values: Tensor) -> Tensor:
        return self.patch_features(pixel_values)[:, 1:]

    def frame_tokens(self, pixel_values: Tensor, question_ids: Tensor | None = None) -> Tensor:
        """[N, V, C] of frames [N, 3, H, W]; question_ids int64 [N, Q], -1 where there is none."""
        patches = self.patch_features(pixel_values)
        if self.frame_qformer is None:
            return self.frame_proj(patches[:, 1:])
        queries = self.query_tokens.expand(len(patches), -1, -1).to(patches.dtype)
        ids, known = None, None
        if self.config.instruction and question_ids is not None and question_ids.shape[1]:
            known = torch.cat([question_ids.new_ones(queries.shape[:2]), (question_ids >= 0).long()], 1)
            ids = question_ids.clamp(min=0)
        read = self.frame_qformer(
            input_ids=ids, attention_mask=known, query_embeds=queries, encoder_hidden_states=patches
        )
        return read.last_hidden_state[:, : queries.shape[1]]

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """[N, V, C] of single frames, without a question: what the connector is given of them."""
        return self.frame_tokens(pixel_values)

    def clip_tokens(
        self,
        pixel_values: Tensor,
        num_frames: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_frames: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, W, N, D] of clips [B, F, 3, H, W], one item each, all frames and no sound unless it is given."""
        rows, frames = pixel_values.shape[:2]
        if input_features is None or audio_frames is None:
            input_features = pixel_values.new_zeros(rows, 1, *self._feature_shape)
            audio_frames = torch.zeros(rows, 1, dtype=torch.long, device=pixel_values.device)
        if num_frames is None:
            num_frames = torch.full((rows, 1), frames, device=pixel_values.device)
        return self._items(pixel_values, num_frames, input_features, audio_frames, None)

    @property
    def _feature_shape(self) -> tuple[int, int]:
        audio = self.config.audio_config
        return audio.num_mel_bins, 2 * audio.max_source_positions

    def encode_media(
        self,
        layout: Tensor | TokenLayout,
        pixel_values: Tensor,
        num_frames: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_frames: Tensor | None = None,
        question_ids: Tensor | None = None,
        second_waveforms: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, W, N, D] of a batch's windows, those of a row's items one after another.

        Raises:
            InputError: something is missing, or layout and media do not agree.
        """
        if num_frames is None or input_features is None or audio_frames is None:
            raise InputError(
                "pixel_values need num_frames, input_features and audio_frames beside them. The processor gives all."
            )
        if not torch.compiler.is_compiling():
            places = media_starts(layout if isinstance(layout, TokenLayout) else TokenLayout(layout)).sum(1)
            windows = self.connector.num_windows(torch.maximum(num_frames, audio_frames)).sum(1)
            if not torch.equal(places, windows):
                raise InputError(
                    f"The rows' items fill {windows.tolist()} windows, the layout has places for {places.tolist()}."
                )
        features = self.as_input(input_features)
        return self._items(
            self.as_input(pixel_values), num_frames, features, audio_frames, question_ids, second_waveforms
        )

    def _items(
        self,
        pixel_values: Tensor,
        num_frames: Tensor,
        input_features: Tensor,
        audio_frames: Tensor,
        question_ids: Tensor | None,
        second_waveforms: Tensor | None = None,
    ) -> Tensor:
        visual = self._visual(pixel_values, num_frames, question_ids)
        audio = self._audio(input_features, audio_frames, second_waveforms)
        lengths = torch.maximum(num_frames, audio_frames)
        joint = synchronise(visual.flatten(0, 1), audio.flatten(0, 1), self.connector.audio_per_frame)
        if not torch.compiler.is_compiling():
            joint = joint[:, : max(1, int(lengths.max()))]
        tokens = self.connector(joint, lengths.flatten()).unflatten(0, lengths.shape)
        return _one_after_another(tokens, self.connector.num_windows(lengths))

    def _visual(self, pixel_values: Tensor, num_frames: Tensor, question_ids: Tensor | None) -> Tensor:
        """[B, M, T, V, C]: the tokens of each item's frames, 0 where it has none."""
        (rows, frames), items = pixel_values.shape[:2], num_frames.shape[1]
        ends = num_frames.cumsum(1)
        place = torch.arange(frames, device=num_frames.device)
        real = place < ends[:, -1:]
        asked = None
        if question_ids is not None:
            item = (place[:, None] >= ends[:, None]).sum(-1).clamp(max=items - 1)
            asked = question_ids.gather(1, item[..., None].expand(-1, -1, question_ids.shape[2]))
        if torch.compiler.is_compiling() or bool(real.all()) and real.numel():
            flat = None if asked is None else asked.flatten(0, 1)
            tokens = self.frame_tokens(pixel_values.flatten(0, 1), flat).unflatten(0, (rows, frames))
        else:
            tokens = self._real_only(pixel_values, real, asked)
        own = (ends - num_frames)[..., None] + place
        tokens = tokens[:, None].expand(-1, items, -1, -1, -1)
        index = own.clamp(max=max(0, frames - 1))[..., None, None].expand(-1, -1, -1, *tokens.shape[3:])
        here = (place < num_frames[..., None])[..., None, None]
        return torch.where(here, tokens.gather(2, index), 0)

    def _real_only(self, pixel_values: Tensor, real: Tensor, asked: Tensor | None) -> Tensor:
        count = self.config.num_query_tokens
        if self.frame_qformer is None:
            count = (self.config.vision_config.image_size // self.config.vision_config.patch_size) ** 2
        width = self.connector.speech_pre_qformer_proj.out_features
        tokens = pixel_values.new_zeros(*real.shape, count, width)
        if not bool(real.any()):
            return tokens
        made = self.frame_tokens(pixel_values[real], None if asked is None else asked[real])
        return tokens.to(made.dtype).index_put((real,), made)

    def _audio(self, input_features: Tensor, audio_frames: Tensor, second_waveforms: Tensor | None) -> Tensor:
        """[B, M, S, audio streams x C], 0 where an item has no sound."""
        features, silent = input_features.flatten(0, 1), audio_frames.flatten() == 0
        if not torch.compiler.is_compiling() and bool(silent.all()):
            steps = self.config.audio_config.max_source_positions
            streams_ = 1 if self.config.second_audio_size is None else 2
            width = streams_ * self.connector.speech_pre_qformer_proj.out_features
            return features.new_zeros(*audio_frames.shape, steps, width)
        heard = [self.speech_encoder(features).last_hidden_state]
        if self.config.second_audio_size is not None:
            heard.append(self._second(second_waveforms, heard[0]))
        audio = self.connector.audio_features(*heard)
        frame = torch.arange(audio.shape[1], device=audio.device) // self.connector.audio_per_frame
        here = frame < audio_frames.flatten()[:, None]
        return torch.where(here[..., None], audio, 0).unflatten(0, audio_frames.shape)

    def _second(self, waveforms: Tensor | None, like: Tensor) -> Tensor:
        """[N, at most as many steps as Whisper gives, second_audio_size]."""
        if self.second_audio_encoder is None or waveforms is None:
            raise InputError(
                "This model hears a second audio stream (BEATs), whose encoder is no part of it. Give one to "
                "model.set_second_audio_encoder, and set processor.waveforms = True."
            )
        with torch.no_grad():
            heard = self.second_audio_encoder(waveforms.flatten(0, 1).float())
        size = self.config.second_audio_size
        if heard.dim() != 3 or (len(heard), heard.shape[2]) != (len(like), size):
            raise InputError(
                f"The second audio encoder gave {list(heard.shape)} for {len(like)} sounds; this model takes "
                f"[{len(like)}, steps, {size}]."
            )
        return heard.to(like.dtype)[:, : like.shape[1]]

    def patch_weights(
        self,
        pixel_values: Tensor,
        num_frames: Tensor,
        input_features: Tensor,
        audio_frames: Tensor,
        question_ids: Tensor | None = None,
        second_waveforms: Tensor | None = None,
    ) -> Tensor:
        """float [1, W * N, F * P]: how much each token of a row's one item takes from each patch of its frames.

        Raises:
            InputError: several items, or a Q-Former between patches and frames.
        """
        if len(num_frames) != 1 or self.frame_qformer is not None:
            raise InputError(
                "Where an answer looked is known for one video, of a model whose frames keep their patches."
            )
        visual = self._visual(pixel_values[None], num_frames[None], None)[0]
        waveforms = None if second_waveforms is None else second_waveforms[None]
        audio = self._audio(input_features[None], audio_frames[None], waveforms)[0]
        lengths, frames = torch.maximum(num_frames, audio_frames), int(num_frames[0])
        joint = synchronise(visual, audio, self.connector.audio_per_frame)[:, : int(lengths[0])]
        weights = self.connector.frame_weights(joint, lengths)[0]
        windows, queries = weights.shape[:2]
        patches = weights.shape[2] // self.connector.window
        spread = weights.new_zeros(windows, queries, windows, self.connector.window, patches)
        own = torch.arange(windows)
        spread[own, :, own] = weights.unflatten(2, (-1, patches))
        return spread.flatten(0, 1).flatten(1, 2)[None, :, :frames].flatten(2)


def _one_after_another(tokens: Tensor, windows: Tensor) -> Tensor:
    """[B, M * W, N, D]: the windows int64 [B, M] of each item of [B, M, W, N, D], without gaps between items."""
    rows, items, most = tokens.shape[:3]
    ends = windows.cumsum(1)
    place = torch.arange(items * most, device=tokens.device).expand(rows, -1).contiguous()
    item = (place[..., None] >= ends[:, None]).sum(-1).clamp(max=items - 1)
    inside = (place - (ends - windows).gather(1, item)).clamp(0, most - 1)
    index = (item * most + inside)[..., None, None].expand(-1, -1, *tokens.shape[3:])
    packed = tokens.flatten(1, 2).gather(1, index)
    return packed if torch.compiler.is_compiling() else packed[:, : int(ends[:, -1].max())]


@dataclass(frozen=True, eq=False)
class Film(Video):
    """A video with its sound; frames uint8 [0, 1, 1, 3] for a sound without video.

    Attributes:
        audio: None for a silent film.
    """

    audio: Audio | None = None


class Item(NamedTuple):
    """What a model is shown at one place.

    Attributes:
        pixels: float32 [T, 3, H, W].
        features: float32 [mel, time], None for silence.
        audio_frames: half seconds of sound.
        question: ids of the question that the Q-Former of single frames reads.
        waveform: float32 [S], where a second stream is heard.
    """

    pixels: Tensor
    features: Tensor | None
    audio_frames: int
    question: list[int]
    waveform: Tensor | None = None


class FAVORProcessor(MultimodalProcessor):
    """Text, images and videos with their sound for FAVOR and video-SALMONN.

    A `<video>` takes a file, whose sound is read with it, a file of sound alone, a `Film`, a `Video`, or an array.
    Frames stand for half a second each: two are taken of every second of a file; all of an array, which has no clock.

    Args:
        feature_extractor: of log-mel features; its length is what the audio encoder hears.
        qformer_tokenizer: of the question that the Q-Former of single frames reads.
        num_queries: tokens of a window.
        window: frames of it.
        num_frames: the most frames taken from a video; what comes later is not seen.
        whole_length: take every sound for as long as the audio encoder hears, silence included, as the authors do.
        instruction: whether questions go to the Q-Former of single frames.
        long_audio: what becomes of a sound that is longer than that: "cut", as the authors do, with a note in the log,
            or "error".
        waveforms: give the samples, too, for a second audio stream.
    """

    sampling = "favor"
    multi_turn, hears = True, True
    before_answer = " "

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        feature_extractor: Any = None,
        qformer_tokenizer: Any = None,
        num_queries: int = 32,
        window: int = 10,
        num_frames: int = 120,
        whole_length: bool = True,
        instruction: bool = True,
        long_audio: str = "cut",
        waveforms: bool = False,
        chat_template: str | None = None,
    ):
        if long_audio not in ("cut", "error"):
            raise InputError(f"long_audio is 'cut' or 'error', not {long_audio!r}.")
        self.num_frames, self.num_queries, self.window = num_frames, num_queries, window
        self.answer_marker, self.turn_marker = "\nASSISTANT:", "USER:"
        self.whole_length, self.instruction = whole_length, instruction
        self.long_audio, self.waveforms = long_audio, waveforms
        ProcessorMixin.__init__(
            self, image_processor, tokenizer, feature_extractor, qformer_tokenizer, chat_template=chat_template
        )

    def to_dict(self) -> dict[str, Any]:
        """What is saved; the markers are always the same."""
        saved = super().to_dict()
        return {name: value for name, value in saved.items() if name not in ("answer_marker", "turn_marker")}

    def prompt(self, question: str, media: str = "", *, system: str | None = None) -> str:
        if system is not None:
            raise InputError("FAVOR was trained without system texts, and has no place for one.")
        places = "" if not media or media in question else f"<Img>{media}</Img> "
        return f"USER: {places}{question}{self.answer_marker}{self.before_answer}"

    def dialogue(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """The text of questions with their answers, as FAVOR is trained on it: each answer ends with "</s>"."""
        return "".join(
            self.prompt(turn.question, turn.media, system=system) + turn.answer + self.tokenizer.eos_token
            for turn in turns
        )

    def spans(self, pixels: Tensor, modality: Modality) -> list[Span]:
        """The most tokens that a medium takes: of a clip as many frames are shown, and it may sound to the end."""
        heard = 2 * self.feature_extractor.chunk_length if modality == Modality.VIDEO else 0
        return [self.item_span(max(len(pixels), heard))]

    def item_span(self, length: int) -> Span:
        """The tokens of an item that lasts so many half seconds: a window stands as a frame."""
        return video(-(-length // self.window), self.num_queries, grid=False)

    def encode(self, text: str, *, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """The ids of a text. What stands between media and between turns is encoded on its own, as the authors do."""
        ids: list[int] = []
        for i, piece in enumerate(re.split(f"({IMAGE}|{re.escape(self.tokenizer.eos_token)})", text.rstrip(" "))):
            if i % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids += self.tokenizer(piece, add_special_tokens=add_special_tokens and not i)["input_ids"]
        return ids[:max_length]

    def marker_ids(self, marker: str) -> list[int]:
        """The ids of a marker where it stands: a turn begins a piece of text, an answer is marked inside one.

        At the beginning, tokenizers such as LLaMA's add a space.
        """
        if marker == self.turn_marker:
            return super().marker_ids(marker)
        before, whole = super().marker_ids("a"), super().marker_ids(f"a{marker}")
        return whole[len(before) :]

    def lay_out(self, tokens: Sequence[int], media: Sequence[Span]) -> tuple[list[int], TokenLayout]:
        """Ids with media in place, as padding: the id of `<image>` need not be in the embedding table."""
        ids, layout = super().lay_out(tokens, media)
        visual = layout.visual[0].tolist()
        return [self.tokenizer.pad_token_id if seen else i for i, seen in zip(ids, visual, strict=True)], layout

    def read_video(self, source: Any, **options: Any) -> Video:
        """The frames and the sound of a source; options are those of `mmzoo.media.read_video`.

        Raises:
            VideoReadError, AudioReadError: it cannot be read.
        """
        if isinstance(source, Video):
            return source
        if not isinstance(source, (str, os.PathLike)) or os.path.isdir(source):
            every = read_video(source, sampling="all", **options)
            if len(every.frames) <= self.num_frames:
                return every
            return read_video(source, num_frames=self.num_frames, **options)
        if not os.path.isfile(source):
            return super().read_video(source, **options)  # which says what is wrong
        if streams(source) == {"audio"}:
            audio, nothing = self.read_audio(source), np.zeros((0, 1, 1, 3), np.uint8)
            return Film(nothing, np.zeros(0), [], None, 0, self.sampling, "pyav", str(source), audio=audio)
        return self.with_sound(super().read_video(source, **options), source)

    def with_sound(self, seen: Video, source: str | os.PathLike[str] | np.ndarray, stop: float | None = None) -> Video:
        """Frames of half a second each with the sound of a file, if it has any, or of float32 [S] at 16 kHz.

        Args:
            seen: the frames.
            source: of the sound.
            stop: seconds after which nothing is heard.

        Raises:
            AudioReadError, InputError: as `read_audio`.
        """
        heard = isinstance(source, np.ndarray) or "audio" in streams(source)
        fields = {field.name: getattr(seen, field.name) for field in dataclasses.fields(Video)}
        return Film(**fields, audio=self.read_audio(source, stop) if heard else None)

    def read_audio(self, source: Any, stop: float | None = None) -> Audio:
        """The sound of a source, up to a second or as far as the audio encoder hears it.

        Raises:
            AudioReadError: it cannot be read.
            InputError: it is longer than that, and long_audio is "error".
        """
        rate, limit = self.feature_extractor.sampling_rate, self.feature_extractor.n_samples
        most = limit / rate + 1
        audio = read_audio(source, sample_rate=rate, stop=most if stop is None else min(stop, most))
        # The packets of a codec seldom end with the film.
        if len(audio.waveform) > limit + 0.25 * rate:
            said = f"the sound lasts longer than the {limit / rate:g} s that the model hears"
            if self.long_audio == "error":
                raise InputError(f"{audio.source}: {said}. Give a part of it, or set processor.long_audio = 'cut'.")
            logger.warning("%s: %s; the rest was left out", audio.source, said)
        return dataclasses.replace(audio, waveform=audio.waveform[:limit])

    def sample(
        self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = (), **options: Any
    ) -> tuple[list[int], TokenLayout, list[Item]]:
        """One sample as `collate` takes it: ids, layout [1, L, K], and its items in order."""
        for place, media in ((IMAGE, images), (VIDEO, videos)):
            if text.count(place) != len(media):
                raise InputError(
                    f"The text has {text.count(place)} {place} places, but {len(media)} were given. "
                    f"Write {place} once for each, and give one for each place."
                )
        pieces = text.replace(VIDEO, IMAGE).split(IMAGE)
        order = _places(text)
        remaining = {IMAGE: iter(images), VIDEO: iter(videos)}
        items = [
            self.item(next(remaining[kind]), kind, self._question(after))
            for kind, after in zip(order, pieces[1:], strict=True)
        ]
        tokens = self.encode(text.replace(VIDEO, IMAGE), **options)
        spans = [self.item_span(max(len(one.pixels), one.audio_frames)) for one in items]
        return *self.lay_out(tokens, spans), items

    def _question(self, after: str) -> list[int]:
        """The question that follows a place, up to where the answer begins, as the Q-Former reads it."""
        if not self.instruction:
            return []
        asked = after.split(self.answer_marker)[0].removeprefix("</Img>").strip()
        return self.qformer_tokenizer(asked, truncation=True, max_length=128)["input_ids"]

    def item(self, source: Any, kind: str = VIDEO, question: Sequence[int] = ()) -> Item:
        """An image or a video with its sound, as tensors.

        Raises:
            InputError: there is nothing to see or to hear.
        """
        audio = None
        if kind == IMAGE:
            frames = [read_image(source)]
        else:
            film = self.read_video(source)
            audio = getattr(film, "audio", None)
            frames = [Image.fromarray(frame) for frame in np.asarray(film.frames)]
        side = self.image_processor.crop_size["height"]
        pixels = self.pixels(frames) if frames else torch.zeros(0, 3, side, side)
        if audio is None or not len(audio.waveform):
            if not frames:
                raise InputError(f"{source}: there is nothing to see or to hear in it.")
            return Item(pixels, None, 0, list(question))
        waveform = torch.from_numpy(np.ascontiguousarray(audio.waveform)) if self.waveforms else None
        return Item(
            pixels, log_mel(self.feature_extractor, [audio])[0], self._half_seconds(audio), [*question], waveform
        )

    def _half_seconds(self, audio: Audio) -> int:
        whole, rate = self.feature_extractor.n_samples, audio.sample_rate
        length = whole if self.whole_length else min(whole, len(audio.waveform))
        # A codec's last packet may reach into the next half second with nothing in it.
        return max(1, -(-(length - rate // 8) // (rate // 2)))

    def collate(
        self,
        ids: Sequence[Sequence[int]],
        layouts: Sequence[TokenLayout],
        pixels: Sequence[Sequence[Any]],
        *,
        padding_side: str = "left",
        pad_to_multiple_of: int = 1,
        labels: bool = False,
    ) -> BatchFeature:
        """As every family's, with what `FAVOR` takes of the items of every sample."""
        longest = max(len(layout) for layout in layouts)
        layout = batch(layouts, padding_side, longest + -longest % pad_to_multiple_of)
        input_ids = torch.full(layout.sample.shape, self.tokenizer.pad_token_id)
        input_ids[layout.valid] = torch.tensor([token for sample in ids for token in sample], dtype=torch.long)
        data = {"input_ids": input_ids, "attention_mask": layout.attention_mask, "layout": layout.data}
        if any(len(row) for row in pixels):
            data |= self.media(pixels)
        if labels:
            data["labels"] = answer_labels(input_ids, layout)
        return BatchFeature(data)

    def media(self, rows: Sequence[Sequence[Item]]) -> dict[str, Tensor]:
        """What the model takes of rows of items, beside their text."""
        most = max(len(row) for row in rows)
        extractor, pad = self.feature_extractor, nn.utils.rnn.pad_sequence
        shape = (extractor.feature_size, extractor.nb_max_frames)
        numbers = torch.zeros(2, len(rows), most, dtype=torch.long)
        features = torch.zeros(len(rows), most, *shape)
        empty = next(one.pixels for row in rows for one in row)[:0]
        pixels = pad([torch.cat([one.pixels for one in row]) if row else empty for row in rows], batch_first=True)
        for i, row in enumerate(rows):
            for j, one in enumerate(row):
                numbers[:, i, j] = torch.tensor([len(one.pixels), one.audio_frames])
                if one.features is not None:
                    features[i, j] = one.features
        data = {
            "pixel_values": pixels,
            "num_frames": numbers[0],
            "input_features": features,
            "audio_frames": numbers[1],
        }
        if self.instruction:
            data["question_ids"] = _padded([[one.question for one in row] for row in rows], most)
        if self.waveforms:
            data["second_waveforms"] = self._samples(rows, most)
        return data

    def _samples(self, rows: Sequence[Sequence[Item]], most: int) -> Tensor:
        samples = torch.zeros(len(rows), most, self.feature_extractor.n_samples)
        for i, row in enumerate(rows):
            for j, one in enumerate(row):
                if one.waveform is not None:
                    samples[i, j, : len(one.waveform)] = one.waveform
        return samples


def _padded(questions: Sequence[Sequence[Sequence[int]]], most: int) -> Tensor:
    """int64 [B, M, Q], -1 where there is none."""
    longest = max(len(one) for row in questions for one in row)
    padded = torch.full((len(questions), most, longest), -1)
    for i, row in enumerate(questions):
        for j, one in enumerate(row):
            padded[i, j, : len(one)] = torch.tensor(one, dtype=torch.long)
    return padded


def _places(text: str) -> list[str]:
    """`<image>` and `<video>` in the order in which they stand."""
    found = [(text.find(IMAGE, i), IMAGE) for i in range(len(text)) if text.startswith(IMAGE, i)]
    found += [(text.find(VIDEO, i), VIDEO) for i in range(len(text)) if text.startswith(VIDEO, i)]
    return [place for _, place in sorted(found)]


MODEL, PROCESSOR = FAVOR, FAVORProcessor
AutoConfig.register(FAVORConfig.model_type, FAVORConfig, exist_ok=True)

_VICUNA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_VICUNA_7B = {
    **_VICUNA,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_VICUNA_13B = {
    **_VICUNA,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_WHISPER_LARGE_V2 = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}
_FULL = {"vision_config": {}, "qformer_config": {"vocab_size": 30523}, "audio_config": _WHISPER_LARGE_V2}

_TINY_WORDS = (*SOUND_VOCABULARY, "USER:", "ASSISTANT:", "<Img>", "</Img>")
_TINY_TEXT = {
    "model_type": "llama",
    "vocab_size": len(word_tokenizer(_TINY_WORDS)),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 7,
    "tie_word_embeddings": False,
}
_SMALL_AUDIO = {"num_mel_bins": 24, "encoder_layers": 1, "encoder_attention_heads": 2, "pad_token_id": 0}
_SMALL_AUDIO |= {"vocab_size": 8, "max_source_positions": 40, "dropout": 0.0}
_SMALL_AUDIO |= {"bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}

_TINY: dict[str, Any] = {
    "text_config": _TINY_TEXT,
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.02,
    },
    "qformer_config": {
        "vocab_size": len(word_tokenizer(_TINY_WORDS)),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "encoder_hidden_size": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "num_query_tokens": 6,
    "audio_config": {**_SMALL_AUDIO, "d_model": 16, "encoder_ffn_dim": 24},
    "connector": {
        "num_queries": 6,
        "window": 3,
        "fine_queries": 2,
        "num_heads": 2,
        "intermediate_size": 24,
        "audio_per_frame": 5,
        "max_positions": 24,
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    "favor-7b": {"text_config": _VICUNA_7B, **_FULL},
    "favor-13b": {"text_config": _VICUNA_13B, **_FULL},
    "video-salmonn-13b": {
        "text_config": _VICUNA_13B,
        **_FULL,
        "second_audio_size": 768,
        "connector": {"num_queries": 30, "fine_queries": 3},
    },
    "favor-tiny": _TINY,
    "video-salmonn-tiny": {**_TINY, "second_audio_size": 12},
    "favor-nano": {
        "text_config": {
            **_TINY_TEXT,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "initializer_range": 0.1,
        },
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.05,
        },
        "instruction": False,
        "audio_config": {**_SMALL_AUDIO, "d_model": 32, "encoder_ffn_dim": 64, "encoder_attention_heads": 4},
        "connector": {
            "hidden_size": 48,
            "num_queries": 32,
            "window": 8,
            "fine_queries": 4,
            "num_heads": 4,
            "num_layers": 2,
            "intermediate_size": 96,
            "audio_per_frame": 5,
            "max_positions": 128,
            "direction": "past",
            "mask_padding": True,
        },
    },
}


def processor(name: str, config: FAVORConfig) -> FAVORProcessor | None:
    """The processor of a model with random weights; None where its tokenizer would have to be downloaded."""
    if config.text_config.vocab_size != _TINY_TEXT["vocab_size"]:
        return None
    words, options = word_tokenizer(_TINY_WORDS), config.connector
    extractor = WhisperFeatureExtractor(
        feature_size=config.audio_config.num_mel_bins, hop_length=800, chunk_length=4, n_fft=1024
    )
    return FAVORProcessor(
        clip_image_processor(config.vision_config.image_size),
        words,
        extractor,
        words,
        num_queries=options["num_queries"],
        window=options["window"],
        num_frames=8,
        whole_length=False,
        instruction=config.instruction,
        waveforms=config.second_audio_size is not None,
    )


def is_release(described: dict[str, Any]) -> bool:
    """The authors' checkpoints are single files without a config.json: `load_trained` reads them."""
    return False


_REPEATED = {
    "video_Qformer.": ("speech_Qformer.", "joint_Qformer."),
    "llama_proj.": ("llama_proj_speech.", "llama_proj_joint."),
    "ln_video.": ("ln_speech.", "ln_joint."),
    "video_query_tokens": ("speech_query_tokens", "joint_query_tokens"),
    "video_frame_position_embedding.": ("joint_frame_position_embedding.",),
}
"""What a checkpoint of DeepSpeed's stage 3 repeats, with the same values."""
_LORA = re.compile(r"llama_model\.base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_LORA_ALPHA = 32


_TOWERS = (
    "The frozen towers are not read from files of LAVIS, such as instruct_blip_vicuna13b_trimmed.pth and "
    "eva_vit_g.pth: take them from Salesforce/instructblip-vicuna-13b (vision_model, qformer, query_tokens) and "
    "openai/whisper-large-v2 (model.encoder), which hold them under the names of transformers, as the recipe "
    "favor-13b does."
)


def load_trained(model: FAVOR, path: str | os.PathLike[str]) -> None:
    """Puts what the authors trained into a model: its causal Q-Former, and LoRA merged into its language model.

    Such a file holds neither the towers nor the language model: load these into the model first. Parameters that
    DeepSpeed's stage 3 repeats are left out, and the unused `low_Qformer` of video-SALMONN.

    Args:
        model: of the sizes of the checkpoint.
        path: of a file of torch.save.

    Raises:
        CheckpointError: the file is damaged or holds code, or does not fit; every name that does not is listed.
    """
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises classes of its own, of pickle and of the standard library
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged, or holds more than tensors: {said}") from error
    repeated = tuple(name for names in _REPEATED.values() for name in names)
    state = {name: x for name, x in state.items() if not name.startswith((*repeated, "low_Qformer."))}
    adapters = {name: x for name, x in state.items() if _LORA.fullmatch(name)}
    trained = {name: x for name, x in state.items() if name not in adapters}
    wanted, layers = model.connector.state_dict(), dict(model.llama_model.named_modules())
    pairs = _lora_pairs(adapters)
    strange = [name for layer, name in pairs if layer not in layers or len(pairs[layer, name]) != 2]
    misshapen = [
        (name, tuple(trained[name].shape), tuple(wanted[name].shape))
        for name in trained.keys() & wanted.keys()
        if trained[name].shape != wanted[name].shape
    ]
    missing, unexpected = wanted.keys() - trained.keys(), [*(trained.keys() - wanted.keys()), *strange]
    if missing or unexpected or misshapen:
        what = f"{path} does not fit the causal Q-Former and language model of this FAVOR."
        if not trained.keys() & wanted.keys():
            what += f" Nothing in it is of either. {_TOWERS}"
        raise CheckpointError(what, missing=missing, unexpected=unexpected, misshapen=misshapen)
    model.connector.load_state_dict(trained)
    for (layer, _), halves in pairs.items():
        weight, rank = layers[layer].weight, len(halves["A"])
        with torch.no_grad():
            weight += (_LORA_ALPHA / rank * halves["B"].float() @ halves["A"].float()).to(weight)


def _lora_pairs(adapters: dict[str, Tensor]) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(layer, the same in the checkpoint) -> its two halves."""
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, half in adapters.items():
        found = _LORA.fullmatch(name)
        assert found is not None
        shared = name[: name.index(".lora_")]
        pairs.setdefault((found["layer"], shared), {})[found["half"]] = half
    return pairs
