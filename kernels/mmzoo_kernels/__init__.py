"""Attention masks as tiles, attention algorithms, and fused kernels beside their naive references."""

from mmzoo_kernels.registry import AttentionAlgorithm, list_attentions

__all__ = ["AttentionAlgorithm", "list_attentions"]
