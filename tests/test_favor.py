"""FAVOR's family: sound and video together, either alone, read from files by itself."""

from __future__ import annotations

import dataclasses
import json
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_finetune import run_cli
from test_models import a_model, clip
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import mmzoo
from mmzoo.encoders.audio import SpectrogramTransformer
from mmzoo.errors import AudioReadError, CheckpointError, InputError, VideoReadError
from mmzoo.language import MultimodalLM
from mmzoo.layout import TokenLayout
from mmzoo.media import Audio, Video, read_video, sample_indices, write_video
from mmzoo.models.favor import FAVORConfig, FAVORProcessor, Film, load_trained
from mmzoo.processing import Turn
from mmzoo.world_sound import make_sound_clip, write_sound_clip
from mmzoo_eval.asking import Media
from mmzoo_eval.benchmark import Benchmark, Frames, Item, judged
from mmzoo_eval.benchmarks import benchmark, world_sound
from mmzoo_eval.runner import _read
from mmzoo_training import cli
from mmzoo_training.data import Rows, Source, load_samples
from mmzoo_training.favor_sft import FAVORFinetune
from mmzoo_training.finetune import prompts

QUESTION = "how many sounds are there"


def sound(seconds: float, seed: int = 0) -> Audio:
    """A tone, another one for each seed."""
    time = np.arange(round(seconds * 16000)) / 16000
    return Audio((0.5 * np.sin(2 * np.pi * 300 * (seed + 1) * time)).astype(np.float32))


def film(frames: int, seconds: float, seed: int = 0) -> Film:
    shown = clip(seed, frames) if frames else np.zeros((0, 1, 1, 3), np.uint8)
    times, indices = np.full(frames, np.nan), list(range(frames))
    audio = sound(seconds, seed) if seconds else None
    return Film(shown, times, indices, None, frames, "all", "array", "array", audio=audio)


FILMS = [film(5, 2.4), film(3, 0), film(0, 1.3, 1), film(8, 4.0, 2), film(1, 3.6, 3)]
"""Sound shorter and longer than the video, no sound, no video."""


def inputs(model: MultimodalLM, films: list[Film], **options: Any) -> dict[str, Tensor]:
    texts = [model.processor.prompt(" ".join(["sounds"] * (i % 3 + 1)), "<video>") for i in range(len(films))]
    return model.processor(texts, videos=[[one] for one in films], **options)


