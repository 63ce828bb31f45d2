"""Vision towers: which hidden state is given."""

from __future__ import annotations

import pytest
import torch

from mmzoo.encoders.vision import as_vision_config, build_vision_encoder, patch_features
from mmzoo.errors import InputError

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_hidden_states_are_those_of_transformers(kind: str) -> None:
    tower, _ = build_vision_encoder(as_vision_config({"model_type": kind, **SIZES}))
    pixels = torch.randn(2, 3, 28, 28)
    expected = tower.eval()(pixels, output_hidden_states=True).hidden_states
    for layer in range(-4, 4):
        torch.testing.assert_close(patch_features(tower, pixels, layer, class_token=True), expected[layer])
    for layer in (-5, 4):
        with pytest.raises(InputError, match="hidden states 0 to 3"):
            patch_features(tower, pixels, layer)


def test_the_class_token_of_clip_comes_first_if_asked_for() -> None:
    tower, _ = build_vision_encoder(as_vision_config({"model_type": "clip_vision_model", **SIZES}))
    pixels = torch.randn(1, 3, 28, 28)
    whole = patch_features(tower, pixels, -2, class_token=True)
    assert whole.shape == (1, 17, 24)
    assert torch.equal(patch_features(tower, pixels, -2), whole[:, 1:])
