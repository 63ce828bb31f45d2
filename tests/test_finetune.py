"""Finetune, exact resume, checkpoint files, recipes."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

import mmzoo
from mmzoo.errors import CheckpointError, InputError
from mmzoo.layout import TokenLayout, pack
from mmzoo.world import make_clip, write_clip
from mmzoo_training import callbacks, cli, finetune
from mmzoo_training.callbacks import ExactResume, LossTrace, SampleAnswers, Throughput
from mmzoo_training.finetune import Finetune, Part
from mmzoo_training.world import WorldQuestions

QUESTIONS = [
    ("how many objects are there", "two"),
    ("which colour appears first", "red"),
    ("which colour hits", "blue"),
]
CONNECTORS = {"aki-tiny": "vision_tokenizer", "cca-llava-tiny": "mm_projector", "video-ccam-tiny": "projector"}


def batch_of(processor: Any, seed: int) -> dict[str, Any]:
    """Two rows about an image each, from two sources."""
    rng = np.random.default_rng(seed)
    images = [[rng.integers(0, 255, (32, 32, 3), np.uint8)] for _ in range(2)]
    picked = [QUESTIONS[seed % 3], QUESTIONS[(seed + 1) % 3]]
    text = [
        processor.prompt(question, "<image>") + f" {answer} {processor.tokenizer.eos_token}"
        for question, answer in picked
    ]
    batch = processor(text, images=images, padding_side="right", labels=True)
    return {**batch, "source": [answer for _, answer in picked]}


class Loader:
    """Batches in an order that is a function of seed and epoch, and can be taken up anywhere."""

    def __init__(self, batches: list[dict[str, Any]]):
        self.batches, self.epoch, self.given = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.given == len(self):
            self.epoch, self.given = self.epoch + 1, 0
        return self.rest(torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def rest(self, order: list[int]) -> Iterator[dict[str, Any]]:
        while self.given < len(self):
            self.given += 1
            yield self.batches[order[self.given - 1]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.given = state["epoch"], state["given"]


class Noisy(Finetune):
    """Each generator has a say in the loss."""

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        return loss * (1 + torch.rand(()) + np.random.rand() + np.random.randn() + random.random())


def trainer(folder: Path, *extra: lightning.Callback, **options: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False}
    return lightning.Trainer(
        **{**quiet, "enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 3, **options},
        default_root_dir=folder,
        callbacks=[ExactResume(), *extra],
    )


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    processor = mmzoo.create("cca-llava-tiny").processor
    return [batch_of(processor, seed) for seed in range(4)]


class SaveEach(lightning.Callback):
    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.fit_loop.total_batch_idx}.ckpt")

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"validated{trainer.fit_loop.total_batch_idx}.ckpt")


def fit(
    folder: Path, name: str, batches: list[dict[str, Any]], *extra: lightning.Callback, resume: Path | None = None
) -> tuple[dict[str, str], Finetune]:
    lightning.seed_everything(3, verbose=False)
    module = Noisy("cca-llava-tiny", None, lr=1e-2, warmup_steps=2, weight_decay=0.1)
    random.seed(hash(name))  # a resumed process has drawn other numbers by now
    ema, trace = EMAWeightAveraging(decay=0.9), LossTrace(str(folder / name))
    run = trainer(folder, ema, trace, *extra, accumulate_grad_batches=3, val_check_interval=2)
    run.fit(module, Loader(batches), Loader(batches[:1]), ckpt_path=resume)
    return dict(line.split() for line in (folder / name).read_text().splitlines()), module


def test_a_run_resumed_at_any_batch_gives_the_same_bits(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    """Within an epoch, at its end, between optimizer steps, and where a validation follows."""
    losses, whole = fit(tmp_path, "whole", batches, SaveEach(tmp_path))
    assert len(losses) == 12
    # An epoch has 4 batches: it steps after the third and the fourth, and is validated after the second and the fourth.
    cuts = ["0", "2", "3", "4", "9", "validated1", "validated3"]
    for cut in cuts:
        again, module = fit(tmp_path, f"from{cut}", batches, resume=tmp_path / f"{cut}.ckpt")
        number = int(cut.removeprefix("validated"))
        assert again == {step: loss for step, loss in losses.items() if int(step) > number}, cut
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters(), strict=True)), cut
        waiting = number % 4 in (0, 1)  # an epoch's last batch steps too
        assert ("gradients" in torch.load(tmp_path / f"{cut}.ckpt", weights_only=True)[callbacks.RESUME]) == waiting


@given(seed=st.integers(0, 2**32 - 1), draws=st.integers(0, 5))
def test_random_states_come_back(seed: int, draws: int) -> None:
    def draw() -> list[float]:
        return [float(torch.randn(())), np.random.randn(), random.gauss(0, 1), random.random(), np.random.rand()]

    lightning.seed_everything(seed, verbose=False)
    for _ in range(draws):
        random.gauss(0, 1), np.random.randn()
    cpu = torch.device("cpu")
    saved = callbacks.as_tensors(callbacks.random_state(cpu))
    first = draw()
    callbacks.set_random_state(callbacks.from_tensors(saved), cpu)
    assert draw() == first


def small_checkpoint(folder: Path, batches: list[dict[str, Any]], name: str = "1.ckpt", **options: Any) -> Path:
    module = Finetune("cca-llava-tiny", None, **options)
    run = trainer(folder, max_epochs=1, limit_train_batches=1)
    run.fit(module, Loader(batches))
    run.save_checkpoint(folder / name)
    return folder / name


def test_the_latest_valid_checkpoint_is_found(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    assert callbacks.latest_checkpoint(tmp_path / "nothing") is None
    good = small_checkpoint(tmp_path, batches)
    whole = good.read_bytes()
    entries = torch.load(good, weights_only=True)
    for name, step in {"flipped": 7, "cut": 8, "weights": 9}.items():
        torch.save({**entries, "global_step": step}, tmp_path / f"{name}.ckpt")
    flipped = bytearray((tmp_path / "flipped.ckpt").read_bytes())
    at = flipped.find(entries["state_dict"]["model.mm_projector.0.weight"].numpy().tobytes()[:64])
    flipped[at + 5] ^= 1
    (tmp_path / "flipped.ckpt").write_bytes(flipped)
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}, "global_step": 9}, tmp_path / "weights.ckpt")
    (tmp_path / ".last.ckpt.x1").write_bytes(whole[:100])
    with pytest.warns(UserWarning) as said:
        assert callbacks.latest_checkpoint(tmp_path) == good
    text = "\n".join(str(one.message) for one in said)
    assert all(name in text for name in ("flipped.ckpt", "cut.ckpt", "weights.ckpt", ".last.ckpt.x1"))
    assert "1.ckpt" not in text
    for name in ("flipped", "cut", "nothing"):
        with pytest.raises(CheckpointError, match=f"{name}.ckpt"):
            trainer(tmp_path).fit(
                Finetune("cca-llava-tiny", None), Loader(batches), ckpt_path=tmp_path / f"{name}.ckpt"
            )


def test_a_sharded_checkpoint_counts_when_it_was_written_to_its_end(tmp_path: Path) -> None:
    for name, step in {"half": 9, "whole": 4}.items():
        (tmp_path / f"{name}.ckpt").mkdir()
        torch.save({"global_step": step}, tmp_path / f"{name}.ckpt" / "meta.pt")
    (tmp_path / "whole.ckpt" / ".metadata").touch()
    with pytest.warns(UserWarning, match="half.ckpt"):
        assert callbacks.latest_checkpoint(tmp_path) == tmp_path / "whole.ckpt"


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    path = small_checkpoint(tmp_path, batches)
    before = path.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="Earlier ones are intact"):
            callbacks.CheckpointFiles().save_checkpoint(torch.load(path, weights_only=True), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert callbacks.latest_checkpoint(tmp_path) == path
    assert [one.name for one in tmp_path.iterdir() if "ckpt" in one.name] == ["1.ckpt"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    path = small_checkpoint(tmp_path, batches)
    with pytest.raises(CheckpointError, match="(?s)of another model.*missing: model.llm"):
        trainer(tmp_path).fit(Finetune("video-ccam-tiny", None), Loader(batches), ckpt_path=path)
    connector = Finetune("cca-llava-tiny", None, train=["mm_projector"])
    with pytest.raises(CheckpointError, match="trains other parts"):
        trainer(tmp_path).fit(connector, Loader(batches), ckpt_path=path)


def test_frozen_parameters_need_not_be_saved(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    mmzoo.hub.save(mmzoo.create("cca-llava-tiny"), tmp_path / "start")
    losses = {}
    for save_frozen in (True, False):
        module = Finetune(str(tmp_path / "start"), train=["mm_projector"], save_frozen=save_frozen, lr=1e-2)
        trace = LossTrace(str(tmp_path / f"trace{save_frozen}"))
        run = trainer(tmp_path, trace, EMAWeightAveraging(decay=0.5), max_epochs=1)
        run.fit(module, Loader(batches))
        run.save_checkpoint(tmp_path / f"{save_frozen}.ckpt")
        module = Finetune(str(tmp_path / "start"), train=["mm_projector"], save_frozen=save_frozen, lr=1e-2)
        run = trainer(tmp_path, trace, EMAWeightAveraging(decay=0.5), max_epochs=2)
        run.fit(module, Loader(batches), ckpt_path=tmp_path / f"{save_frozen}.ckpt")
        losses[save_frozen] = (tmp_path / f"trace{save_frozen}").read_text()
    assert losses[True] == losses[False]
    assert losses[True].count("\n") == 8
    saved = torch.load(tmp_path / "False.ckpt", weights_only=True)["state_dict"]
    assert all("mm_projector" in name for name in saved)
    with pytest.raises(InputError, match="save_frozen"):
        Finetune("cca-llava-tiny", None, save_frozen=False)


@pytest.mark.parametrize("name", CONNECTORS)
def test_only_what_is_named_trains(name: str) -> None:
    module = Finetune(name, None, train=[CONNECTORS[name], r"\w+\.model\.layers\.1\."])
    batch = batch_of(module.model.processor, 0)
    losses, asked = module.token_losses(batch)
    (losses.sum() / asked.sum()).backward()
    with_gradient = {name for name, parameter in module.model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in with_gradient} == {CONNECTORS[name], name_of_language(module)}
    assert all(".layers.1." in one or one.startswith(CONNECTORS[name]) for one in with_gradient)


def name_of_language(module: Finetune) -> str:
    return next(name for name, one in module.model.named_children() if one is module.model.language_model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train": ["vision_towel"]}, "'vision_towel' matches no parameter"),
        ({"train": ["("]}, "no regular expression"),
        ({"train": ["mm"], "lora": {"r": 2}}, "train or lora"),
        ({"lora": {"rank": 2}}, "rank"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "not both"),
        ({"fresh": [".*"]}, "fresh"),
    ],
)
def test_options_that_do_not_fit_are_errors(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Finetune("cca-llava-tiny", None, **options)


def test_every_parameter_is_in_one_group_at_its_own_rate() -> None:
    module = Finetune(
        "cca-llava-tiny",
        None,
        train=["mm_projector", "lang_model"],
        lr=1e-3,
        lr_factors={"mm_projector": 0.1, "lang_model.lm_head": 2.0},
        weight_decay=0.5,
        no_decay=[r"lang_model\.model\.embed_tokens"],
    )
    names = {id(parameter): name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    seen = []
    for group in module.parameter_groups():
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            factor = 0.1 if name.startswith("mm_projector") else 2.0 if "lm_head" in name else 1.0
            assert group["lr"] == pytest.approx(1e-3 * factor)
            assert group["weight_decay"] == (0.0 if "embed_tokens" in name else 0.5)
    assert sorted(seen) == sorted(names.values())
    module.lr_factors = {"lang_modle": 1.0}
    with pytest.raises(InputError, match="lr_factors"):
        module.parameter_groups()


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        return [finetune.schedule_factor(schedule, step, 0.1, 4, 12) for step in range(14)]

    for schedule in ("cosine", "linear", "constant"):
        assert rates(schedule)[:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    assert rates("linear")[4:] == pytest.approx([1 - 0.9 * i / 8 for i in range(9)] + [0.1])
    assert rates("cosine")[8] == pytest.approx(0.55)
    assert rates("cosine")[12:] == pytest.approx([0.1, 0.1])
    assert rates("constant")[4:] == [1.0] * 10


def test_the_loss_is_the_mean_over_answer_tokens(batches: list[dict[str, Any]]) -> None:
    module = Finetune("cca-llava-tiny", None)
    for batch in batches:
        losses, asked = module.token_losses(batch)
        expected = module.model(**module.inputs(batch), labels=batch["labels"]).loss
        torch.testing.assert_close(losses.sum() / asked.sum(), expected)
        sources = finetune.by_source(batch, losses.detach(), asked)
        assert sum(count for _, count in sources.values()) == int(asked.sum())
        for row, source in enumerate(batch["source"]):
            assert sources[source][0] == pytest.approx(float(losses[row].sum() / asked[row].sum()), rel=1e-5)


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """The rows of a batch as samples of one row."""
    layout = TokenLayout(batch["layout"])
    rows = [layout.valid[row].nonzero()[:, 0] for row in range(len(layout.data))]
    joined = pack([TokenLayout(layout.data[row : row + 1, where]) for row, where in enumerate(rows)])
    flat = {
        name: torch.cat([batch[name][row, where] for row, where in enumerate(rows)])[None]
        for name in ("input_ids", "labels")
    }
    media = {"pixel_values": batch["pixel_values"].flatten(0, 1)[None]}
    if "num_frames" in batch:
        media["num_frames"] = batch["num_frames"].flatten()[None]
    return {**flat, **media, "layout": joined.data, "source": batch["source"]}


@pytest.mark.parametrize("name", CONNECTORS)
def test_samples_in_one_row_are_told_apart(name: str) -> None:
    module = Finetune(name, None)
    module.eval()
    batch = batch_of(module.model.processor, 1)
    together = packed(batch)
    with torch.no_grad():
        apart = finetune.by_source(batch, *module.token_losses(batch))
        joined = finetune.by_source(together, *module.token_losses(together))
    assert joined.keys() == apart.keys()
    for source, (loss, count) in apart.items():
        assert joined[source] == (pytest.approx(loss, rel=1e-4), count)
    said = [
        finetune.answers(module.model, module.inputs(one), one["labels"], max_new_tokens=4) for one in (batch, together)
    ]
    assert said[0] == said[1]
    assert [one["right"] for one in said[0]] == batch["source"]
    for asked, (question, _) in zip(said[0], (QUESTIONS[1], QUESTIONS[2]), strict=True):
        assert question in asked["question"]
    with pytest.raises(InputError, match="source names 3"):
        finetune.by_source({**together, "source": ["a"] * 3}, *module.token_losses(together))


def test_lora_trains_exports_and_loads_as_an_adapter(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    from peft import PeftModel

    mmzoo.hub.save(mmzoo.create("cca-llava-tiny"), tmp_path / "start")
    lora = {"r": 2, "lora_alpha": 4, "modules_to_save": ["mm_projector"]}
    module = Finetune(str(tmp_path / "start"), lora=lora, lr=1e-2, save_frozen=False)
    trained = {name for name in module.trained_names() if "lora_" not in name}
    assert trained
    assert all("mm_projector.modules_to_save" in name for name in trained)
    assert not any("vision_tower" in name or "lm_head" in name for name in module.trained_names())
    trainer(tmp_path, max_epochs=2).fit(module, Loader(batches))
    module.eval()
    with torch.no_grad():
        expected = module.token_losses(batches[0])[0]
    module.export_adapter(tmp_path / "adapter")
    module.export(tmp_path / "merged")
    start, merged = mmzoo.load(str(tmp_path / "start")), mmzoo.load(str(tmp_path / "merged"))
    adapted = PeftModel.from_pretrained(mmzoo.load(str(tmp_path / "start")), tmp_path / "adapter").base_model.model
    changed = {name for name, x in merged.state_dict().items() if not torch.equal(x, start.state_dict()[name])}
    assert any("q_proj" in name for name in changed)
    assert any("mm_projector" in name for name in changed)
    for model in (merged, adapted):
        module.model = model.eval()
        with torch.no_grad():
            torch.testing.assert_close(module.token_losses(batches[0])[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="no adapter"):
        module.export_adapter(tmp_path / "again")


def test_checkpointed_activations_give_the_same_gradients(batches: list[dict[str, Any]]) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = Finetune("cca-llava-tiny", None, gradient_checkpointing=checkpointing)
        assert module.model.language_model.model.gradient_checkpointing == checkpointing
        module.token_losses(batches[0])[0].sum().backward()
        gradients.append([p.grad for p in module.model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_language_model_is_compiled_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *args, **options: compiled.append(module))
    module = Finetune("cca-llava-tiny", None, compile=True)
    assert compiled == [module.model.language_model]


def test_bf16_trains(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    module = Finetune("cca-llava-tiny", None, lr=1e-2)
    before = module.model.mm_projector[0].weight.clone()
    trainer(tmp_path, precision="bf16-mixed", max_epochs=1).fit(module, Loader(batches))
    assert module.model.mm_projector[0].weight.dtype == torch.float32
    assert not torch.equal(before, module.model.mm_projector[0].weight)


def bases(folder: Path, name: str) -> tuple[Any, dict[str, Part], str]:
    """The language model and the tower of a model of this name, saved as others save theirs."""
    source = mmzoo.create(name)
    language = next(key for key, one in source.named_children() if one is source.language_model)
    source.language_model.save_pretrained(folder / "text")
    described = json.loads((folder / "text" / "config.json").read_text())
    (folder / "text" / "config.json").write_text(json.dumps({**described, "dtype": "bfloat16", "rms_norm_eps": 0.125}))
    tower = {f"vision_model.{key}": x for key, x in source.vision_tower.state_dict().items()}
    (folder / "tower").mkdir()
    source.config.vision_config.save_pretrained(folder / "tower")
    from safetensors.torch import save_file

    save_file({**tower, "text_model.other": torch.zeros(1)}, folder / "tower" / "model.safetensors")
    parts = {language: Part(str(folder / "text")), "vision_tower": Part(str(folder / "tower"), "vision_model.")}
    return source, parts, language


def test_a_new_model_starts_from_parts(tmp_path: Path) -> None:
    source, parts, language = bases(tmp_path, "cca-llava-tiny")
    module = Finetune("cca-llava-tiny", parts=parts, fresh=["mm_projector"])
    for key, x in module.model.state_dict().items():
        same = torch.equal(x, source.state_dict()[key])
        assert same != key.startswith("mm_projector") or key.endswith("bias"), key
        assert x.dtype == torch.float32
    assert module.model.config.text_config.rms_norm_eps == 0.125
    with pytest.raises(CheckpointError, match="missing: mm_projector"):
        Finetune("cca-llava-tiny", parts=parts)
    with pytest.raises(CheckpointError, match="missing: vision_tower"):
        Finetune("cca-llava-tiny", parts={**parts, "vision_tower": Part(str(tmp_path / "tower"))}, fresh=["mm_proj"])
    with pytest.raises(InputError, match="no part 'tower'"):
        Finetune("cca-llava-tiny", parts={"tower": parts["vision_tower"]}, fresh=[".*"])
    rows = source.config.text_config.vocab_size
    grown = {"config": {"text_config": {"vocab_size": rows + 3}}, "parts": parts}
    with pytest.raises(CheckpointError, match="misshapen: lang_model.lm_head.weight"):
        Finetune("cca-llava-tiny", **grown, fresh=["mm_projector"])
    tables = [rf"{language}\.lm_head\.weight", rf"{language}\.model\.embed_tokens"]
    table = Finetune("cca-llava-tiny", **grown, fresh=["mm_projector", *tables]).model.get_input_embeddings().weight
    assert len(table) == rows + 3
    assert torch.equal(table[:rows], source.get_input_embeddings().weight)


def test_a_processor_comes_from_a_checkpoint_of_the_family(tmp_path: Path) -> None:
    mmzoo.hub.save(mmzoo.create("cca-llava-tiny"), tmp_path / "saved")
    module = Finetune("cca-llava-tiny", None, processor=str(tmp_path / "saved"))
    assert module.model.processor.answer_marker == "<|assistant|>"
    mmzoo.hub.save(mmzoo.create("aki-tiny"), tmp_path / "other")
    with pytest.raises(CheckpointError, match="no processor for cca-llava-tiny"):
        Finetune("cca-llava-tiny", None, processor=str(tmp_path / "other"))


def test_losses_of_sources_answers_and_throughput_are_logged(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    from lightning.pytorch.loggers import CSVLogger

    module = Finetune("cca-llava-tiny", None)
    logger = CSVLogger(tmp_path)
    run = trainer(
        tmp_path,
        SampleAnswers(count=3, max_new_tokens=3),
        Throughput(2),
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1,
    )
    run.fit(module, Loader(batches), Loader(batches[:2]))
    head = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"loss", "loss/red", "loss/two", "val_loss", "val_loss/red", "train/device/items_per_sec"}
    assert wanted | {"train/device/samples_per_sec"} <= set(head)
    said = [json.loads(line) for line in (Path(logger.log_dir) / "answers.jsonl").read_text().splitlines()]
    assert [one["right"] for one in said] == batches[0]["source"]
    assert said[0]["step"] == 4
    assert (Path(logger.log_dir) / "mask.png").stat().st_size > 0
    assert (Path(logger.log_dir) / "attention-4.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["aki-nano", "cca-nano", "video-ccam-nano", "visualchat-nano"])
def test_frames_are_drawn_as_they_were_shown(name: str) -> None:
    processor, frames = mmzoo.create(name).processor, make_clip(0).frames
    shown = callbacks.frames_of(processor, processor.ask("how many", video=frames)["pixel_values"])
    assert np.array_equal(shown, frames)


def logged_run(folder: Path, logger: Any, batches: list[dict[str, Any]]) -> None:
    run = trainer(folder, SampleAnswers(2, 3), logger=logger, log_every_n_steps=1, max_epochs=2)
    run.fit(Finetune("cca-llava-tiny", None, lr=1e-2), Loader(batches), Loader(batches[:1]))


def test_tensorboard_shows_losses_answers_and_where_they_looked(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    logged_run(tmp_path, logger, batches)
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert {"loss", "loss/red", "val_loss"} <= set(events.Tags()["scalars"])
    assert [one.step for one in events.Images("attention")] == [4, 8]
    said = events.Tensors("answers/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(f"({right})" in said for right in batches[0]["source"])


def test_wandb_keeps_answers_and_where_they_looked(tmp_path: Path, batches: list[dict[str, Any]]) -> None:
    wandb = pytest.importorskip("wandb")
    logged_run(tmp_path, WandbLogger(save_dir=tmp_path, offline=True), batches)
    wandb.finish()
    assert len([*tmp_path.rglob("media/images/attention*.png")]) == 2
    tables = [json.loads(path.read_text()) for path in tmp_path.rglob("media/table/answers*.json")]
    assert [[row[2] for row in table["data"]] for table in tables] == [batches[0]["source"]] * 2


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mmzoo"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.main([*arguments, "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"])


SHORT = [
    "--data.init_args.batch_size=2",
    "--data.init_args.val_clips=2",
    "--data.init_args.describe_clips=2",
    "--data.init_args.questions_per_clip=2",
]


NANO = ["aki-nano", "cca-nano", "tc-llava-nano", "video-ccam-nano", "visualchat-nano", "favor-nano"]


@pytest.mark.parametrize("name", NANO)
def test_every_nano_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1"]
    steps += ["--model.init_args.describe_steps=1", "--trainer.logger=lightning.pytorch.loggers.CSVLogger"]
    steps += ["--trainer.logger.save_dir=run"]
    run_cli(monkeypatch, "fit", "--config", name, *SHORT, *steps, "--export=trained")
    (metrics,) = tmp_path.rglob("metrics.csv")
    head, *rows = metrics.read_text().splitlines()
    column = head.split(",").index("answer_loss")
    losses = [float(value) for row in rows if (value := row.split(",")[column])]
    assert len(losses) >= 2
    assert np.isfinite(losses).all()
    assert "val_accuracy" in head
    assert mmzoo.load("trained").processor is not None
    assert len([*tmp_path.rglob("attention-3.png")]) == 1
    (answers,) = tmp_path.rglob("answers.jsonl")
    assert json.loads(answers.read_text().splitlines()[0])["question"]


def test_tokens_that_do_not_stand_on_that_grid_are_refused() -> None:
    with pytest.raises(InputError, match="4 tokens, which do not stand on a grid of 3 x 3"):
        WorldQuestions("visualchat-nano", token_grid=3)


def test_a_cut_run_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callback = "--trainer.callbacks+=mmzoo_training.callbacks.LossTrace"
    common = ["fit", "--config", "aki-nano", *SHORT, "--model.init_args.describe_steps=2", "--resume=auto"]
    common += ["--trainer.val_check_interval=2"]
    saving = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    saving += ["--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_last=true"]

    def go(steps: int, folder: str) -> dict[str, str]:
        trace = f"{folder}.txt"
        run_cli(
            monkeypatch,
            *common,
            *saving,
            callback,
            f"--trainer.callbacks.path={trace}",
            f"--trainer.max_steps={steps}",
            f"--trainer.default_root_dir={folder}",
        )
        return dict(line.split() for line in Path(trace).read_text().splitlines())

    whole = go(5, "whole")
    go(3, "cut")
    assert go(5, "cut") == whole
    assert len(Path("cut.txt").read_text().splitlines()) == 5


def test_test_and_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run_cli(monkeypatch, "test", "--config", "aki-nano", *SHORT)
    assert "test_accuracy" in capsys.readouterr().out
    one = ["--data.init_args.batch_size=1", "--data.init_args.val_clips=1"]
    run_cli(monkeypatch, "predict", "--config", "aki-nano", *one, "--output=said.jsonl")
    said = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    asked = make_clip(0, split="test").questions
    assert [one["right"] for one in said] == [question.answer for question in asked]
    assert all(question.text in one["question"] for question, one in zip(asked, said, strict=True))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.init_args.lrr=3", "lrr"),
        ("--model.init_args.lr=fast", "float"),
        ("--trainer.max_stepz=3", "max_stepz"),
        ("--resume=maybe", "maybe"),
    ],
)
def test_a_wrong_configuration_is_an_error(option: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=said):
        run_cli(monkeypatch, "fit", "--config", "aki-nano", option)


def test_an_unknown_key_of_a_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = yaml.safe_load(Path(cli.recipe("aki-nano")).read_text())
    described["trainer"]["max_stepz"] = 3
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(InputError, match="max_stepz"):
        run_cli(monkeypatch, "fit", "--config", str(tmp_path / "mine.yaml"))


PAPERS = [path for path in cli.RECIPES.iterdir() if "mmzoo_training.data.RecordData" in path.read_text()]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_a_papers_recipe_names_what_there_is(path: Path) -> None:
    """Expressions match parameters of the model at its real size, which has no memory on the meta device."""
    described = yaml.safe_load(path.read_text())["model"]
    options = described["init_args"]
    config = {key: value for key, value in options.get("config", {}).items() if key != "text_config"}
    model = mmzoo.create(options["name"], device="meta", **config)
    names = [name for name, _ in model.named_parameters()]
    modules = dict(model.named_modules())
    for option in ("train", "fresh", "no_decay"):
        finetune.check_patterns(options.get(option, []), names, option)
    assert options.get("parts", {}).keys() <= {*modules, *names}
    lora = options.get("lora", {})
    assert {one for one in lora.get("modules_to_save", [])} <= modules.keys()
    if isinstance(target := lora.get("target_modules"), str):
        assert any(re.fullmatch(target, name) for name in modules)
    module, _, kind = described["class_path"].rpartition(".")
    own = getattr(importlib.import_module(module), kind).__init__.__annotations__
    assert options.keys() <= {*own, *Finetune.__init__.__annotations__}


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_a_papers_recipe_is_read_by_the_command_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmzoo_training.data")
    seen = []
    monkeypatch.setattr(cli.RecipeCLI, "instantiate_classes", lambda self: seen.append(self.config))
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    run_cli(monkeypatch, "fit", "--config", str(path), "--data.init_args.sources=[{path: mine.json, format: llava}]")
    assert seen[0].fit.model.class_path == yaml.safe_load(path.read_text())["model"]["class_path"]


class Clips(lightning.LightningDataModule):
    """A data module as a user might write one; it knows nothing of the world's options."""

    def __init__(self, count: int = 2):
        super().__init__()
        self.count = count

    def train_dataloader(self) -> Loader:
        processor = self.trainer.lightning_module.model.processor
        return Loader([batch_of(processor, seed) for seed in range(self.count)])

    val_dataloader = train_dataloader