@pytest.mark.parametrize("name", ["favor-tiny", "favor-nano"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_films_in_a_batch_give_what_each_gives_alone(name: str, side: str) -> None:
    model = a_model(name)
    together = inputs(model, FILMS, padding_side=side)
    logits, valid = model(**together).logits, TokenLayout(together["layout"]).valid
    for i, one in enumerate(FILMS):
        text = model.processor.prompt(" ".join(["sounds"] * (i % 3 + 1)), "<video>")
        alone = model(**model.processor(text, videos=[one])).logits[0]
        torch.testing.assert_close(logits[i][valid[i]], alone, atol=1e-4, rtol=1e-4)


def test_several_films_in_one_prompt_do_not_meet() -> None:
    model = a_model("favor-tiny")
    processor = model.processor
    both = processor("<video> <video>", videos=FILMS[:2])
    tokens = model.encode_media(both["layout"], **{name: both[name] for name in model.media_inputs})[0]
    for i, one in enumerate(FILMS[:2]):
        single = processor("<video>", videos=[one])
        single["question_ids"] = both["question_ids"][:, i : i + 1]
        own = model.encode_media(single["layout"], **{name: single[name] for name in model.media_inputs})[0]
        torch.testing.assert_close(tokens[2 * i : 2 * i + len(own)], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["favor-tiny", "favor-nano"])
def test_what_is_seen_and_what_is_heard_matter(name: str) -> None:
    model, one = a_model(name), film(5, 2.4)
    other_sound = dataclasses.replace(one, audio=sound(2.4, 9))
    other_sight = dataclasses.replace(one, frames=np.zeros_like(one.frames))
    logits = [model(**inputs(model, [each])).logits for each in (one, other_sound, other_sight)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)


def test_the_question_reaches_the_frames_of_tiny_and_not_of_nano() -> None:
    for name, reached in (("favor-tiny", True), ("favor-nano", False)):
        model, media = a_model(name), []
        for question in ("red square", "how many sounds"):
            asked = model.processor(model.processor.prompt(question, "<video>"), videos=[FILMS[0]])
            media.append(model.encode_media(asked["layout"], **{key: asked[key] for key in model.media_inputs}))
        assert torch.allclose(*media, atol=1e-4) != reached


def test_every_parameter_is_trained_by_films_with_sound() -> None:
    model = a_model("favor-nano")
    batch = inputs(model, FILMS[:2], padding_side="right", labels=True)
    labels = batch["input_ids"].masked_fill(~TokenLayout(batch["layout"]).valid, -100)
    model(**{**batch, "labels": labels}).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_an_image_stands_for_one_frame(tmp_path: Path) -> None:
    from PIL import Image

    model = a_model("favor-tiny")
    batch = model.processor.ask("what colour", image=Image.fromarray(clip(0)[0]))
    assert (batch["num_frames"].tolist(), batch["audio_frames"].tolist()) == ([[1]], [[0]])
    assert model(**batch).logits.isfinite().all()


@pytest.fixture(scope="module")
def tiny() -> MultimodalLM:
    return a_model("favor-tiny")


@pytest.fixture
def with_sound(tmp_path: Path) -> Path:
    write_sound_clip(make_sound_clip(3), tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


def test_a_film_of_the_world_goes_the_whole_way(tiny: MultimodalLM, with_sound: Path, tmp_path: Path) -> None:
    read = tiny.processor.read_video(with_sound)
    assert len(read.frames) == 8
    assert read.audio.duration == pytest.approx(4, abs=0.1)
    answer = tiny.ask(with_sound, QUESTION, max_new_tokens=3)
    assert answer.video.audio is not None
    write_sound_clip(make_sound_clip(3), tmp_path / "silent.mp4", silent=True)
    silent = tiny.ask(tmp_path / "silent.mp4", QUESTION, max_new_tokens=3)
    assert silent.video.audio is None
    assert answer.confidence != pytest.approx(silent.confidence, rel=1e-4)


def test_sound_alone_is_read_too(tiny: MultimodalLM, with_sound: Path, tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.m4a"
    with av.open(str(with_sound)) as film_file, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(film_file.streams.audio[0])
        for packet in film_file.demux(film_file.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    read = tiny.processor.read_video(path)
    assert read.frames.shape[0] == 0
    heard = tiny.processor(tiny.processor.prompt(QUESTION, "<video>"), videos=[path])
    assert (heard["num_frames"].tolist(), heard["audio_frames"].tolist()) == ([[0]], [[8]])
    assert tiny(**heard).logits.isfinite().all()
    assert tiny.ask(path, QUESTION, max_new_tokens=2).text


def test_a_long_sound_is_cut_or_refused(tiny: MultimodalLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(clip(0, 8)[:, :32, :32], tmp_path / "a.mp4", fps=2, audio=sound(9).waveform)
    assert tiny.processor.read_video(tmp_path / "a.mp4").audio.duration == 4
    assert "lasts longer than the 4 s" in caplog.text
    tiny.processor.long_audio = "error"
    try:
        with pytest.raises(InputError, match="long_audio = 'cut'"):
            tiny.processor.read_video(tmp_path / "a.mp4")
    finally:
        tiny.processor.long_audio = "cut"


def test_broken_files_are_typed_errors(tiny: MultimodalLM, with_sound: Path, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(with_sound.read_bytes()[:3000])
    with pytest.raises((VideoReadError, AudioReadError)):
        tiny.ask(tmp_path / "b.mp4", QUESTION)
    with pytest.raises(VideoReadError, match="no such file"):
        tiny.ask(tmp_path / "c.mp4", QUESTION)


def test_released_sounds_last_as_long_as_whisper_hears(tiny: MultimodalLM) -> None:
    processor = tiny.processor
    processor.whole_length = True
    try:
        assert processor.item(film(2, 1.0)).audio_frames == 8
        assert processor.item(film(2, 0)).audio_frames == 0
    finally:
        processor.whole_length = False
    assert [processor.item(film(2, s)).audio_frames for s in (0.3, 1.0, 1.05, 1.3, 4.0)] == [1, 2, 2, 3, 8]


def test_the_prompt_is_the_authors(tiny: MultimodalLM) -> None:
    assert tiny.processor.prompt("why", "<video>") == "USER: <Img><video></Img> why\nASSISTANT: "
    with pytest.raises(InputError, match="no place for one"):
        tiny.processor.prompt("why", system="You are")
    batch = tiny.processor(tiny.processor.prompt("sounds", "<video>") + "two", videos=[FILMS[1]], labels=True)
    words = tiny.processor.tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] >= 0])
    assert words == ["two"]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters that begins every text with a space, as Vicuna's does."""
    alphabet = ["<s>", "</s>", *sorted(set("USER: <Img></Img>ASSISTANT:whyandtwo\n▁"))]
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_a_dialogue_is_the_authors_and_only_its_answers_are_trained(tiny: MultimodalLM) -> None:
    """Each turn is encoded on its own, so that a tokenizer that adds a space does so at each of them."""
    turns = [Turn("why", "two", "<video>"), Turn("who", "no")]
    words = "USER: <Img><video></Img> why\nASSISTANT: two{0}USER: who\nASSISTANT: no{0}"
    assert tiny.processor.dialogue(turns) == words.format("<|endoftext|>")
    kept = tiny.processor
    processor = FAVORProcessor(kept.image_processor, letters(), kept.feature_extractor, letters(), 6, 3, 8, False)
    batch = processor(processor.dialogue(turns), videos=[FILMS[1]], labels=True)
    ids = batch["input_ids"][0][~TokenLayout(batch["layout"]).visual[0]]
    pieces = ["<s>", *"▁USER:▁<Img>", *"▁</Img>▁why\nASSISTANT:▁two", "</s>"]
    pieces += [*"▁USER:▁who\nASSISTANT:▁no", "</s>"]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == pieces
    trained = processor.tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] >= 0])
    assert trained == [*"▁two", "</s>", *"▁no", "</s>"]
    with pytest.raises(InputError, match="no place for one"):
        processor.dialogue(turns, system="You are")


def test_records_of_films_are_trained_on(with_sound: Path, tmp_path: Path) -> None:
    """With sound, without, and sound alone, packed, two turns each: the loss is the mean of theirs alone."""
    model, folder = a_model("favor-tiny"), with_sound.parent
    write_video(clip(0, 4)[:, :32, :32], folder / "silent.mp4", fps=2)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((sound(2).waveform * 32767).astype("<i2").tobytes())
    said = [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, ["red", "two", "first", "one"])]
    records = [
        {"id": name, "video": name, "conversations": [{**said[0], "value": f"<video>\nred {name}"}, *said[1:]]}
        for name in ("clip.mp4", "silent.mp4", "a.wav")
    ]
    (folder / "all.json").write_text(json.dumps(records))
    source = Source(str(folder / "all.json"))
    samples, problems = load_samples(source, model.processor, "chat", 200, None)
    assert not problems
    rows = Rows(samples, model.processor)
    (batch, found), alone = rows.collate([rows[[0, 1, 2]]]), [rows.collate([rows[[i]]])[0] for i in range(3)]
    assert not found
    assert (batch["num_frames"].tolist(), batch["audio_frames"].tolist()) == ([[8, 4, 0]], [[8, 0, 4]])
    words = model.processor.tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] >= 0])
    assert words == ["two", "<|endoftext|>", "one", "<|endoftext|>"] * 3

    def taken(one: dict[str, Any]) -> dict[str, Tensor]:
        return {name: x for name, x in one.items() if name not in ("source", "attention_mask", "labels")}

    def loss(one: dict[str, Any]) -> Tensor:
        return model(**taken(one), labels=one["labels"]).loss

    torch.testing.assert_close(loss(batch), sum(map(loss, alone)) / 3, atol=1e-5, rtol=1e-5)
    asked = [prompt for prompt, _ in prompts(taken(batch), batch["labels"])]
    for prompt, one in zip(asked, alone, strict=True):
        ((own, _),) = prompts(taken(one), one["labels"])
        for name in ("input_ids", "pixel_values", "num_frames", "input_features", "audio_frames"):
            assert torch.equal(prompt[name], own[name])


