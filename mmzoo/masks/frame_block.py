"""Frame-wise block causal attention of TC-LLaVA, and the full-visual mask it is compared with.

Source: "TC-LLaVA: Rethinking the Transfer from Image to Video Understanding with Temporal Considerations",
arXiv 2409.03206. Derived from the published definition; the authors released no code.
"""

from mmzoo.masks.basic import causal
from mmzoo.masks.rule import Rule, same, see, segment, segment_and_frame, visual


def frame_block_causal() -> Rule:
    """Causal, and the visual tokens of one frame see each other."""
    return Rule("frame-block-causal", (*causal().terms, see(visual, visual, same(segment_and_frame))))


def full_visual() -> Rule:
    """Causal, and the visual tokens of one clip or image see each other."""
    return Rule("full-visual", (*causal().terms, see(visual, visual, same(segment))))