def test_ones_own_clips_train_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A YAML file of one's own, with a folder and one json; the run's saved configuration runs it again."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    write_clip(make_clip(0), Path("clips/0.mp4"))
    turns = [{"from": "human", "value": "<video>\nhow many objects are there"}, {"from": "gpt", "value": "two"}]
    Path("clips/all.json").write_text(json.dumps([{"id": i, "video": "0.mp4", "conversations": turns} for i in "01"]))
    described = {
        "trainer": {"accelerator": "cpu", "max_steps": 2, "default_root_dir": "run", "num_sanity_val_steps": 0},
        "model": {
            "class_path": "mmzoo_training.finetune.Finetune",
            "init_args": {"name": "video-ccam-tiny", "weights": None, "lr": 0.01},
        },
        "data": {
            "class_path": "mmzoo_training.data.RecordData",
            "init_args": {"sources": [{"path": "clips"}], "val_sources": [{"path": "clips"}], "max_tokens": 64},
        },
    }
    described["trainer"]["callbacks"] = [{"class_path": "mmzoo_training.callbacks.SampleAnswers"}]
    Path("mine.yaml").write_text(yaml.safe_dump(described))
    run_cli(monkeypatch, "fit", "--config=mine.yaml", "--export=trained")
    assert mmzoo.load("trained").processor is not None
    (saved,) = tmp_path.rglob("config.yaml")
    said = [json.loads(line) for line in next(tmp_path.rglob("answers.jsonl")).read_text().splitlines()]
    assert {one["right"] for one in said} == {"two"}
    run_cli(monkeypatch, "fit", "--config", str(saved), "--trainer.default_root_dir=again")
    assert [*Path("again").rglob("attention-*.png")]


