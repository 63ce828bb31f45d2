"""The causal Q-Former: its masks, its windows, and what padding may not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmzoo import masks
from mmzoo.attention import allowed
from mmzoo.connectors.causal_qformer import AudioVisualQFormer, diversity_loss, synchronise
from mmzoo.errors import InputError
from mmzoo.layout import lay_out, video
from mmzoo.masks.causal_qformer import window_queries


def connector(**options: object) -> AudioVisualQFormer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_heads": 2, "intermediate_size": 12, "num_queries": 6, "window": 3}
    made = AudioVisualQFormer([5], 7, audio_per_frame=2, max_positions=16, **{**sizes, **options}).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def streams(frames: int, blocks: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, frames, 4, 8, generator=generator), torch.randn(1, 2 * blocks, 8, generator=generator)


def joint_of(frames: int, blocks: int, seed: int = 0) -> Tensor:
    return synchronise(*streams(frames, blocks, seed), 2)


@pytest.mark.parametrize("direction", ["future", "past"])
def test_a_frame_sees_itself_and_one_side(direction: str) -> None:
    layout = lay_out(video(3, 2, grid=False))
    seen = allowed(masks.causal_qformer(direction), layout)[0]
    for q in range(6):
        for k in range(6):
            assert seen[q, k] == (k // 2 >= q // 2 if direction == "future" else k // 2 <= q // 2)


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(InputError, match="'future' or 'past', not 'causal'"):
        masks.causal_qformer("causal")


@pytest.mark.parametrize("direction", ["future", "past"])
def test_a_changed_frame_changes_the_frames_that_see_it(direction: str) -> None:
    module, joint = connector(direction=direction), joint_of(3, 3)
    layer, states = module.video_Qformer.layers[0], []
    for shift in (0.0, 1.0):
        changed = joint.clone()
        changed[:, 1] += shift * torch.randn(16, generator=torch.Generator().manual_seed(3))
        frames, layouts = module.windows(changed, torch.tensor([3]), 3, 6)
        states.append(layer.frame_states(frames, module.rule, layouts[1], "sdpa").unflatten(1, (3, 4)))
    same = [torch.allclose(states[0][:, i], states[1][:, i], atol=1e-6) for i in range(3)]
    assert same == ([False, False, True] if direction == "future" else [True, False, False])


def test_a_window_of_padding_alone_takes_the_mean_of_all() -> None:
    layout = lay_out(video(2, 2, grid=False))
    empty = layout.field("frame", torch.full_like(layout.frame, -1))
    rule = window_queries()
    assert not allowed(rule, layout, empty).any()
    assert allowed(rule.fallback, layout, empty).all()
    module = connector(num_queries=6, window=2, fine_queries=3)
    out = module.query_states(joint_of(3, 2), torch.tensor([3]))
    assert out.shape == (1, 2, 6, 16)
    assert out.isfinite().all()


def test_audio_stands_beside_the_frames_that_it_meets() -> None:
    frames, audio = streams(3, 2)
    joint = synchronise(frames, audio, 2)
    assert torch.equal(joint[..., :8], frames)
    assert torch.equal(joint[0, 1, :2, 8:], audio[0, 2:4])
    assert not joint[0, :, 2:, 8:].any()
    assert not joint[0, 2, :, 8:].any()
    longer = synchronise(frames[:, :1], audio, 2, torch.tensor([[1, 0]]))
    assert longer.shape[1] == 2
    assert not longer[..., 8:].any()
    assert not longer[0, 1].any()
    with pytest.raises(InputError, match="no room for 5 audio steps"):
        synchronise(frames, audio, 5)


@pytest.mark.parametrize("fine", [0, 2])
@pytest.mark.parametrize("mask_padding", [False, True])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8)), min_size=2, max_size=3))
def test_a_batch_equals_its_items(mask_padding: bool, fine: int, lengths: list[tuple[int, int]]) -> None:
    module = connector(mask_padding=mask_padding, fine_queries=fine)
    alone = [joint_of(*length, seed=i) for i, length in enumerate(lengths)]
    counts = torch.tensor([len(one[0]) for one in alone])
    together = torch.zeros(len(alone), int(counts.max()), 4, 16)
    for row, one in zip(together, alone, strict=True):
        row[: one.shape[1]] = one[0]
    tokens = module(together, counts)
    for i, one in enumerate(alone):
        windows = int(module.num_windows(counts[i]))
        torch.testing.assert_close(tokens[i, :windows], module(one, counts[i : i + 1])[0], atol=1e-5, rtol=1e-5)


def test_padding_is_masked_where_that_is_asked_for() -> None:
    """Upstream's frame mask leaves the frames that fill a window open, so what they hold matters; ours closes them."""
    for mask_padding in (False, True):
        module, outputs = connector(mask_padding=mask_padding), []
        for fill in (0.0, 1.0):
            joint = torch.cat([joint_of(2, 2), torch.linspace(0, fill, 16).expand(1, 1, 4, 16)], 1)
            outputs.append(module(joint, torch.tensor([2])))
        assert torch.allclose(*outputs, atol=1e-6) == mask_padding


def test_eager_and_sdpa_agree() -> None:
    module, joint = connector(fine_queries=2), joint_of(4, 5)
    sdpa = module(joint, torch.tensor([5]))
    module.attention = "eager"
    torch.testing.assert_close(module(joint, torch.tensor([5])), sdpa, atol=1e-5, rtol=1e-5)


def test_diversity_is_the_mean_similarity_of_pairs() -> None:
    queries = torch.randn(2, 3, 4, 5)
    pairs = [
        torch.cosine_similarity(window[i], window[j], dim=0)
        for window in queries.flatten(0, 1)
        for i in range(4)
        for j in range(4)
        if i != j
    ]
    torch.testing.assert_close(diversity_loss(queries), torch.stack(pairs).mean())


def test_weights_of_the_frames_are_a_distribution_over_real_frames() -> None:
    module = connector()
    weights = module.frame_weights(joint_of(4, 2), torch.tensor([4]))
    assert weights.shape == (1, 2, 6, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))
    assert not weights[0, 1, :, 4:].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fine_queries": 3}, "3 frames with 3 queries each give 9 tokens, a window gives 6"),
        ({"num_heads": 3}, "3 heads do not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        connector(**options)


def test_a_window_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(InputError, match="needs 20 positions; the table has 16"):
        connector(window=5, num_queries=5)(joint_of(5, 5), torch.tensor([5]))
    with pytest.raises(InputError, match="one or two audio encoders, not 3"):
        AudioVisualQFormer([1, 2, 3], 4)