@pytest.mark.parametrize(
    ("total", "fps", "expected"),
    [
        (8, 2.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (60, 30.0, [0, 29, 30, 59]),
        (75, 30.0, [0, 29, 30, 59, 45, 74]),
        (10, 30.0, [0, 9]),
        (1, 30.0, [0, 0]),
    ],
)
def test_two_frames_are_taken_of_every_second(total: int, fps: float, expected: list[int]) -> None:
    assert sample_indices("favor", num_total=total, video_fps=fps) == expected
    assert len(sample_indices("favor", num_total=9000, video_fps=30.0, num_frames=120)) == 120


class Loudness(torch.nn.Module):
    """A second encoder: how loud each of `steps` parts of a sound is, in many ways."""

    def __init__(self, size: int = 12, steps: int = 8):
        super().__init__()
        self.layer, self.steps = torch.nn.Linear(1, size), steps
        torch.nn.init.ones_(self.layer.weight)

    def forward(self, waveforms: Tensor) -> Tensor:
        return self.layer(waveforms.unflatten(1, (self.steps, -1)).abs().mean(-1, keepdim=True))


@pytest.fixture
def salmonn() -> MultimodalLM:
    model = a_model("video-salmonn-tiny")
    model.set_second_audio_encoder(Loudness())
    return model


def test_a_second_stream_is_the_users(salmonn: MultimodalLM, tiny: MultimodalLM) -> None:
    batch = inputs(salmonn, FILMS[:1])
    logits = salmonn(**batch).logits
    batch["second_waveforms"] = 3 * batch["second_waveforms"]
    assert not torch.allclose(salmonn(**batch).logits, logits, atol=1e-4)
    assert not any("second" in name for name in salmonn.state_dict())
    with pytest.raises(InputError, match="gave \\[1, 8, 5\\] for 1 sounds; this model takes \\[1, steps, 12\\]"):
        salmonn.set_second_audio_encoder(Loudness(5))
        salmonn(**batch)
    with pytest.raises(InputError, match="set_second_audio_encoder"):
        salmonn.set_second_audio_encoder(None)
        salmonn(**batch)
    with pytest.raises(InputError, match="hears one audio stream"):
        tiny.set_second_audio_encoder(Loudness())


def test_films_with_three_streams_in_a_batch_give_what_each_gives_alone(salmonn: MultimodalLM) -> None:
    together = inputs(salmonn, FILMS, padding_side="right")
    tokens = salmonn.encode_media(together["layout"], **{name: together[name] for name in salmonn.media_inputs})
    for i, one in enumerate(FILMS):
        text = salmonn.processor.prompt(" ".join(["sounds"] * (i % 3 + 1)), "<video>")
        single = salmonn.processor(text, videos=[one])
        own = salmonn.encode_media(single["layout"], **{name: single[name] for name in salmonn.media_inputs})[0]
        torch.testing.assert_close(tokens[i, : len(own)], own, atol=1e-5, rtol=1e-5)


def test_a_second_stream_is_filled_up_before_its_projection(salmonn: MultimodalLM) -> None:
    """So that the steps that are missing carry the projection's bias, as in the authors' code."""
    first, second = torch.randn(1, 40, 16), torch.randn(1, 8, 12)
    features = salmonn.connector.audio_features(first, second)
    projection = salmonn.connector.beats_pre_qformer_proj
    torch.testing.assert_close(features[0, :8, 16:], projection(second)[0])
    torch.testing.assert_close(features[0, 8:, 16:], projection.bias.expand(32, -1))
    torch.testing.assert_close(features[..., :16], salmonn.connector.speech_pre_qformer_proj(first))


@pytest.mark.filterwarnings("ignore:At least one mel filter")  # of transformers' extractor without torchaudio
def test_an_audio_spectrogram_transformer_may_be_the_second_stream(salmonn: MultimodalLM) -> None:
    """At BEATs' strides it gives 50 steps a second, moment by moment."""
    config = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = SpectrogramTransformer({**config, "frequency_stride": 16, "time_stride": 16, "max_length": 400}).eval()
    assert encoder(torch.zeros(2, 64000)).shape == (2, 8 * 25, 12)
    late = torch.zeros(1, 64000)
    late[0, 48000:] = torch.from_numpy(sound(1).waveform)
    embedded = encoder.model.embeddings.patch_embeddings
    encoder.model.forward = lambda features: SimpleNamespace(  # patches as they are embedded, after two others
        last_hidden_state=torch.cat([torch.zeros(1, 2, 12), embedded(features)], 1)
    )
    changed = (encoder(late) - encoder(torch.zeros(1, 64000))).abs().amax(-1)[0] > 1e-3
    assert not changed[: 8 * 18].any()
    assert changed[8 * 19 :].any()
    salmonn.set_second_audio_encoder(encoder)
    assert salmonn(**inputs(salmonn, FILMS[:1])).logits.isfinite().all()


def asked_of(name: str, path: Path, **details: Any) -> tuple[Benchmark, Item]:
    item = Item("q", QUESTION, 0, ("one", "two"), path.name, details=details)
    return Benchmark(name, name, lambda _: [item], {}), item


def test_a_benchmark_of_films_is_heard_where_the_frames_are_the_models_own(
    tiny: MultimodalLM, with_sound: Path, tmp_path: Path
) -> None:
    toy, item = asked_of("toy", with_sound)
    heard = Media(toy, tmp_path, Frames()).read(item, tiny.processor)
    assert heard.audio.duration == pytest.approx(4, abs=0.1)
    assert len(heard.frames) == 8
    eight = Media(toy, tmp_path, Frames("linspace", 8))
    assert not hasattr(eight.read(item, tiny.processor), "audio")
    deaf = mmzoo.create("aki-tiny").processor
    assert not hasattr(Media(toy, tmp_path, Frames()).read(item, deaf), "audio")
    cut = Media(toy, tmp_path, Frames()).read(asked_of("toy", with_sound, cut_frame=5)[1], tiny.processor)
    assert cut.audio.duration == pytest.approx(2.5, abs=0.01)
    write_sound_clip(make_sound_clip(3), tmp_path / "silent.mp4", silent=True)
    silent = Media(toy, tmp_path, Frames()).read(asked_of("toy", tmp_path / "silent.mp4")[1], tiny.processor)
    assert silent.audio is None


def test_a_damaged_sound_costs_a_benchmark_one_item(tiny: MultimodalLM, with_sound: Path, tmp_path: Path) -> None:
    import av

    data = bytearray(with_sound.read_bytes())
    with av.open(str(with_sound)) as file:
        packets = [packet for packet in file.demux(audio=0) if packet.pos and packet.size > 16]
    at = packets[len(packets) // 2].pos
    data[at : at + 12] = b"\x5a" * 12
    (tmp_path / "damaged.mp4").write_bytes(data)
    toy, item = asked_of("toy", tmp_path / "damaged.mp4")
    media = Media(toy, tmp_path, Frames())
    assert isinstance(_read(SimpleNamespace(media=media, model=tiny, benchmark=toy), item), AudioReadError)


def test_the_world_with_sound_is_a_benchmark(tiny: MultimodalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_sound, "CLIPS", 6)
    found = benchmark("world_sound")
    items = found.read(Path())[:20]
    media = Media(found, Path(), found.protocol().frames)
    clips = {seed: make_sound_clip(seed, split="test") for seed in {item.details["seed"] for item in items}}
    for item in items:
        clip_of, seen = clips[item.details["seed"]], media.read(item, tiny.processor)
        assert np.array_equal(seen.audio.waveform, clip_of.waveform)
        assert len(seen.frames) == 8
        question = clip_of.questions[int(item.id.rpartition("-")[2])]
        assert (item.question, item.options[item.answer]) == (question.text, question.answer)
        assert not hasattr(media.read(item, mmzoo.create("aki-tiny").processor), "audio")
    other = dataclasses.replace(found, sound=lambda _: np.zeros(8, np.float32))
    assert media.sha256(items[0]) != Media(other, Path(), media.frames).sha256(items[0])
    right = [judged(item, item.options[item.answer], found.protocol()) for item in items]
    wrong = [judged(item, "", found.protocol()) for item in items if item.details["needs"] == "both"]
    told = found.protocol().aggregate([one for one in right if one.item.details["needs"] != "both"] + wrong)
    assert (told["needs sight"], told["needs sound"], told["needs both"]) == (100, 100, 0)
    assert told["sounds"] == 100


def test_settings_that_do_not_fit_are_refused(tiny: MultimodalLM) -> None:
    with pytest.raises(InputError, match="instruction=False"):
        FAVORConfig(vision_config={"hidden_size": 8})
    batch = inputs(tiny, FILMS[:1])
    with pytest.raises(InputError, match="The processor gives all"):
        tiny(batch["input_ids"], batch["layout"], pixel_values=batch["pixel_values"])
    with pytest.raises(InputError, match="the layout has places for"):
        tiny.encode_media(
            batch["layout"],
            batch["pixel_values"],
            batch["num_frames"],
            batch["input_features"],
            batch["audio_frames"] + 3,
        )
    with pytest.raises(InputError, match="nothing to see or to hear"):
        tiny.processor(tiny.processor.prompt("why", "<video>"), videos=[film(0, 0)])
    with pytest.raises(InputError, match="1 <video> places, but 0 were given"):
        tiny.processor("<video>")


def test_an_array_has_no_clock(tiny: MultimodalLM) -> None:
    assert len(tiny.processor.read_video(clip(0, 5)).frames) == 5
    assert len(tiny.processor.read_video(clip(0, 50)).frames) == 8
    assert isinstance(read_video(clip(0, 5), sampling="all"), Video)


def test_where_an_answer_looked_is_a_share_of_every_frame() -> None:
    model = a_model("favor-nano")
    maps = model.attend(clip(0), QUESTION, max_new_tokens=2)
    assert maps.by_patch().shape[-2:] == (5, 16)
    torch.testing.assert_close(maps.by_patch().sum((-1, -2)), maps.by_class()["video"])


def released(model: MultimodalLM, *, repeats: bool, suffix: str = ".default") -> dict[str, Tensor]:
    """A checkpoint in the authors' names, with an adapter on the first query projection."""
    state = dict(model.connector.state_dict())
    if repeats:
        state |= {name.replace("video_", "joint_"): x for name, x in state.items() if name.startswith("video_")}
        state |= {"ln_speech.weight": state["ln_video.weight"], "low_Qformer.x": torch.zeros(1)}
    for half, shape in (("A", (4, 32)), ("B", (32, 4))):
        name = f"llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_{half}{suffix}.weight"
        state[name] = torch.randn(shape, generator=torch.Generator().manual_seed(len(half)))
    return state


@pytest.mark.parametrize(
    ("name", "repeats", "suffix"),
    [("favor-tiny", False, ".default"), ("favor-tiny", True, ""), ("video-salmonn-tiny", True, "")],
)
def test_what_the_authors_trained_is_read(tmp_path: Path, name: str, repeats: bool, suffix: str) -> None:
    source, model = a_model(name), mmzoo.create(name)
    assert ("beats_pre_qformer_proj.weight" in source.connector.state_dict()) == (name == "video-salmonn-tiny")
    state = released(source, repeats=repeats, suffix=suffix)
    torch.save(state, tmp_path / "pytorch_model.pt")
    projection = model.llama_model.model.layers[0].self_attn.q_proj.weight
    before = projection.detach().clone()
    load_trained(model, tmp_path / "pytorch_model.pt")
    for own, tensor in source.connector.state_dict().items():
        assert torch.equal(model.connector.state_dict()[own], tensor)
    halves = [x for name, x in state.items() if "lora_" in name]
    torch.testing.assert_close(projection - before, 8 * halves[1] @ halves[0], atol=1e-4, rtol=1e-4)


def towers(model: MultimodalLM, folder: Path) -> dict[str, str]:
    """What the recipes take from the hub, at the model's sizes, as transformers' own classes save it."""
    config = model.config
    seeing = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=config.vision_config.to_dict(),
            qformer_config=config.qformer_config.to_dict(),
            text_config=config.text_config.to_dict(),
            num_query_tokens=config.num_query_tokens,
        )
    )
    hearing = WhisperForConditionalGeneration(
        WhisperConfig(**{**config.audio_config.to_dict(), "decoder_layers": 1, "decoder_attention_heads": 2})
    )
    seeing.vision_model.load_state_dict(model.vision_encoder.state_dict())
    seeing.qformer.load_state_dict(model.frame_qformer.state_dict())
    seeing.query_tokens.data = model.query_tokens.data
    hearing.model.encoder.load_state_dict(model.speech_encoder.state_dict())
    made = {"Salesforce": seeing, "openai": hearing, "lmsys": model.llama_model}
    for name, one in made.items():
        one.save_pretrained(folder / name)
    mmzoo.hub.save(model, folder / "data")
    return {name: str(folder / name) for name in (*made, "data")}


