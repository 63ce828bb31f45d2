"""Modality-mutual attention (MMA) of AKI: images look ahead at the question.

Source: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal LLMs",
arXiv 2503.02597.
"""

from mmzoo.masks.basic import causal
from mmzoo.masks.rule import Rule, always, first_prompt_text, see, visual


def modality_mutual() -> Rule:
    """Causal, and image tokens also see the text up to and including the first assistant marker.

    Image tokens stay causal among themselves and never see an answer. Without an assistant marker (captions) this is
    plain causal. For several images or frames in one sample, where the authors' code fails, each of them sees that
    text, and images stay causal to each other.
    """
    return Rule("modality-mutual", (*causal().terms, see(visual, first_prompt_text, always)))
