"""lmms-eval with a zoo model: what it asks is answered as the model answers without it, and nothing is made up."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mmzoo
from mmzoo.errors import EvaluationError, InputError
from mmzoo.language import MultimodalLM
from mmzoo.media import read_video, write_video
from mmzoo.processing import Turn
from mmzoo.world import Clip
from mmzoo_eval import lmms
from mmzoo_eval.asking import likelihoods, opened, put
from mmzoo_eval.benchmark import Prompt
from mmzoo_eval.lmms import MAX_NEW_TOKENS, Asked, Asker, Rounds, cut, dialogue, framed, generation, visual_messages
from mmzoo_eval.world import clips_of

ROOT = Path(__file__).resolve().parent.parent
GREEDY = {"max_new_tokens": 4, "until": ["\n\n"], "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.fixture(scope="module")
def nano() -> MultimodalLM:
    return mmzoo.load("aki-nano")


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return clips_of("test", 3)


def asked(text: str, *visuals: Any, document: str = "Document 0", **options: Any) -> Asked:
    return Asked(document, text, lambda: visual_messages(visuals, text), {**GREEDY, **options})


def asked_of(clips: Sequence[Clip]) -> list[Asked]:
    return [asked(question.text, clip.frames) for clip in clips for question in clip.questions]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_are_the_models_own(nano: MultimodalLM, clips: list[Clip], batch_size: int) -> None:
    own = [nano.ask(clip.frames, one.text, max_new_tokens=4).text for clip in clips for one in clip.questions]
    assert Asker(nano, batch_size).generate(asked_of(clips)) == own
    assert len(set(own)) > 3


def test_requests_with_other_options_keep_their_place(nano: MultimodalLM, clips: list[Clip]) -> None:
    requests = asked_of(clips)
    own = Asker(nano, 4).generate(requests)
    mixed = [
        one if i % 3 else Asked(one.document, one.text, one.messages, GREEDY | {"until": "e"})
        for i, one in enumerate(requests)
    ]
    assert Asker(nano, 4).generate(mixed) == [one if i % 3 else one.split("e")[0] for i, one in enumerate(own)]
    assert any("e" in one for one in own[::3])


def test_frames_are_taken_by_the_familys_rule(nano: MultimodalLM, clips: list[Clip], tmp_path: Path) -> None:
    write_video(clips[0].frames, tmp_path / "0.mp4")
    pictures = [Image.fromarray(frame) for frame in clips[0].frames]
    asker = Asker(nano)
    for source in (tmp_path / "0.mp4", str(tmp_path / "0.mp4"), pictures, clips[0].frames):
        _, (video,) = asker._put(asked("what", source))
        assert video.indices == nano.processor.read_video(clips[0].frames).indices
        assert video.sampling == nano.processor.sampling
    text, (picture,) = asker._put(asked("what", pictures[0]))
    assert picture.size == pictures[0].size
    assert text == nano.processor.prompt("what", "<image>")
    pictures[0].save(tmp_path / "0.png")
    assert asker._put(asked("what", str(tmp_path / "0.png")))[1][0].tobytes() == pictures[0].tobytes()


def test_what_cannot_be_asked_names_its_document(nano: MultimodalLM, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good = asked("what colour is the circle")
    for bad, why in [
        (asked("", str(tmp_path / "bad.mp4"), document="Document 7"), "Cannot read the video"),
        (asked("", str(tmp_path / "bad.png"), document="Document 7"), "Cannot read the image"),
        (asked("", str(tmp_path / "none.mp4"), document="Document 7"), "no such file"),
        (asked("", {"array": [0.0], "sampling_rate": 1}, document="Document 7"), "with type, array, sampling_rate"),
        (asked("", {"type": "audio", "path": "a.wav"}, document="Document 7"), "not 'audio'"),
        (asked("", {"type": "video", "path": "a.mp4", "video_start": 1}, document="Document 7"), "a part of 'a.mp4'"),
        (asked("", document="Document 7", image_aspect_ratio="pad"), "ignore=image_aspect_ratio"),
        (asked("<image> and", document="Document 7"), "0 were given"),
    ]:
        with pytest.raises(EvaluationError, match="Document 7") as raised:
            Asker(nano, 1).generate([good, bad])
        assert why in str(raised.value)
    assert Asker(nano, ignored=["image_aspect_ratio"]).generate([asked("is there", image_aspect_ratio="pad")])


def test_nothing_is_asked_before_every_option_is_known(nano: MultimodalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms, "written", lambda *_, **__: pytest.fail("it was asked"))
    with pytest.raises(EvaluationError, match="magic"):
        Asker(nano).generate([asked("what"), asked("what", magic=1)])


def test_options_reach_the_model(nano: MultimodalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(lmms, "written", lambda model, texts, media, **options: given.update(options) or ["a"])
    Asker(nano).generate([asked("what", temperature=0.7, top_p=0.9, num_beams=3, do_sample=None, max_new_tokens=5)])
    assert given.pop("stopping_criteria")
    assert given == {"temperature": 0.7, "top_p": 0.9, "num_beams": 3, "do_sample": True, "max_new_tokens": 5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 1.0}, {"do_sample": False}),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}),
        ({"temperature": 0.2}, {"do_sample": True, "temperature": 0.2}),
        ({"temperature": 0.2, "do_sample": False, "top_k": 3}, {"do_sample": False}),
        ({"do_sample": True, "top_k": 3}, {"do_sample": True, "top_k": 3}),
        ({"temperature": None, "top_p": None, "num_beams": 4}, {"do_sample": False, "num_beams": 4}),
        (
            {"max_new_tokens": 3, "repetition_penalty": 1.2},
            {"do_sample": False, "max_new_tokens": 3, "repetition_penalty": 1.2},
        ),
    ],
)
def test_generation_options(options: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation(options) == ({"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, **expected}, ())


def test_until_is_text() -> None:
    assert generation({"until": "ab"})[1] == ("ab",)
    assert generation({"until": ["a", ""]})[1] == ("a",)
    with pytest.raises(InputError, match="until"):
        generation({"until": [None]})


@given(st.text("ab \n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=2), max_size=3))
def test_cut_answers_end_before_every_stop(answer: str, until: list[str]) -> None:
    found = cut(answer, until)
    assert not any(one in found for one in until)
    start = answer.index(found) + len(found)
    stops = any(answer.startswith(one, i) for one in until for i in range(start, len(answer)))
    assert stops or found == answer.strip()


def test_answers_stop_where_the_task_says(nano: MultimodalLM) -> None:
    tokenizer = nano.processor.tokenizer
    stop = lmms._Until(tokenizer, ["red"])
    red, blue, what = tokenizer.convert_tokens_to_ids(["red", "blue", "what"])
    assert stop(torch.tensor([[red, blue], [red, what]]), None).tolist() == [False, False]
    assert stop(torch.tensor([[red, blue, red], [red, what, blue]]), None).tolist() == [True, False]
    assert lmms._Until(tokenizer, ["blue"])(torch.tensor([[red, blue], [blue, red]]), None).tolist() == [True, False]


def read(medium: Any) -> Any:
    return (
        Image.new("RGB", (8, 8))
        if medium == "p"
        else read_video(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), num_frames=2)
    )


def user(*content: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": one} if len(one) != 1 else {"type": "image", "url": one} for one in content
        ],
    }


@pytest.mark.parametrize(
    ("content", "turn"),
    [
        (("what now",), Turn("what now", "")),
        (("p", "v", "what ", "now"), Turn("what now", "", "<image><video>")),
        (("here ", "p", " what"), Turn("here <image> what", "")),
        (("p", "p", "from <image> to <image>"), Turn("from <image> to <image>", "")),
    ],
)
def test_media_stand_where_the_message_has_them(content: Any, turn: Turn) -> None:
    system, turns, media = dialogue([user(*content)], read)
    assert (system, turns) == (None, [turn])
    assert len(media) == sum(len(one) == 1 for one in content)


def test_dialogues_have_turns() -> None:
    messages = [{"role": "system", "content": "be brief"}, user("p", "one?"), {"role": "assistant", "content": "1"}]
    assert dialogue([*messages, user("two?")], read)[:2] == (
        "be brief",
        [Turn("one?", "1", "<image>"), Turn("two?", "")],
    )
    for wrong in (messages, [], [user("aa"), user("bb")], messages[2:], [user("aa"), messages[0], user("aa")]):
        with pytest.raises(InputError, match="A dialogue goes"):
            dialogue(wrong, read)
    with pytest.raises(InputError, match="Only a user shows"):
        dialogue([user("aa"), {**user("p"), "role": "assistant"}, user("aa")], read)


@pytest.mark.parametrize("name", ["llava-tiny", "video-ccam-tiny", "visualchat-tiny", "tc-llava-tiny"])
def test_a_dialogue_opens_as_the_family_is_trained(name: str) -> None:
    processor = mmzoo.create(name).processor
    turns = [Turn("what colour", "red", "<image>"), Turn("what shape", "circle", "")]
    text = opened(processor, turns)
    assert processor.dialogue(turns).startswith(text + processor.before_answer + "circle")
    assert opened(processor, turns[:1]) == processor.prompt("what colour", "<image>")
    assert processor.dialogue(turns[:1]).startswith(opened(processor, turns[:1]) + processor.before_answer + "red")


def test_a_family_of_single_turns_refuses_several(nano: MultimodalLM) -> None:
    messages = [user("aa"), {"role": "assistant", "content": "red"}, user("bb")]
    with pytest.raises(EvaluationError, match="Document 3: .*single turns"):
        Asker(nano).generate([Asked("Document 3", "", lambda: messages)])


@pytest.mark.parametrize(("name", "place"), [("aki-tiny", "system"), ("video-ccam-tiny", "question")])
def test_a_system_text_of_the_arguments_replaces_the_messages(name: str, place: str) -> None:
    model = mmzoo.create(name)
    request = Asked("Document 0", "", lambda: [{"role": "system", "content": "theirs"}, user("what")])
    processor = model.processor
    for asker, system in ((Asker(model), "theirs"), (Asker(model, system="ours"), "ours")):
        text = processor.prompt("what", system=system) if place == "system" else processor.prompt(f"{system}\nwhat")
        assert asker._put(request) == (text, [])


def test_frames_of_a_video_given_as_pictures_are_one_video() -> None:
    pictures = [Image.new("RGB", (8, 8))] * 3
    messages = visual_messages(pictures, "what")
    assert framed(messages, {"task_type": "video"}) == messages
    (message,) = framed(messages, {"task_type": "video", "sample_frames": 16})
    assert message["content"] == [{"type": "video", "url": pictures}, {"type": "text", "text": "what"}]
    files = visual_messages(["a.mp4"], "what")
    assert framed(files, {"task_type": "video", "sample_frames": 16}) == files


def test_losses_are_the_negative_likelihoods(nano: MultimodalLM, clips: list[Clip]) -> None:
    question = clips[0].questions[0]
    own = nano.ask(clips[0].frames, question.text).text
    words = [own, *(word for word in ("red", "yes", "left") if word != own)]
    requests = [asked(question.text, clips[0].frames)] * len(words) + [
        asked(question.text, clips[1].frames, document="Document 1")
    ]
    found = Asker(nano, batch_size=2).losses(requests, [*(f" {word}" for word in words), "red"])
    for clip, options, losses in ((clips[0], words, found[:-1]), (clips[1], ["red"], found[-1:])):
        video = nano.processor.read_video(clip.frames)
        told = likelihoods(nano, put(nano, Prompt(question.text), video), video, options)
        assert [loss for loss, _ in losses] == pytest.approx([-one for one in told], abs=1e-4)
    assert [greedy for _, greedy in found[: len(words)]] == [True] + [False] * (len(words) - 1)
    with pytest.raises(EvaluationError, match="Document 0: .*adds no token"):
        Asker(nano).losses(requests[:1], [" "])


@pytest.mark.parametrize(("name", "gap"), [("aki-tiny", ""), ("llava-tiny", " ")])
def test_the_family_says_what_stands_before_an_option(name: str, gap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def continued(model: Any, text: str, media: Any, continuations: list[str]) -> list[Any]:
        told.extend(continuations)
        return [SimpleNamespace(log_probabilities=torch.zeros(1), greedy=True)] * len(continuations)

    monkeypatch.setattr(lmms, "continued", continued)
    Asker(mmzoo.create(name), 5).losses([asked("what")] * 2, [" red", "blue"])
    assert told == [f"{gap}red", f"{gap}blue"]


def test_a_video_is_given_up_at_the_deadline(nano: MultimodalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano.processor, "read_video", lambda source, deadline: (source, deadline))
    assert Asker(nano, deadline=7.0)._read("a.mp4") == ("a.mp4", 7.0)


def test_rounds_are_asked_until_the_task_ends_them(nano: MultimodalLM, clips: list[Clip]) -> None:
    questions = [one.text for one in clips[0].questions]
    seen: list[Any] = []

    def following(last: int) -> Callable[..., Any]:
        def follow(round_idx: int, previous_output: list[str], previous_round_info: Any) -> Any:
            seen.append((len(previous_output), previous_round_info))
            if round_idx == last:
                return None, True, ["kept", *previous_output], None
            return visual_messages([clips[0].frames], questions[round_idx]), False, None, round_idx

        return follow

    rounds = [Rounds(asked(questions[0], clips[0].frames), following(last)) for last in (1, 3)]
    own = Asker(nano).generate([asked(question, clips[0].frames) for question in questions[:3]])
    assert Asker(nano, 2).generate_rounds(rounds) == [["kept", own[0]], ["kept", *own]]
    assert seen == [(1, None), (1, None), (2, 1), (3, 2)]


@dataclass
class Result:
    text: Any


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in against a stand-in of lmms-eval's interface."""

    class Base:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

        @staticmethod
        def _resolve_system_prompt(value: str) -> str:
            return value

        def clean(self) -> None:
            pass

    names = {
        "lmms_eval.api.instance": {"GenerationResult": Result, "Instance": SimpleNamespace},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
    }
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *names):
        module = ModuleType(name)
        vars(module).update(names.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mmzoo_eval.lmms_plugin", raising=False)
    module = importlib.import_module("mmzoo_eval.lmms_plugin")
    yield module
    sys.modules.pop("mmzoo_eval.lmms_plugin")


def instance(*args: Any, **metadata: Any) -> Any:
    return SimpleNamespace(args=args, metadata={"task": "toy", "doc_id": 0, "split": "test", **metadata})


def test_the_two_forms_of_the_interface_are_answered_alike(plugin: Any, nano: MultimodalLM, clips: list[Clip]) -> None:
    docs = [
        {"question": clip.questions[0].text, "frames": clip.frames, "answer": clip.questions[0].answer}
        for clip in clips
    ]
    own = [nano.ask(doc["frames"], doc["question"], max_new_tokens=4).text for doc in docs]

    def show(doc: Any) -> list[Any]:
        return [doc["frames"]]

    def say(doc: Any, **known: Any) -> Any:
        if not known:
            return visual_messages(show(doc), doc["question"])
        return (None, True, known["previous_output"] * 2, None)

    def text(doc: Any, **known: Any) -> Any:
        return (None, None, True, known["previous_output"] * 2, None)

    simple = plugin.Simple("aki-nano", device="cpu", batch_size="2")
    chat = plugin.Chat("aki-nano", device="cpu")
    simple.task_dict = chat.task_dict = {"toy": {"test": docs}}
    places = [(i, "toy", "test") for i in range(len(docs))]
    asked_simply = [instance(docs[i]["question"], GREEDY, show, *place, doc_id=i) for i, place in enumerate(places)]
    assert simple.generate_until(asked_simply) == own
    assert chat.generate_until([instance("", say, GREEDY, *place) for place in places]) == own
    twice = [[one, one] for one in own]
    several = [instance(docs[i]["question"], GREEDY, show, text, *place) for i, place in enumerate(places)]
    assert simple.generate_until_multi_round(several) == twice
    assert chat.generate_until_multi_round([instance("", say, GREEDY, *place) for place in places]) == twice
    targets = [
        instance(docs[0]["question"], lambda doc: own[0], show, *places[0]),
        instance(docs[0]["question"], " up", show, *places[0]),
    ]
    (right, wrong) = [one.text for one in simple.loglikelihood(targets)]
    assert right[0] < wrong[0] and (right[1], wrong[1]) == (True, False)
    assert simple.generate_until([]) == simple.loglikelihood([]) == []
    with pytest.raises(InputError, match="acc_mutual_info"):
        simple.loglikelihood([instance("", "red")])
    with pytest.raises(InputError, match="5 parts"):
        simple.generate_until_multi_round([instance("what", GREEDY, show, lambda *_, **__: "what else", *places[0])])
    assert (simple.is_simple, chat.is_simple, simple.batch_size) == (True, False, 2)
    assert (simple.device.type, simple._rank, simple._world_size) == ("cpu", 0, 1)
    simple.clean()
    assert not hasattr(simple, "asker")


def test_frames_given_as_pictures_are_one_video_in_every_round(
    plugin: Any, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [Image.fromarray(frame) for frame in clips[0].frames]
    shown: list[list[str]] = []

    def write(model: Any, texts: Any, media: Any, **options: Any) -> list[str]:
        shown.extend([type(medium).__name__ for medium in each] for each in media)
        return ["red"] * len(texts)

    def show(doc: Any) -> Any:
        return pictures

    def text(doc: Any, round_idx: int, previous_output: list[str], previous_round_info: Any) -> Any:
        return (None, None, True, None, None) if round_idx == 2 else (pictures, "what", False, None, None)

    def say(doc: Any, round_idx: int = 0, **known: Any) -> Any:
        messages = visual_messages(pictures, "what")
        return (None, True, None, None) if round_idx == 2 else (messages, False, None, None) if round_idx else messages

    monkeypatch.setattr(lmms, "written", write)
    place, video = (0, "toy", "test"), {"task_type": "video", "sample_frames": 8}
    simple, chat = plugin.Simple("aki-nano", device="cpu"), plugin.Chat("aki-nano", device="cpu")
    simple.task_dict = chat.task_dict = {"toy": {"test": [None]}}
    simple.generate_until([instance("what", GREEDY, show, *place, **video)])
    chat.generate_until([instance("", say, GREEDY, *place, **video)])
    simple.generate_until_multi_round([instance("what", GREEDY, show, text, *place, **video)])
    chat.generate_until_multi_round([instance("", say, GREEDY, *place, **video)])
    assert shown == [["Video"]] * 6
    simple.generate_until([instance("what", GREEDY, show, *place)])
    assert shown[6:] == [["Image"] * len(pictures)]


def plain(attention: str) -> str:
    return mmzoo.create("aki-tiny", attention=attention).language_model.config._attn_implementation


def test_arguments_of_the_plugin(plugin: Any) -> None:
    told = plugin.Chat(
        "aki-nano",
        device="cpu",
        system_prompt="be brief",
        num_frames=4,
        ignore="seed+mask",
        deadline=9.0,
        dtype="bfloat16",
        attention="eager",
    )
    assert told.asker.model.language_model.config._attn_implementation == plain("eager")
    assert plain("eager") != plain("sdpa")
    assert (told.asker.system, told.asker.ignored, told.asker.deadline) == ("be brief", ["seed", "mask"], 9.0)
    assert (told.asker.model.processor.num_frames, told.asker.model.dtype) == (4, torch.bfloat16)
    for wrong, why in [
        ({"max_batch_size": 4}, "max_batch_size"),
        ({"batch_size": "auto"}, "auto"),
        ({"batch_size": 0}, "0"),
        ({"dtype": "relu"}, "relu"),
        ({"num_frames": 0}, "num_frames"),
        ({"device_map": "auto"}, "device_map=auto"),
    ]:
        with pytest.raises(InputError, match=why):
            plugin.Chat("aki-nano", **{"device": "cpu", **wrong})
    several = SimpleNamespace(num_processes=2, device="cuda:1")
    assert plugin._place(None, None, several) == {"device": "cuda:1"}
    assert plugin._place("cuda", None, several) == {"device": "cuda"}
    for place in ((None, "auto"), ("cuda:0", None)):
        with pytest.raises(InputError, match="Several processes"):
            plugin._place(*place, several)
    assert plugin._place(None, "auto", SimpleNamespace(num_processes=1)) == {"device_map": "auto"}
    manifest = plugin.manifest()
    for path in (manifest.simple_class_path, manifest.chat_class_path):
        assert path.rpartition(".")[0] == "mmzoo_eval.lmms_plugin" and hasattr(plugin, path.rpartition(".")[2])


SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {folder}/docs.json}}
test_split: train
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
metadata: {{version: 0}}
"""
WRITTEN = """
generation_kwargs: {max_new_tokens: 4, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}
process_results: !function utils.process_results
metric_list:
  - {metric: right, aggregation: mean, higher_is_better: true}
