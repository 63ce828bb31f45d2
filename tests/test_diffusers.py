"""Rules in diffusers' Wan: its own attention without one, and a dense mask in it with one."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from mmzoo import masks
from mmzoo.attention import allowed, backends
from mmzoo.attention.diffusers import attend_by, clip_layout
from mmzoo.errors import InputError, UnsupportedMask
from mmzoo.layout import batch
from mmzoo.masks import Rule
from mmzoo.models.longlive import CONFIGS, LongLive

SIZE = (3, 4, 6)  # 18 tokens in 3 frames


def a_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=3, out_channels=3, text_dim=8, freq_dim=16,
        ffn_dim=24, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def run(model: WanTransformer3DModel, clip: Tensor) -> Tensor:
    words = torch.randn(len(clip), 4, 8, generator=torch.Generator().manual_seed(1))
    return model(clip, torch.full((len(clip),), 300), words).sample


def a_clip(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, *SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    monkeypatch.setattr(backends.Fused, "refuses", lambda self, rule, device, head_dim=None: None)


def natively(rule: Rule, model: WanTransformer3DModel, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What diffusers' native backend gives where its processor hands over the dense mask."""
    opened = allowed(rule, clip_layout(model, *SIZE))[:, None]

    def masked(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        if key.shape[1] == opened.shape[-1]:  # among frames, not over the words
            options["attn_mask"] = opened
        return dispatch_attention_fn(query, key, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.models.transformers.transformer_wan.dispatch_attention_fn", masked)
        return run(model, a_clip())


@pytest.mark.parametrize("rule", [masks.bidirectional(), masks.causal_temporal()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "mmzoo_flash"])
def test_a_rule_is_the_native_backend_under_its_mask(
    rule: Rule, attention: str, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_wan()
    plain, masked = run(model, a_clip()), natively(rule, model, monkeypatch)
    assert torch.allclose(plain, masked, atol=1e-4) == (rule == masks.bidirectional())
    attend_by(model, rule, clip_layout(model, *SIZE), attention)
    torch.testing.assert_close(run(model, a_clip()), masked, atol=1e-4, rtol=1e-4)
    attend_by(model, None, clip_layout(model, *SIZE))
    assert torch.equal(run(model, a_clip()), plain)


def test_gradients_and_checkpointing(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, model = masks.causal_temporal(), a_wan().train()
    weights = [model.blocks[0].attn1.to_q.weight, model.blocks[1].attn1.to_v.weight]
    expected = torch.autograd.grad(natively(rule, model, monkeypatch).sin().sum(), weights)
    attend_by(model, rule, clip_layout(model, *SIZE), "mmzoo_flash")
    model.enable_gradient_checkpointing()
    found = torch.autograd.grad(run(model, a_clip()).sin().sum(), weights)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_mask_is_made_once_for_all_layers_and_again_for_another_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = a_wan(), []
    make = backends.SDPA.form
    monkeypatch.setattr(
        backends.SDPA, "form", lambda self, mask: made.append(mask.queries.shape[0]) or make(self, mask)
    )
    attend_by(model, masks.causal_temporal(), clip_layout(model, *SIZE))
    two = run(model, a_clip())
    assert made == [2]
    three = run(model, torch.cat([a_clip(), a_clip(1)]))
    assert made == [2, 3]
    torch.testing.assert_close(three[:1], two[:1])


@torch.no_grad()
def test_fused_projections() -> None:
    model = a_wan()
    attend_by(model, masks.causal_temporal(), clip_layout(model, *SIZE))
    expected = run(model, a_clip())
    model.fuse_qkv_projections()
    assert model.blocks[0].attn1.fused_projections
    torch.testing.assert_close(run(model, a_clip()), expected)


def test_what_cannot_be_done_is_refused() -> None:
    model = a_wan()
    layout, rule = clip_layout(model, *SIZE), masks.causal_temporal()
    for other in (LongLive(**CONFIGS["longlive-tiny"]), torch.nn.Linear(2, 2)):
        with pytest.raises(UnsupportedMask, match=f"not of {type(other).__name__}"):
            attend_by(other, rule, layout)
    with pytest.raises(UnsupportedMask, match="fallback"):
        attend_by(model, masks.multimodal_causal(empty="uniform")[0], layout)
    with pytest.raises(UnsupportedMask, match="need a GPU|only GPU"):
        attend_by(model, rule, layout, "flash_attention_4" if torch.cuda.is_available() else "mmzoo_flash")
    with pytest.raises(InputError, match="2 samples"):
        attend_by(model, rule, batch([layout, layout], "left"))
    with pytest.raises(InputError, match=r"\(3, 5, 6\).*\(1, 2, 2\)"):
        clip_layout(model, 3, 5, 6)
    attend_by(model, rule, layout)
    with pytest.raises(InputError, match="12 tokens and the layout 18"):
        run(model, a_clip()[:, :, :2])
    with pytest.raises(InputError, match="under the mask of its rule alone"):
        model.blocks[0].attn1(torch.zeros(1, 18, 32), torch.zeros(1, 4, 32))
