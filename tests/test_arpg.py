"""ARPG: layouts, schedules, decoding with a cache against recomputation, the tokenizer, and the authors' files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmzoo
from mmzoo.attention import allowed
from mmzoo.errors import CheckpointError, InputError
from mmzoo.generating import generate
from mmzoo.media import read_video
from mmzoo.models import arpg
from mmzoo.models.arpg import ARPG, decoded_per_step, layouts, rotate, rotation


def a_model(seed: int = 0, **overrides: int) -> ARPG:
    """A tiny model whose weights are large enough for every token to matter."""
    torch.manual_seed(seed)
    model = mmzoo.create("arpg-tiny", **overrides)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> ARPG:
    return a_model()


@pytest.fixture(scope="module")
def tokenizer(model: ARPG) -> VQModel:
    return arpg.example_options(model)["tokenizer"]


def test_content_and_targets_are_laid_out_in_the_order_of_prediction() -> None:
    orders = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    content, targets = layouts(orders, 2)
    assert content.row.tolist() == [[-1, 1, 0, 1], [-1, 0, 0, 1]]
    assert content.column.tolist() == [[-1, 0, 0, 1], [-1, 0, 1, 0]]
    assert (targets.row * 2 + targets.column).tolist() == orders.tolist()
    causal = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    rule = mmzoo.create("arpg-tiny").rule
    assert torch.equal(allowed(rule, content), causal)
    assert torch.equal(allowed(rule, targets, content), causal)


def test_within_a_step_all_see_each_other_and_targets_see_what_was_read() -> None:
    content, targets = layouts(torch.arange(9)[None], 3, [2, 3, 4])
    read = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3])  # the class, then each code one step after its prediction
    predicted = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    rule = mmzoo.create("arpg-tiny").rule
    assert torch.equal(allowed(rule, content)[0], read[:, None] >= read)
    assert torch.equal(allowed(rule, targets, content)[0], predicted[:, None] >= read)


@given(st.integers(1, 300), st.data(), st.sampled_from(["arccos", "cosine"]))
def test_each_step_predicts_something_and_all_together_everything(num_codes: int, data: st.DataObject, name: str):
    steps = data.draw(st.integers(1, num_codes))
    counts = decoded_per_step(num_codes, steps, name)
    assert len(counts) == steps and sum(counts) == num_codes and min(counts) >= 1


def test_schedules_by_their_formulas() -> None:
    t = np.arange(1, 64) / 64
    for name, kept in {"arccos": 2 / np.pi * np.arccos(t), "cosine": np.cos(np.pi / 2 * t)}.items():
        left = [256]
        for count in (256 * kept).astype(int):
            left.append(min(count, left[-1] - 1))
        assert decoded_per_step(256, 64, name) == [a - b for a, b in zip(left, [*left[1:], 0])]
    assert decoded_per_step(16, 5) == [3, 2, 2, 3, 6]
    with pytest.raises(InputError, match="1 to 16 steps, not in 17"):
        decoded_per_step(16, 17)
    with pytest.raises(InputError, match="arccos, cosine, not 'linear'"):
        decoded_per_step(16, 4, "linear")


def test_a_rotation_tells_how_far_apart_rows_and_columns_are() -> None:
    _, targets = layouts(torch.arange(16)[None], 4)
    turned = rotation(targets, 8, 100.0)
    torch.manual_seed(0)
    query, key = (rotate(torch.randn(8).expand(1, 16, 1, 8), turned)[0, :, 0] for _ in range(2))
    scores = (query @ key.T).view(4, 4, 4, 4)  # [row, column, row, column]
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1])
    same, right, below = scores[0, 0, 0, 0], scores[0, 0, 0, 1], scores[0, 0, 1, 0]
    assert min((same - right).abs(), (same - below).abs(), (right - below).abs()) > 1e-2
    content, _ = layouts(torch.arange(16)[None], 4)
    assert not rotate(torch.randn(1, 16, 1, 8), rotation(content, 8, 100.0))[0, 0].any()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 16), st.sampled_from([1.0, 3.5]), st.sampled_from(["sdpa", "eager"]), st.integers(0, 99))
def test_cached_decoding_equals_one_pass_under_the_rule(steps: int, scale: float, attention: str, seed: int) -> None:
    model, labels = a_model(seed % 3), torch.tensor([1, 4])
    model.set_attention(attention)
    order = torch.rand(16, generator=torch.Generator().manual_seed(seed)).argsort()
    made = list(model.decode(labels, steps=steps, guidance_scale=scale, order=order, generator=torch.Generator()))
    codes = torch.empty(2, 16, dtype=torch.long)
    for step in made:
        codes[:, step.places] = step.codes
    rows = 2 if scale == 1 else 4
    labels = torch.cat([labels, torch.full((rows - 2,), 5)])
    with torch.no_grad():
        counts = [len(step.places) for step in made]
        whole = model(codes.repeat(rows // 2, 1), labels, order.expand(rows, -1), counts)
    assert (torch.cat([step.logits for step in made], 1) - whole).abs().max() <= 5e-6


def test_nothing_is_seen_before_its_time(model: ARPG) -> None:
    torch.manual_seed(1)
    batch = arpg.example_inputs(model, 1)
    before = model(**batch)
    for place in range(16):
        other = batch["codes"].clone()
        other[0, batch["orders"][0, place]] = (other[0, batch["orders"][0, place]] + 1) % 32
        changed = (model(other, batch["class_labels"], batch["orders"]) != before).any(-1)[0].tolist()
        assert changed == [i > place for i in range(16)]


def test_tokens_are_predicted_from_their_places(model: ARPG) -> None:
    """The same content, but another place for the last target: only its logits change."""
    torch.manual_seed(1)
    batch = arpg.example_inputs(model, 1)
    orders, codes = batch["orders"].clone(), batch["codes"].clone()
    last, before = orders[0, -1].clone(), orders[0, -2].clone()
    orders[0, -2:] = torch.stack([last, before])
    codes[0, [last, before]] = codes[0, [before, last]]
    changed = (model(codes, batch["class_labels"], orders) != model(**batch)).any(-1)[0]
    assert changed.tolist() == [False] * 14 + [True, True]


def test_rows_of_the_embedding_are_codes_mask_classes_and_no_class(model: ARPG) -> None:
    codes, orders = torch.arange(16)[None] + 7, torch.arange(16)[None]
    for label, row in ((0, 33), (4, 37), (5, 38)):
        model.zero_grad()
        model(codes, torch.tensor([label]), orders).square().sum().backward()
        read = model.embeddings.weight.grad.any(-1).nonzero().flatten().tolist()
        assert read == [*range(7, 22), 32, row]  # the last code is not read


def test_codes_are_put_where_their_targets_were(model: ARPG) -> None:
    def options() -> dict[str, Any]:
        return {"steps": 6, "temperature": 5.0, "generator": torch.Generator().manual_seed(0)}

    made, placed = model.generate(torch.tensor([3]), **options())[0].tolist(), {}
    for step in model.decode(torch.tensor([3]), **options()):
        placed.update(zip(step.places.tolist(), step.codes[0].tolist()))
    assert [placed[place] for place in range(16)] == made and len(set(made)) > 3


def test_images_of_a_batch_are_those_made_one_by_one(model: ARPG) -> None:
    options = {"steps": 6, "top_k": 1, "order": torch.randperm(16, generator=torch.Generator().manual_seed(0))}
    labels = torch.tensor([0, 3, 1])
    together = model.generate(labels, **options)
    for row, label in zip(together, labels):
        assert torch.equal(model.generate(label[None], **options)[0], row)


def test_guidance_is_by_its_formula(model: ARPG) -> None:
    options = {"steps": 4, "top_k": 1, "order": torch.arange(16), "schedule": "cosine"}
    for kind in ("constant", "linear"):
        done = 0
        for step in model.decode(torch.tensor([2]), guidance_scale=5.0, guidance=kind, **options):
            done += len(step.places)
            scale = 5.0 if kind == "constant" else 1 + 4.0 * done / 16
            given, none = step.logits
            assert torch.equal((none + scale * (given - none)).argmax(-1), step.codes[0])


def test_without_guidance_there_are_no_rows_without_a_class(model: ARPG) -> None:
    step = next(model.decode(torch.tensor([2]), guidance_scale=1))
    assert step.logits.shape[0] == 1 and step.input_ids.tolist() == [[32 + 1 + 2]]
    step = next(model.decode(torch.tensor([2]), guidance_scale=2))
    assert step.input_ids.tolist() == [[35], [38]]


def test_drawing_keeps_to_the_likeliest(model: ARPG) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn: set[int] = set()
    for _ in range(40):
        step = next(model.decode(torch.tensor([2]), guidance_scale=1, steps=1, top_k=3, order=torch.arange(16), generator=generator))  # fmt: skip  # noqa: E501
        assert (step.logits[0].topk(3).indices == step.codes[0][:, None]).any(-1).all()
        drawn.add(int(step.codes[0, 0]))
    assert len(drawn) == 3
    cold = model.decode(torch.tensor([2]), guidance_scale=1, steps=1, temperature=1e-4, order=torch.arange(16))
    step = next(cold)
    assert torch.equal(step.codes, step.logits.argmax(-1))


def test_a_loss_falls_and_its_class_is_sometimes_left_out() -> None:
    torch.manual_seed(0)
    model = mmzoo.create("arpg-tiny", dropout=0.0, class_dropout=0.5).train()
    batch = arpg.example_inputs(model, 4)
    seen: set[tuple[float, ...]] = set()
    for _ in range(8):
        seen.add(tuple(model(**batch).flatten()[:4].tolist()))
    assert len(seen) > 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(model.loss(batch["codes"], batch["class_labels"]))
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 3.3 and losses[-1] < 3  # ln 32 = 3.47
    orders = batch["orders"]
    model.eval()
    by_hand = -model(**batch).log_softmax(-1).gather(2, batch["codes"].gather(1, orders)[..., None]).mean()
    torch.testing.assert_close(model.loss(batch["codes"], batch["class_labels"], orders), by_hand)


def test_wrong_inputs_are_refused(model: ARPG, tokenizer: VQModel) -> None:
    batch = arpg.example_inputs(model, 2)
    with pytest.raises(InputError, match="16 codes"):
        model(batch["codes"][:, :9], batch["class_labels"], batch["orders"])
    with pytest.raises(InputError, match="0 to 4, not 6"):
        model(batch["codes"], torch.tensor([1, 6]), batch["orders"])
    with pytest.raises(InputError, match="0 to 4, not -1"):
        model.generate(torch.tensor([-1]))
    for options in ({"guidance": "cosine"}, {"temperature": 0}, {"top_k": 33}, {"top_k": 0}, {"steps": 17}):
        with pytest.raises(InputError):
            model.generate(torch.tensor([1]), **options)
    with pytest.raises(InputError, match="even number of layers"):
        mmzoo.create("arpg-tiny", num_layers=3)
    with pytest.raises(InputError, match="divide"):
        mmzoo.create("arpg-tiny", hidden_size=36)
    for prompt in (None, "a cat", 5, -1, "-1"):
        with pytest.raises(InputError, match="number of a class, 0 to 4"):
            model.rollout(1, prompt=prompt, tokenizer=tokenizer)


def test_images_need_a_tokenizer_that_fits(model: ARPG, tokenizer: VQModel) -> None:
    with pytest.raises(InputError, match=r"VQ-16.*VQModel"):
        mmzoo.create("arpg-300m", device="meta").rollout(1, prompt=3)
    with pytest.raises(InputError, match="32 codes, but those of the model are 40"):
        mmzoo.create("arpg-tiny", vocab_size=40).rollout(1, prompt=3, tokenizer=tokenizer)


def by_diffusers(tokenizer: VQModel, codes: Tensor) -> Tensor:
    tokenizer.register_to_config(lookup_from_codebook=True)
    shape = (len(codes), 4, 4, tokenizer.config.latent_channels)
    with torch.no_grad():
        pixels = tokenizer.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
    return ((pixels.clamp(-1, 1) + 1) / 2 * 255).round().byte().permute(0, 2, 3, 1)


def test_images_are_what_the_tokenizer_says(model: ARPG, tokenizer: VQModel) -> None:
    codes = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    images = model.images(codes, tokenizer)
    assert images.shape == (3, 8, 8, 3) and images.float().std() > 5
    assert torch.equal(images, by_diffusers(tokenizer, codes))


def test_images_one_after_another_into_a_file(model: ARPG, tokenizer: VQModel, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    options = {"seed": 3, "prompt": "2", "steps": 4, "top_k": 1}
    path, other = tmp_path / "images.mp4", copy.deepcopy(tokenizer)
    torch.nn.init.normal_(other.decoder.conv_out.weight)
    with pytest.raises(KeyboardInterrupt):
        generate(model, path, 3, advance=stop, tokenizer=tokenizer, **options)
    with pytest.raises(InputError, match="Another clip"):
        generate(model, path, 3, tokenizer=other, **options)
    generate(model, path, 3, tokenizer=tokenizer, **options)
    assert read_video(path, sampling="all").frames.shape == (3, 128, 128, 3)


def test_another_class_from_the_next_image_on(model: ARPG, tokenizer: VQModel) -> None:
    def images(*labels: int) -> list[Tensor]:
        made = model.rollout(2, seed=1, prompt=labels[0], tokenizer=tokenizer, top_k=1)
        first = next(made)
        made.switch(labels[1])
        state = made.state_dict()
        other = model.rollout(2, seed=1, prompt=labels[0], tokenizer=tokenizer, top_k=1)
        other.load_state_dict(state)
        second = next(made)
        assert torch.equal(next(other), second)
        return [first, second]

    (first, stays), (same, changes) = images(0, 0), images(0, 3)
    assert torch.equal(first, same) and not torch.equal(stays, changes)


@pytest.mark.parametrize("wrap", [lambda held: held, lambda held: {"model": held, "steps": 3}])
def test_the_authors_files_are_read(model: ARPG, tmp_path: Path, wrap) -> None:
    torch.save(wrap(model.state_dict()), tmp_path / "a.pt")
    again = arpg.read_checkpoint(tmp_path / "a.pt", "arpg-tiny")
    batch = arpg.example_inputs(model, 2)
    assert not again.training and torch.equal(again(**batch), model(**batch))
    assert arpg.read_checkpoint(tmp_path / "a.pt", "arpg-tiny", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_of_the_authors_files_is_loaded_by_name(model: ARPG, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "arpg_tiny.pt")
    (tmp_path / "arpg_300m.pt").write_bytes(b"another model's")
    again, batch = mmzoo.load("arpg-tiny", weights=str(tmp_path)), arpg.example_inputs(model, 2)
    assert torch.equal(again(**batch), model(**batch))
    with pytest.raises(InputError, match="takes no device_map"):
        mmzoo.load("arpg-tiny", weights=str(tmp_path), device_map="auto")
    with pytest.raises(CheckpointError, match="arpg_700m.pt"):
        mmzoo.load("arpg-700m", weights=str(tmp_path))


class Code:
    def __reduce__(self) -> tuple:
        return (print, ("this ran",))


def test_files_that_are_not_the_authors(model: ARPG, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    held = model.state_dict()
    held["head.weight"] = held["head.weight"][:3]
    held["layers.extra"] = held.pop("layers.to_k.weight")
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        arpg.read_checkpoint(tmp_path / "a.pt", "arpg-tiny")
    error = caught.value
    assert (error.missing, error.unexpected) == (["layers.to_k.weight"], ["layers.extra"])
    assert error.misshapen == [("head.weight", (3, 32), (32, 32))]
    for content in (torch.zeros(3), {"weight": torch.zeros(3)}, [1, 2]):
        torch.save(content, tmp_path / "b.pt")
        with pytest.raises(CheckpointError, match="no parameters of ARPG"):
            arpg.read_checkpoint(tmp_path / "b.pt", "arpg-tiny")
    torch.save({"embeddings.weight": Code()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="as tensors alone"):
        arpg.read_checkpoint(tmp_path / "c.pt", "arpg-tiny")
    assert "this ran" not in capsys.readouterr().out
    (tmp_path / "d.pt").write_bytes(b"no file of torch")
    with pytest.raises(CheckpointError, match="Cannot read"):
        arpg.read_checkpoint(tmp_path / "d.pt", "arpg-tiny")


def test_at_half_precision_the_same_up_to_rounding() -> None:
    model = a_model()
    torch.manual_seed(1)
    batch = arpg.example_inputs(model, 2)
    with torch.no_grad():
        full, half = model(**batch), model.to(torch.bfloat16)(**batch)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.02 * full.abs().mean() + 0.02
    assert model.generate(torch.tensor([1]), steps=3).max() < 32