"""
TASKS = {
    "world_written": "output_type: generate_until" + WRITTEN,
    "world_rounds": "output_type: generate_until_multi_round"
    + WRITTEN.replace("process_results\n", "process_rounds\n"),
    "world_chosen": """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: !function utils.right_choice
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
}
UTILS = """
import os
from pathlib import Path

def doc_to_visual(doc):
    Path(__file__).with_name(f"asked_by_{os.environ.get('RANK', 0)}").touch()
    return [doc["video"]]

def doc_to_text(doc, lmms_eval_specific_kwargs=None, round_idx=0, previous_output=None, previous_round_info=None):
    if not round_idx:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    assert len(previous_output) == round_idx
    return [doc["video"]], "how many objects are there", False, previous_output, None

def right_choice(doc):
    return doc["choices"].index(doc["answer"])

def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}

def process_rounds(doc, results):
    assert len(results[0]) == 2, results
    return {"right": float(results[0][0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks about five clips."""
    folder = tmp_path_factory.mktemp("world")
    docs = []
    for i, clip in enumerate(clips_of("test", 5)):
        write_video(clip.frames, folder / f"{i}.mp4")
        for question in clip.questions:
            others = [word for word in ("red", "green", "yes", "one", "left") if word != question.answer]
            doc = {"video": str(folder / f"{i}.mp4"), "question": question.text, "answer": question.answer}
            docs.append(doc | {"choices": [others[0], question.answer, others[1]]})
    (folder / "docs.json").write_text(json.dumps(docs))
    (folder / "utils.py").write_text(UTILS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{SHARED.format(folder=folder)}{text}")
    return folder


def run_lmms_eval(world: Path, out: Path, tasks: str, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    # `accelerate launch --cpu` starts one process, whatever it is told.
    launch = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    asked = ["--model", "mmzoo", "--model_args", "name=aki-nano", "--device", "cpu", "--tasks", tasks]
    shown = ["--include_path", str(world), "--output_path", str(out), "--log_samples", "--batch_size", "2"]
    shown += ["--verbosity", "DEBUG"]  # else it ends with 0 whatever happens
    env = os.environ | {"HF_HOME": str(world / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launch, "lmms_eval", *asked, *shown, *options]
    return subprocess.run(command, cwd=world, env=env, text=True, capture_output=True)


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    (path,) = out.rglob(f"*samples_{task}.jsonl")
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])


@pytest.fixture(scope="module")
def told(world: Path, nano: MultimodalLM) -> list[str]:
    """What the model says without lmms-eval."""
    docs = json.loads((world / "docs.json").read_text())
    return [nano.ask(doc["video"], doc["question"], max_new_tokens=4).text for doc in docs]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_answers_through_lmms_eval_are_the_models_own(
    world: Path, told: list[str], tmp_path: Path, options: Any
) -> None:
    pytest.importorskip("lmms_eval")
    done = run_lmms_eval(world, tmp_path, "world_written,world_rounds", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = samples(tmp_path, "world_written")
    assert [row["filtered_resps"] for row in rows] == told
    assert len(set(told)) > 3
    rounds = [row["filtered_resps"] for row in samples(tmp_path, "world_rounds")]
    assert [first for first, _ in rounds] == told


@pytest.mark.slow
def test_options_are_chosen_by_their_likelihood(world: Path, nano: MultimodalLM, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    done = run_lmms_eval(world, tmp_path, "world_chosen", "--force_simple", "--limit", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    docs = json.loads((world / "docs.json").read_text())
    for row in samples(tmp_path, "world_chosen"):
        doc = docs[row["doc_id"]]
        video = nano.processor.read_video(doc["video"])
        own = likelihoods(nano, put(nano, Prompt(doc["question"]), video), video, doc["choices"])
        assert [float(loss) for loss, _ in row["filtered_resps"]] == pytest.approx([-one for one in own], abs=1e-4)
        assert row["acc"] == float(own.index(max(own)) == 1)


@pytest.mark.slow
def test_two_processes_answer_an_odd_number_of_documents(world: Path, told: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    done = run_lmms_eval(world, tmp_path, "world_written", "--limit", "7", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (world / "asked_by_0").exists() and (world / "asked_by_1").exists()
    assert [row["filtered_resps"] for row in samples(tmp_path, "world_written")] == told[:7]


@pytest.mark.slow
def test_a_video_that_cannot_be_read_is_no_answer(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    docs = json.loads((world / "docs.json").read_text())
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    docs[1]["video"] = str(tmp_path / "bad.mp4")
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    (tmp_path / "utils.py").write_text(UTILS)
    task = f"task: world_damaged{SHARED.format(folder=tmp_path)}{TASKS['world_written']}"
    (tmp_path / "world_damaged.yaml").write_text(task)
    done = run_lmms_eval(tmp_path, tmp_path / "out", "world_damaged")
    assert done.returncode != 0
    assert "EvaluationError: Document 1 of world_damaged (train): Cannot read the video" in done.stderr
    assert not list((tmp_path / "out").rglob("*samples*"))
