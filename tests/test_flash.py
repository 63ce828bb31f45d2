"""The fused kernels against the naive reference in float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import a_model, ids_for
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from mmzoo import masks
from mmzoo.attention import BACKENDS, backend, compact
from mmzoo.attention.backends import Mask
from mmzoo.attention.transformers import implementations
from mmzoo.errors import UnsupportedMask
from mmzoo.layout import Role, TokenLayout, batch, image, lay_out, text, video
from mmzoo.masks.ccam import query_layout
from mmzoo_kernels import flash
from mmzoo_kernels.flash import blocks, flash_mask, masked_attention, naive_masked_attention
from mmzoo_kernels.masks import CompactMask
from mmzoo_kernels.softmax import merge_states

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 16
LAYOUT = batch(
    [lay_out(text(3), video(2, 2, 3), text(4), text(14, Role.ANSWER)), lay_out(text(2), image(3, 3), text(5))], "left"
)


def tensors(
    mask: CompactMask, heads: int = 2, groups: int = 1, dim: int = 16, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Query, key and value as a transformers backbone hands them over: heads after tokens in memory."""
    (b, q), k = mask.query_sample.shape, mask.key_sample.shape[1]
    shapes = [(b, q, heads, dim), (b, k, groups, dim), (b, k, groups, dim)]
    return [torch.randn(shape).to(DEVICE, dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def check(branches: list[CompactMask], inputs: list[Tensor], size: int = SIZE, tolerance: float = 2e-5) -> None:
    """Outputs, log-sum-exps and the gradients through both."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, lse = masked_attention(*inputs, flash_mask(*branches, size=size).to(DEVICE))
    expected, expected_lse = naive_masked_attention(*exact, branches)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    losses = [
        (x.double().sin().sum() + y.double().masked_fill(y.isneginf(), 0).sin().sum())
        for x, y in ((out, lse), (expected, expected_lse))
    ]
    gradients = [torch.autograd.grad(loss, leaves) for loss, leaves in zip(losses, (inputs, exact))]
    for found, right in zip(*gradients):
        torch.testing.assert_close(found.double(), right, atol=5 * tolerance, rtol=5 * tolerance)


@st.composite
def compact_masks(draw: st.DrawFn) -> CompactMask:
    queries, keys, terms = draw(st.integers(1, 36)), draw(st.integers(1, 36)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    lower = integers(0, 6, 1, queries, terms)
    return CompactMask(
        integers(-1, 2, 1, queries),
        integers(-1, 2, 1, keys).sort(-1).values,
        lower,
        lower + integers(-2, 4, 1, queries, terms),
        integers(0, 8, 1, keys, terms).sort(1).values,
    )


@settings(max_examples=5)
@given(mask=compact_masks())
def test_random_masks(mask: CompactMask) -> None:
    check([mask], tensors(mask))


@pytest.mark.parametrize(
    "rules",
    [
        (masks.modality_mutual(),),
        (masks.frame_block_causal(),),
        (masks.sliding_window(5),),
        masks.multimodal_causal(),
    ],
    ids=lambda rules: " + ".join(rule.name for rule in rules),
)
def test_rules(rules: tuple[masks.Rule, ...]) -> None:
    branches = [compact(rule, LAYOUT) for rule in rules]
    check(branches, tensors(branches[0]))


def test_memory_that_lies_in_another_order() -> None:
    """Inputs with the head dim first, and the gradient of a sum, one number for all."""
    layout = lay_out(text(2), image(2, 2), text(3))
    branches = [compact(rule, layout) for rule in masks.multimodal_causal()]
    inputs = [torch.randn(1, 16, 2, 9).to(DEVICE).permute(0, 2, 3, 1).requires_grad_() for _ in range(3)]
    assert inputs[0].stride(-1) != 1
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, _ = masked_attention(*inputs, flash_mask(*branches, size=SIZE).to(DEVICE))
    expected, _ = naive_masked_attention(*exact, branches)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    for found, right in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), exact)):
        torch.testing.assert_close(found.double(), right, atol=1e-4, rtol=1e-4)


def test_cross_attention_and_shared_heads() -> None:
    video_layout = lay_out(video(5, 2, 4))
    mask = compact(masks.causal_cross_attention(), query_layout(20, 5), video_layout)
    check([mask], tensors(mask, heads=3))


def test_full_tiles() -> None:
    mask = compact(masks.causal(), lay_out(text(48)))
    assert mask.tiles(SIZE).full.sum() == 3
    check([mask], tensors(mask, heads=1))


@pytest.mark.parametrize(("dim", "dtype", "tolerance"), [(24, torch.float32, 2e-5), (8, torch.float16, 3e-3)])
def test_head_dims_and_half_precision(dim: int, dtype: torch.dtype, tolerance: float) -> None:
    mask = compact(masks.frame_block_causal(), lay_out(text(2), video(2, 2, 2), text(8)))
    check([mask], tensors(mask, dim=dim, dtype=dtype), tolerance=tolerance)


def test_blocks_smaller_than_tiles() -> None:
    assert max(blocks(256, torch.float32, 64, 0)["forward"][side] for side in "MN") == 32
    mask = compact(masks.causal(), lay_out(text(50)))
    check([mask], tensors(mask, heads=1, dim=250), size=64)


def test_rows_without_an_open_key_give_zero() -> None:
    mask = compact(masks.frame_block_causal(), LAYOUT)
    inputs = tensors(mask)
    out, lse = masked_attention(*inputs, flash_mask(mask, size=SIZE).to(DEVICE))
    padding = ~LAYOUT.valid[1]
    assert padding.sum() == 17
    assert (out[1, :, padding] == 0).all()
    assert lse[:, 1, :, padding].isneginf().all()
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert (gradient[1, :, padding] == 0).all()


def test_tiles_that_are_not_listed_are_not_read() -> None:
    """Keys far behind a window hold NaN, and nobody notices."""
    mask = compact(masks.sliding_window(4), lay_out(text(64))).rows(slice(48, 64))
    inputs = [x.detach().clone() for x in tensors(mask, heads=1)]
    for x in inputs[1:]:
        x[:, :, :32] = torch.nan
    leaves = [x.requires_grad_() for x in inputs]
    out, _ = masked_attention(*leaves, flash_mask(mask, size=SIZE).to(DEVICE))
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all()
    assert all(one.isfinite().all() for one in gradients)
    assert (gradients[1][:, :, :32] == 0).all()


def test_two_halves_of_the_keys_merge() -> None:
    mask = compact(masks.modality_mutual(), lay_out(text(3), video(2, 2, 3), text(5)))
    query, key, value = tensors(mask)
    halves = (slice(0, 9), slice(9, 20))
    parts = [
        masked_attention(query, key[:, :, one], value[:, :, one], flash_mask(mask.columns(one), size=SIZE).to(DEVICE))
        for one in halves
    ]
    (one, one_lse), (other, other_lse) = parts
    merged, lse = merge_states(one, one_lse[0], other, other_lse[0])
    expected, expected_lse = naive_masked_attention(query, key, value, [mask])
    torch.testing.assert_close((merged, lse), (expected, expected_lse[0]), atol=2e-5, rtol=2e-5)


def test_in_a_compiled_graph_and_under_checkpointing() -> None:
    mask = compact(masks.frame_block_causal(), lay_out(text(2), video(2, 2, 2), text(4)))
    inputs, ready = tensors(mask), flash_mask(mask, size=SIZE).to(DEVICE)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return masked_attention(query * 2, key, value, ready)[0].sin()

    runs = [
        attention(*inputs),
        torch.compile(attention, fullgraph=True, backend="aot_eager")(*inputs),
        checkpoint(attention, *inputs, use_reentrant=False),
    ]
    gradients = [torch.autograd.grad(out.cos().sum(), inputs) for out in runs]
    for out, found in zip(runs[1:], gradients[1:]):
        assert torch.equal(out, runs[0])
        assert all(torch.equal(*pair) for pair in zip(found, gradients[0])), "the backward pass is deterministic"


def test_torch_knows_all_of_the_operator() -> None:
    """Its schema, its shapes without data, its autograd, and all of that traced."""
    mask = compact(masks.frame_block_causal(), lay_out(text(2), video(2, 2, 2), text(4)))
    ready = flash_mask(mask, size=SIZE).to(DEVICE)
    torch.library.opcheck(flash._forward_op, (*tensors(mask), list(ready.arrays), SIZE, 1, 0.25))


def test_masks_are_made_in_a_collate_function_and_travel_between_processes() -> None:
    samples = [LAYOUT.data[:1], LAYOUT.data[1:]]

    def collate(rows: list[Tensor]) -> bytes:
        return pickle.dumps(flash_mask(compact(masks.modality_mutual(), TokenLayout(torch.cat(rows))), size=8))

    (sent,) = DataLoader(samples, batch_size=2, collate_fn=collate)
    assert torch.equal(pickle.loads(sent).opened()[0], compact(masks.modality_mutual(), LAYOUT).dense())


def test_what_does_not_fit_is_refused() -> None:
    mask = compact(masks.causal(), lay_out(text(6)))
    ready = flash_mask(mask, size=SIZE)
    query, key, value = tensors(mask)
    with pytest.raises(ValueError, match="do not fit"):
        masked_attention(query.repeat(1, 2, 1, 1)[:, :3], key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), ready)
    with pytest.raises(ValueError, match=r"\(1, 6, 6\).*\(1, 5, 6\)"):
        masked_attention(query[:, :, :5], key, value, ready)
    with pytest.raises(ValueError, match="float64"):
        masked_attention(query.double(), key.double(), value.double(), ready)
    with pytest.raises(ValueError, match="256 are taken, not 300"):
        masked_attention(*tensors(mask, dim=300), ready)
    with pytest.raises(ValueError, match="of one shape"):
        flash_mask(mask, mask.rows(slice(3)))


def compiled_for(*cases: tuple[str, int, int, str]) -> str:
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]), "TRITON_INTERPRET": "0"}
    words = [str(word) for case in cases for word in case]
    command = [sys.executable, str(root / "tests" / "flash_compiling.py"), *words]
    done = subprocess.run(command, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = ("forward", "backward_query", "backward_key_value")
    cases = [(kernel, capability, 64, "bfloat16") for kernel in kernels for capability in (80, 90)]
    cases.append(("backward_query", 90, 64, "float16"))
    assert compiled_for(*cases).count("\n") == len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_every_kernel_compiles_and_fits(
    capability: int, dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels, dtypes = ("forward", "backward_query", "backward_key_value"), ("bfloat16", "float16", "float32")
    compiled_for(*[(kernel, capability, dim, dtype) for kernel in kernels for dtype in dtypes])


@pytest.mark.parametrize("rules", [(masks.modality_mutual(),), masks.multimodal_causal()], ids=["one", "two"])
def test_what_the_kernels_are_told_opens_the_pairs_of_the_mask(rules: tuple[masks.Rule, ...]) -> None:
    branches = [compact(rule, LAYOUT) for rule in rules]
    assert torch.equal(flash_mask(*branches, size=8).opened(), torch.stack([one.dense() for one in branches]))


@pytest.mark.parametrize("rule", ["modality-mutual", "mmca"])
def test_a_language_model_runs_on_it(rule: str) -> None:
    """In the interpreter, where the backend itself would refuse the device."""
    model = a_model(rule=rule)
    layout = batch([lay_out(text(2), image(2, 2), text(3)), lay_out(text(4))], "left")
    ids = ids_for(layout)
    expected = model(ids, layout).logits
    model.language_model.config._attn_implementation = implementations(model.rule)["mmzoo_flash"]
    with torch.no_grad():
        logits = model(ids, layout).logits
    torch.testing.assert_close(logits[layout.valid], expected[layout.valid], atol=2e-4, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPUs, in the interpreter")
def test_two_processes_sharded_by_fsdp_and_checkpointed_compute_what_one_does(tmp_path: Path) -> None:
    from flash_sharding import LAYOUT, loss_of, the_model

    model = the_model()
    losses = [loss_of(model, slice(i, i + 1)) for i in range(len(LAYOUT.data))]
    (sum(losses) / len(losses)).backward()
    root, out = Path(__file__).resolve().parent.parent, tmp_path / "sharded.pt"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(root / "tests" / "flash_sharding.py"),
                str(rank),
                "2",
                str(tmp_path / "store"),
                str(out),
            ],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
    found = torch.load(out)
    torch.testing.assert_close(found["loss"], sum(losses).detach() / len(losses))
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) > 20
    torch.testing.assert_close(found["gradients"], expected, atol=1e-5, rtol=1e-4)


def test_the_backend_says_what_it_cannot_do() -> None:
    for device, dim, reason in (("cpu", 16, "need a GPU"), ("cuda", 300, "256, not 300")):
        with pytest.raises(UnsupportedMask, match=reason):
            backend("mmzoo_flash", masks.causal(), device=device, head_dim=dim)
    rule, layout = masks.causal(), lay_out(text(4))
    doubles = [x.double() for x in tensors(compact(rule, layout))]
    with pytest.raises(UnsupportedMask, match="float64"):
        BACKENDS["mmzoo_flash"](*doubles, Mask(rule, layout, layout, slice(None)), 1.0)
