"""Concentric causal attention of CCA-LLaVA: inner rings of an image see outer rings.

Source: "Mitigating Object Hallucination via Concentric Causal Attention", NeurIPS 2024, arXiv 2410.15926.
"""

from mmzoo.masks.rule import Rule, Value, everything, not_after, see
from mmzoo.positions import concentric_position

concentric = Value("concentric position", concentric_position, grows=True)


def concentric_causal() -> Rule:
    """A token sees every token whose concentric position is not after its own.

    Text is causal; patches of one ring see each other, inner rings see outer rings, outer rings never see inner ones.
    """
    return Rule("concentric-causal", (see(everything, everything, not_after(concentric)),))