def test_ones_own_data_trains_lora_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mmzoo.hub.save(mmzoo.create("cca-llava-tiny"), tmp_path / "start")
    described = {
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": "run", "log_every_n_steps": 1},
        "model": {
            "class_path": "mmzoo_training.finetune.Finetune",
            "init_args": {
                "name": str(tmp_path / "start"),
                "lora": {"r": 2, "modules_to_save": ["mm_projector"]},
                "save_frozen": False,
            },
        },
        "data": {"class_path": f"{__name__}.Clips"},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(described))
    run_cli(monkeypatch, "fit", "--config=mine.yaml", "--export=merged", "--export_adapter=adapter")
    assert Path("adapter/adapter_config.json").is_file()
    assert not any("lora" in name for name in mmzoo.load("merged").state_dict())
    (saved,) = tmp_path.rglob("config.yaml")
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    run_cli(monkeypatch, "validate", "--config", str(saved), f"--ckpt_path={checkpoint}")
    with pytest.raises(InputError, match="not both"):
        run_cli(monkeypatch, "fit", "--config", str(saved), f"--ckpt_path={checkpoint}", "--resume=auto")
    with pytest.raises(InputError, match="WorldQuestions has no export_adapter"):
        run_cli(monkeypatch, "fit", "--config", "aki-nano", "--export_adapter=adapter")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_killed_runs_go_on_bit_for_bit(accumulate: int, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    paths = [str(root), *(str(root / name) for name in ("kernels", "training", "eval"))]
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / "kill_and_resume.py"), "--kills=2", "--steps=12"]
        + [f"--accumulate={accumulate}", f"--keep={tmp_path / 'runs'}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every loss has the bits" in done.stdout
