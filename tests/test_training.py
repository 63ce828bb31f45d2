"""Learning in the world: batches, losses, the Lightning command line, AKI's fine-tuning text."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

import mmzoo
from mmzoo.errors import InputError
from mmzoo.layout import TokenLayout
from mmzoo.world import COLOURS, SHAPES, make_clip
from mmzoo_training import aki_sft, cli
from mmzoo_training.world import QuestionBatches, WorldData, WorldQuestions, describe, warm_cosine


@pytest.fixture(scope="module")
def module() -> WorldQuestions:
    torch.manual_seed(0)
    return WorldQuestions(describe_steps=2, answer_steps=2)


def batches(module: WorldQuestions, split: str = "train", clips: int | None = None) -> QuestionBatches:
    data = WorldData(batch_size=3, questions_per_clip=4, describe_steps=0)
    return QuestionBatches(module.model.processor, data, split, clips)


def test_rows_are_what_the_processor_makes(module: WorldQuestions) -> None:
    source, processor = batches(module), module.model.processor
    for seed in range(4):
        clip = source.clip(seed)
        for question in clip.questions:
            ids, layout = source.row(question)
            text = processor.prompt(question.text, "<video>") + question.answer + processor.tokenizer.eos_token
            expected = processor(text, videos=[clip.frames])
            assert ids == expected["input_ids"][0].tolist()
            assert torch.equal(layout.data, expected["layout"])


def test_shared_visual_tokens_give_the_loss_of_separate_rows(module: WorldQuestions) -> None:
    source, model = batches(module), module.model
    clips = [source.clip(seed) for seed in range(3)]
    batch = source.batch(clips, random.Random(0))
    shared, _ = module.answers(batch)
    pixels = (batch["frames"].permute(0, 1, 4, 2, 3).float() / 127.5 - 1)[batch["owner"]]
    separate = model(batch["input_ids"], batch["layout"], pixel_values=pixels, labels=batch["labels"]).loss
    torch.testing.assert_close(shared, separate)


def test_only_answers_are_trained(module: WorldQuestions) -> None:
    source = batches(module)
    clip = source.clip(0)
    batch = source.batch([clip], random.Random(0))
    tokenizer = module.model.processor.tokenizer
    for row, kind in zip(batch["labels"], batch["kinds"], strict=True):
        answer, end = tokenizer.convert_ids_to_tokens(row[row != -100].tolist())
        assert any(question.kind == kind and question.answer == answer for question in clip.questions)
        assert end == tokenizer.eos_token


def test_the_same_step_sees_the_same_clips(module: WorldQuestions) -> None:
    first, second = (next(iter(batches(module))) for _ in range(2))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["frames"], second["frames"])
    fixed = list(batches(module, "val", 5))
    assert len(fixed) == len(batches(module, "val", 5)) == 2
    assert sum(len(batch["frames"]) for batch in fixed) == 6


def test_weights_make_a_kind_more_frequent(module: WorldQuestions) -> None:
    source = batches(module)

    def share(weights: dict[str, float]) -> float:
        source.data.question_weights = weights
        kinds = [q.kind for seed in range(60) for q in source.choose(source.clip(seed), random.Random(seed))]
        return kinds.count("direction") / len(kinds)

    assert share({"direction": 3.0}) > share({}) + 0.1


def test_frames_are_described_as_they_were_drawn() -> None:
    clips = [make_clip(seed) for seed in range(5)]
    looks, places = describe(clips, 8)
    for c, clip in enumerate(clips):
        for t in range(8):
            time = (t + 0.5) / 8
            shown = {thing.colour: thing for thing in clip.objects if thing.appear < time < thing.disappear}
            assert {colour for colour, look in zip(COLOURS, looks[c, t].tolist(), strict=True) if look} == set(shown)
            for i, colour in enumerate(COLOURS):
                if colour in shown:
                    assert SHAPES[looks[c, t, i] - 1] == shown[colour].shape
                    x, y = (places[c, t, i] * 32).long().clamp(0, 31).tolist()
                    distance = (
                        (torch.tensor(COLOURS[colour]) - torch.from_numpy(clip.frames[t, y, x]).int()).abs().max()
                    )
                    assert distance < 40


def test_first_the_encoder_then_everything_learns(module: WorldQuestions) -> None:
    source = batches(module)
    source.data.describe_steps = 1
    frames, batch = (batch for batch, _ in zip(source, range(2), strict=False))
    module.zero_grad()
    module.describing_loss(frames).backward()
    assert all(p.grad is None for p in module.model.lang_model.parameters())
    assert all(p.grad is not None for p in module.model.vision_encoder.parameters())
    module.zero_grad()
    module.answers(batch)[0].backward()
    assert any(p.grad is not None for p in module.model.lang_model.parameters())


def test_frames_to_describe_are_drawn_with_what_they_show(module: WorldQuestions) -> None:
    source = batches(module)
    clips = [source.clip(seed) for seed in range(3)]
    drawn = source.described(clips, 0, frames=20)
    looks, places = (x.flatten(0, 1) for x in describe(clips, 8))
    every = [torch.from_numpy(frame) for clip in clips for frame in clip.frames]
    for frame, look, place in zip(drawn["frames"], drawn["looks"], drawn["places"], strict=True):
        same = [i for i, other in enumerate(every) if torch.equal(frame, other)]
        assert any(torch.equal(look, looks[i]) and torch.equal(place, places[i]) for i in same)


def test_muon_turns_matrices_and_adamw_the_rest() -> None:
    """A step of Muon is a matrix whose singular values are alike, a first one of AdamW as large everywhere."""
    module = WorldQuestions(describe_steps=1, answer_steps=2, weight_decay=0.0, optimizer="muon")
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    layer = module.model.lang_model.model.layers[0]
    parameters = layer.mlp.down_proj.weight, layer.input_layernorm.weight
    before = [parameter.detach().clone() for parameter in parameters]
    module.answers(next(iter(batches(module))))[0].backward()
    optimizer.step()
    matrix, vector = (parameter.detach() - old for parameter, old in zip(parameters, before, strict=True))
    values = torch.linalg.svdvals(matrix)
    assert 0 < values.max() < 2 * values.median()
    torch.testing.assert_close(vector.abs(), torch.full_like(vector, 1e-3), rtol=1e-2, atol=1e-6)


def test_the_blind_baseline_sees_nothing() -> None:
    module = WorldQuestions(blind=True)
    batch = next(iter(batches(module)))
    assert module.pixels(batch).abs().max() == 0


def test_the_rate_rises_and_falls() -> None:
    rates = [warm_cosine(step, 100) for step in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[5]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0.02)
    assert warm_cosine(500, 100) == rates[100]


def test_a_recipe_runs_and_exports_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmzoo"])
    short = {
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.enable_progress_bar": "false",
        "model.init_args.describe_steps": 2,
        "model.init_args.answer_steps": 2,
        "data.init_args.batch_size": 2,
        "data.init_args.val_clips": 2,
        "export": "trained",
    }
    options = [f"--{key}={value}" for key, value in short.items()]
    cli.main(["fit", "--config", "aki-nano", *options])
    trained = mmzoo.load(str(tmp_path / "trained"))
    assert trained.ask(make_clip(0).frames, "how many objects are there", max_new_tokens=2).confidence > 0
    saved = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())
    assert saved["trainer"]["max_steps"] == 4
    cli.main(["fit", "--config", str(next(tmp_path.rglob("config.yaml"))), "--export=again"])
    first, second = (mmzoo.load(str(tmp_path / name)).state_dict() for name in ("trained", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_recipe_is_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmzoo"])
    cli.main(["validate", "--config", "aki-nano", "--data.init_args.val_clips=2", "--data.init_args.batch_size=2"])
    assert "val_accuracy" in capsys.readouterr().out


def test_an_unknown_recipe_names_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mmzoo"])
    with pytest.raises(InputError, match="Recipes: .*aki-nano"):
        cli.main(["fit", "--config", "aki-giga"])


def test_every_recipe_is_read_by_the_command_line() -> None:
    for path in cli.RECIPES.iterdir():
        if path.name.endswith(".yaml"):
            described = yaml.safe_load(path.read_text())
            assert described["model"]["init_args"]["name"] in mmzoo.list_models()


def test_a_data_set_without_template_is_an_error() -> None:
    with pytest.raises(InputError, match="'nothing'"):
        aki_sft.sft_text("nothing", {})


def test_captions_are_pretrained_whole(module: WorldQuestions) -> None:
    processor = module.model.processor
    batch = processor(
        aki_sft.pretraining_text(" red circle "), images=[torch.zeros(8, 8, 3).byte().numpy()], labels=True
    )
    words = processor.tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] != -100].tolist())
    assert words == ["<s>", "red", "circle", "<|endofchunk|>"]


def test_a_vsr_caption_is_cut_at_its_verb() -> None:
    row = {"image_link": "x/train2017/1.jpg", "caption": "The dish is under the table.", "label": 0}
    (example,) = aki_sft.vsr_sample(row, {"train": "T", "val": "V"})["examples"]
    assert example["question_interro"] == "Is the dish under the table?"


def test_the_learning_rate_stays_down() -> None:
    assert aki_sft.learning_rate(70_000, 2e-5, 1e-6, 150, 50_000) == pytest.approx(1e-6)


def test_layouts_of_rows_are_prompts_then_answers(module: WorldQuestions) -> None:
    batch = next(iter(batches(module)))
    layout = TokenLayout(batch["layout"])
    assert torch.equal(layout.role[layout.valid] == 1, (batch["labels"] != -100)[layout.valid])
