"""The masks of the literature, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmzoo.errors import InputError
from mmzoo.masks.basic import bidirectional, causal, prefix, sliding_window
from mmzoo.masks.causal_qformer import causal_qformer
from mmzoo.masks.ccam import causal_cross_attention
from mmzoo.masks.concentric import concentric_causal
from mmzoo.masks.frame_block import frame_block_causal, full_visual
from mmzoo.masks.modality_mutual import modality_mutual
from mmzoo.masks.multimodal_causal import multimodal_causal
from mmzoo.masks.rule import Class, Relation, Rule, Term, Value, see
from mmzoo.masks.temporal import block_causal, causal_temporal, scale_causal, sink_window, teacher_forcing

RULES: dict[str, Callable[..., Rule | tuple[Rule, Rule]]] = {
    "causal": causal,
    "bidirectional": bidirectional,
    "prefix": prefix,
    "sliding-window": sliding_window,
    "modality-mutual": modality_mutual,
    "concentric-causal": concentric_causal,
    "frame-block-causal": frame_block_causal,
    "full-visual": full_visual,
    "ccam": causal_cross_attention,
    "causal-qformer": causal_qformer,
    "mmca": multimodal_causal,
    "causal-temporal": causal_temporal,
    "block-causal": block_causal,
    "sink-window": sink_window,
    "teacher-forcing": teacher_forcing,
    "scale-causal": scale_causal,
}


def rule(name: str, **options: Any) -> Rule | tuple[Rule, Rule]:
    """A rule by name; two-softmax attention is a pair. Raises InputError for an unknown one."""
    if name not in RULES:
        raise InputError(f"Unknown rule {name!r}. Known: {', '.join(RULES)}.")
    return RULES[name](**options)


__all__ = [
    "RULES", "Class", "Relation", "Rule", "Term", "Value", "bidirectional", "block_causal", "causal",
    "causal_cross_attention", "causal_qformer", "causal_temporal", "concentric_causal", "frame_block_causal",
    "full_visual", "modality_mutual", "multimodal_causal", "prefix", "rule", "scale_causal", "see", "sink_window",
    "sliding_window", "teacher_forcing",
]  # fmt: skip
