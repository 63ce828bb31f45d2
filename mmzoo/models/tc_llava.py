"""TC-LLaVA: LLaVA on clips, with temporal-aware dual RoPE and frame-wise block causal attention.

Source: "TC-LLaVA: Rethinking the Transfer from Image to Video Understanding with Temporal Considerations",
arXiv 2409.03206. The authors released neither code nor weights: mask and positions follow the published definition,
and what it leaves open is a choice of this project, named in the model's card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from mmzoo.layout import Modality, Span, video
from mmzoo.models import llava
from mmzoo.models.llava import Llava, LlavaConfig, MmzooLlavaProcessor, is_release, read_weights

__all__ = ["CONFIGS", "MODEL", "PROCESSOR", "is_release", "processor", "read_release", "read_weights"]


class TCLlavaConfig(LlavaConfig):
    """LLaVA's configuration with another rule and scheme, and a quarter of the patches.

    Positions are alpha * n + beta * T, n counting tokens and T text tokens and frames; `scheme_options` holds alpha and
    beta, both 1 by default. The paper's gamma is beta here; read as "gamma * n + T" it is alpha.
    """

    model_type = "mmzoo_tc_llava"

    def __init__(
        self,
        *args: Any,
        pool: int = 2,
        rule: str = "frame-block-causal",
        scheme: str = "temporal-dual",
        **kwargs: Any,
    ):
        super().__init__(*args, pool=pool, rule=rule, scheme=scheme, **kwargs)


class TCLlava(Llava):
    """TC-LLaVA. `processor(...)` gives what `forward` and `generate` take."""

    config: TCLlavaConfig
    config_class = TCLlavaConfig


class TCLlavaProcessor(MmzooLlavaProcessor):
    """LLaVA's processor, for which a clip is one span at one place, frame by frame."""

    def spans(self, pixels: Tensor, modality: Modality) -> list[Span]:
        if modality != Modality.VIDEO:
            return super().spans(pixels, modality)
        return [video(len(pixels), *self.grid(pixels))]


MODEL, PROCESSOR = TCLlava, TCLlavaProcessor
AutoConfig.register(TCLlavaConfig.model_type, TCLlavaConfig, exist_ok=True)

NUM_FRAMES = {"tc-llava-7b": 16, "tc-llava-tiny": 4, "tc-llava-nano": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "tc-llava-7b": llava.FULL,
    "tc-llava-tiny": llava.TINY,
    "tc-llava-nano": llava.NANO,
}


def processor(name: str, config: TCLlavaConfig) -> MmzooLlavaProcessor | None:
    """The processor of a model with random weights; None where its tokenizer would have to be downloaded."""
    return None if name == "tc-llava-7b" else llava.word_processor(TCLlavaProcessor, config, NUM_FRAMES[name])


def read_release(folder: Path, described: dict[str, Any]) -> tuple[LlavaConfig, MmzooLlavaProcessor]:
    """Configuration and processor from a LLaVA checkpoint, where fine-tuning starts; TC-LLaVA has no release."""
    return llava.read_as(TCLlavaConfig, TCLlavaProcessor, folder, described, num_frames=NUM_FRAMES["tc-llava-7b"])
