"""CCA-LLaVA: LLaVA-1.5 under concentric causal attention, with concentric positions.

Source: "Mitigating Object Hallucination via Concentric Causal Attention", NeurIPS 2024, arXiv 2410.15926. Modules and
parameters are LLaVA's. The authors' code takes one image of 24 x 24 patches a sample and, in a batch, gives every
sample the positions of the last one; here rule and scheme hold for each image of each sample, of any grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmzoo.models import llava
from mmzoo.models.llava import Llava, LlavaConfig, MmzooLlavaProcessor, is_release, read_weights

__all__ = ["CONFIGS", "MODEL", "PROCESSOR", "is_release", "processor", "read_release", "read_weights"]


class CCALlavaConfig(LlavaConfig):
    """LLaVA's configuration with another rule and scheme."""

    model_type = "mmzoo_cca_llava"

    def __init__(self, *args: Any, rule: str = "concentric-causal", scheme: str = "concentric", **kwargs: Any):
        super().__init__(*args, rule=rule, scheme=scheme, **kwargs)


class CCALlava(Llava):
    """CCA-LLaVA. `processor(...)` gives what `forward` and `generate` take."""

    config: CCALlavaConfig
    config_class = CCALlavaConfig


MODEL, PROCESSOR = CCALlava, MmzooLlavaProcessor
AutoConfig.register(CCALlavaConfig.model_type, CCALlavaConfig, exist_ok=True)

CONFIGS: dict[str, dict[str, Any]] = {"cca-llava-7b": llava.FULL, "cca-llava-tiny": llava.TINY, "cca-nano": llava.NANO}


def processor(name: str, config: CCALlavaConfig) -> MmzooLlavaProcessor | None:
    """The processor of a model with random weights; None where its tokenizer would have to be downloaded."""
    if name == "cca-llava-7b":
        return None
    return llava.word_processor(MmzooLlavaProcessor, config, num_frames=4 if name == "cca-llava-tiny" else 8)


def read_release(folder: Path, described: dict[str, Any]) -> tuple[LlavaConfig, MmzooLlavaProcessor]:
    """Configuration and processor of the authors' release, as `llava.read_release`."""
    return llava.read_as(CCALlavaConfig, MmzooLlavaProcessor, folder, described)
