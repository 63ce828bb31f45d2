"""Multi-modal causal attention (MMCA) of DeepSpeed-VisualChat: one softmax over image keys plus one over text keys.

Source: "DeepSpeed-VisualChat: Multi-Round Multi-Image Interleave Chat via Multi-Modal Causal Attention",
arXiv 2309.14327. The two outputs are added.
"""

from typing import Literal

from mmzoo.masks.rule import Rule, after, everything, index, itself, not_after, see, text, visual

Empty = Literal["zero", "uniform"]


def multimodal_causal(empty: Empty = "zero") -> tuple[Rule, Rule]:
    """The image branch and the text branch.

    Args:
        empty: what a branch without an open key adds: "zero" (the paper's definition), or "uniform" (the authors' code,
            in which early text reads the mean of later images).
    """
    before = not_after(index)
    later = after()
    image_terms = (see(text, visual, before), see(visual, visual, itself))
    text_terms = (see(everything, text, before),)
    if empty == "zero":
        return Rule("mmca-image", image_terms), Rule("mmca-text", text_terms)
    image_fallback = Rule("mmca-image-fallback", (see(text, text, before), see(text, visual, later)))
    text_fallback = Rule("mmca-text-fallback", (see(everything, visual, before), see(everything, text, later)))
    return (
        Rule("mmca-image", image_terms, empty="uniform", fallback=image_fallback),
        Rule("mmca-text", text_terms, empty="uniform", fallback=text_fallback),
    )
