"""FAVOR's family: sound and video together, either alone, read from files by itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_models import a_model, clip
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import mmzoo
from mmzoo.errors import AudioReadError, CheckpointError, InputError, VideoReadError
from mmzoo.language import MultimodalLM
from mmzoo.layout import TokenLayout
from mmzoo.media import Audio, Video, read_video, sample_indices, write_video
from mmzoo.models.favor import FAVORConfig, FAVORProcessor, Film, load_trained
from mmzoo.processing import Turn
from mmzoo.world_sound import make_sound_clip, write_sound_clip
from mmzoo_training.data import Rows, Source, load_samples

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
    """Films of unlike length, with and without sound, packed, two turns each: the loss is the mean of theirs alone."""
    model, folder = a_model("favor-tiny"), with_sound.parent
    write_video(clip(0, 4)[:, :32, :32], folder / "silent.mp4", fps=2)
    said = [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, ["red", "two", "first", "one"])]
    records = [
        {"id": name, "video": name, "conversations": [{**said[0], "value": f"<video>\nred {name}"}, *said[1:]]}
        for name in ("clip.mp4", "silent.mp4")
    ]
    (folder / "all.json").write_text(json.dumps(records))
    source = Source(str(folder / "all.json"))
    samples, problems = load_samples(source, model.processor, "chat", 200, None)
    assert not problems
    rows = Rows(samples, model.processor)
    (batch, found), alone = rows.collate([rows[[0, 1]]]), [rows.collate([rows[[i]]])[0] for i in (0, 1)]
    assert not found
    assert batch["num_frames"].tolist() == [[8, 4]]
    assert batch["audio_frames"].tolist() == [[8, 0]]
    words = model.processor.tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] >= 0])
    assert words == ["two", "<|endoftext|>", "one", "<|endoftext|>"] * 2

    def loss(one: dict[str, Any]) -> Tensor:
        taken = {name: x for name, x in one.items() if name not in ("source", "attention_mask")}
        return model(**taken).loss

    torch.testing.assert_close(loss(batch), sum(map(loss, alone)) / 2, atol=1e-5, rtol=1e-5)


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


def test_a_second_stream_is_the_users() -> None:
    model = mmzoo.create("favor-tiny", second_audio_size=5)
    model.processor.waveforms = True
    batch = inputs(model, FILMS[:1])
    with pytest.raises(InputError, match="second_audio_encoder"):
        model(**batch)
    model.second_audio_encoder = lambda waveforms: waveforms[:, :, None].expand(-1, -1, 5)[:, ::1600]
    assert model(**batch).logits.isfinite().all()


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


@pytest.mark.parametrize(("repeats", "suffix"), [(False, ".default"), (True, "")])
def test_what_the_authors_trained_is_read(tmp_path: Path, repeats: bool, suffix: str) -> None:
    source, model = a_model("favor-tiny"), mmzoo.create("favor-tiny")
    state = released(source, repeats=repeats, suffix=suffix)
    torch.save(state, tmp_path / "pytorch_model.pt")
    projection = model.llama_model.model.layers[0].self_attn.q_proj.weight
    before = projection.detach().clone()
    load_trained(model, tmp_path / "pytorch_model.pt")
    for name, tensor in source.connector.state_dict().items():
        assert torch.equal(model.connector.state_dict()[name], tensor)
    halves = [x for name, x in state.items() if "lora_" in name]
    torch.testing.assert_close(projection - before, 8 * halves[1] @ halves[0], atol=1e-4, rtol=1e-4)


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