@pytest.mark.parametrize("name", ["favor-7b", "video-salmonn-13b"])
def test_a_recipe_trains_the_tiny_twin(
    name: str, with_sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From towers as the hub holds them, with LoRA, on two films; the losses and what is trained are finite and few."""
    monkeypatch.chdir(tmp_path)
    twin = a_model(f"{name.rpartition('-')[0]}-tiny")
    there = towers(twin, tmp_path)
    described = yaml.safe_load(Path(cli.recipe(name)).read_text())
    options = described["model"]["init_args"]
    options["name"] = f"{name.rpartition('-')[0]}-tiny"
    for part in options["parts"].values():
        part["weights"] = there[part["weights"].removeprefix("hf-hub:").partition("/")[0]]
    options["processor"] = there["data"]
    if "salmonn" in name:
        options["second_audio_encoder"] = {"class_path": f"{__name__}.Loudness"}
    turns = [{"from": "human", "value": "<video>\nfirst"}, {"from": "gpt", "value": "two"}]
    lines = [{"id": i, "video": with_sound.name, "conversations": turns} for i in "01"]
    (with_sound.parent / "all.json").write_text(json.dumps(lines))
    described["trainer"] |= {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    described["trainer"] |= {"max_epochs": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "callbacks": []}
    described["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "run"},
    }
    described["data"]["init_args"]["sources"] = [{"path": str(with_sound.parent / "all.json")}]
    Path("mine.yaml").write_text(yaml.safe_dump(described))
    run_cli(monkeypatch, "fit", "--config=mine.yaml", "--export=trained")
    (metrics,) = tmp_path.rglob("metrics.csv")
    head, *rows = (line.split(",") for line in metrics.read_text().splitlines())
    told = dict(zip(head, rows[-1], strict=True))
    assert np.isfinite(float(told["loss"])) and -1 < float(told["similarity"]) < 1
    trained = mmzoo.load("trained").state_dict()
    changed = {own.split(".")[0] for own, x in twin.state_dict().items() if not torch.equal(trained[own], x)}
    layers = [
        own for own, x in twin.llama_model.state_dict().items() if not torch.equal(trained[f"llama_model.{own}"], x)
    ]
    assert all("self_attn" in own for own in layers) and len(layers) == 8
    assert not any("second" in own for own in trained)
    assert changed == {"connector", "llama_model"}


def test_the_large_recipe_is_the_small_one_at_another_size() -> None:
    small, large = (yaml.safe_load(Path(cli.recipe(f"favor-{size}")).read_text()) for size in ("7b", "13b"))
    assert json.loads(json.dumps(large).replace("13b", "7b")) == small


def test_the_diversity_loss_is_that_of_the_windows_there_are() -> None:
    """Without those that pad shorter items, and of the coarse windows alone."""
    module = FAVORFinetune("favor-tiny", weights=None)
    for parameter in module.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    module.log = lambda *_, **__: None
    module.trainer = SimpleNamespace(log_every_n_steps=2, global_step=0)
    texts = [f"{module.model.processor.prompt('red', '<video>')}two" for _ in FILMS]
    batch = module.model.processor(texts, videos=[[one] for one in FILMS], padding_side="right", labels=True)
    plain = module.training_step({**batch}, 0)
    windows = []
    for text, one in zip(texts, FILMS, strict=True):
        alone = module.model.processor(text, videos=[one])
        module.states.clear()
        module.model(**alone)
        (states,) = module.states
        windows += states[0, :, :, 16:]
    similar = [torch.cosine_similarity(w[:, None], w[None], dim=-1) for w in windows]
    mean = torch.stack([(one.sum() - 6) / 30 for one in similar]).mean()
    module.diversity = 0.5
    torch.testing.assert_close(module.training_step({**batch}, 0) - plain, 0.5 * mean, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="Give second_audio_encoder"):
        FAVORFinetune("video-salmonn-tiny", weights=None)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    model = mmzoo.create("favor-tiny")
    state = released(model, repeats=False)
    state["unheard_of"] = state.pop("ln_video.bias")
    state["llama_proj.bias"] = torch.zeros(3)
    lonely = next(name for name in state if "lora_B" in name)
    del state[lonely]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_trained(model, tmp_path / "a.pt")
    assert caught.value.missing == ["ln_video.bias"]
    assert caught.value.unexpected == [lonely[: lonely.index(".lora_")], "unheard_of"]
    assert caught.value.misshapen == [("llama_proj.bias", (3,), (32,))]
    assert "LAVIS" not in str(caught.value)
    torch.save({"visual_encoder.cls_token": torch.zeros(1)}, tmp_path / "eva_vit_g.pth")
    with pytest.raises(CheckpointError, match="not read from files of LAVIS.*Salesforce/instructblip-vicuna-13b"):
        load_trained(model, tmp_path / "eva_vit_g.pth")
    (tmp_path / "b.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        load_trained(model, tmp_path / "b.pt")


def test_full_size_models_hold_what_their_parts_hold() -> None:
    """From the sizes in the papers: the connector of FAVOR-13B, and what video-SALMONN's adds."""

    def block(width: int, keys: int) -> int:
        return 2 * (width**2 + width) + 2 * (keys * width + width) + 2 * width

    layer = block(768, 768) + block(768, 1536) + block(1536, 1536) + 2 * 768 * 3072 + 3072 + 768 + 2 * 768
    size = 2 * layer + 2 * 768 + 32 * 768 + (1280 + 1) * 768 + 2 * 1536 + 4096 * 1536 + (768 + 1) * 5120
    connector = mmzoo.create("favor-13b", device="meta").connector
    assert sum(parameter.numel() for parameter in connector.parameters()) == size
