"""Attention masks as tiles, and fused kernels beside their naive references."""
