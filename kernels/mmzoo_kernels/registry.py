"""The attention algorithms that are here, and what each is good for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATTERNS = ("causal self", "full self", "causal cross", "full cross")


@dataclass(frozen=True)
class AttentionAlgorithm:
    """One algorithm.

    Attributes:
        name: how it is called here.
        complexity: of a head, over N tokens (Q queries, K keys) of head dim D and value dim E.
        state: what decoding the next token needs of the tokens before it, a head.
        patterns: which of `PATTERNS` it serves.
        source: where it is defined.
        path: `module:name` of its code, here or in the library that has it.
    """

    name: str
    complexity: str
    state: str
    patterns: tuple[str, ...]
    source: str
    path: str

    @property
    def causal(self) -> bool:
        return any(pattern.startswith("causal") for pattern in self.patterns)

    @property
    def cross(self) -> bool:
        return any(pattern.endswith("cross") for pattern in self.patterns)

    def load(self) -> Callable[..., Any]:
        """The function or module class. Nothing is imported before."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


_EVERY_TOKEN = "N (D + E): every key and value"

_ALL = (
    AttentionAlgorithm(
        "softmax", "Q K (D + E)", _EVERY_TOKEN, PATTERNS, "arXiv 1706.03762", "mmzoo_kernels.softmax:softmax_attention"
    ),
    AttentionAlgorithm(
        "masked",
        "open tiles (D + E)",
        _EVERY_TOKEN,
        PATTERNS,
        "fused kernels of this package, under any compact mask; one softmax or several",
        "mmzoo_kernels.flash:masked_attention",
    ),
    AttentionAlgorithm(
        "lightning-2",
        "N (chunk (D + E) + D E)",
        "D E",
        ("causal self",),
        "arXiv 2401.04658",
        "mmzoo_kernels.lightning:lightning_attention",
    ),
    AttentionAlgorithm(
        "second-order-hla",
        "N (chunk + D) (D + E)",
        "D D + 2 D (E + 1)",
        ("causal self",),
        "arXiv 2510.27258, Algorithm 1",
        "mmzoo_kernels.higher_order:second_order_attention",
    ),
    AttentionAlgorithm(
        "core-context",
        "N (N / group + window + group) (D + E)",
        "(N / group + window + group) (D + E)",
        ("causal self",),
        "arXiv 2412.12465",
        "mmzoo_kernels.core_context:core_context_attention",
    ),
    AttentionAlgorithm(
        "query-key-drop",
        "kept Q x kept K (D + E)",
        "kept K (D + E)",
        ("causal self",),
        "arXiv 2306.01160",
        "mmzoo_kernels.sparse:drop_attention",
    ),
    AttentionAlgorithm(
        "hash-sparse",
        "N N / buckets (D + E), if the buckets are even",
        _EVERY_TOKEN,
        ("causal self",),
        "arXiv 2306.01160",
        "mmzoo_kernels.sparse:hash_attention",
    ),
    AttentionAlgorithm(
        "mosa",
        "(N / sparsity)^2 (D + E)",
        "none: the choice of tokens looks ahead",
        ("full self",),
        "arXiv 2505.00315",
        "mmzoo_kernels.mosa:MoSA",
    ),
    AttentionAlgorithm(
        "low-rank-bias",
        "Q K (D + rank + E)",
        "N (D + rank + E)",
        ("causal self", "full self", "full cross"),
        "arXiv 2505.12044",
        "mmzoo_kernels.low_rank_bias:low_rank_bias_attention",
    ),
    AttentionAlgorithm(
        "compressed-convolution",
        "N N (D + E) in a narrower latent space",
        "N (D + E), the last steps before the convolutions, and one delayed value",
        ("causal self",),
        "arXiv 2510.04476",
        "transformers.models.zaya.modeling_zaya:ZayaAttention",
    ),
    AttentionAlgorithm(
        "relay",
        "Q K (D + E); a shared prefix is read once a batch",
        "(prefix once + N) (D + E)",
        ("causal self", "full cross"),
        "arXiv 2402.14808",
        "mmzoo_kernels.relay:relay_attention",
    ),
    AttentionAlgorithm(
        "mixture-of-contexts",
        "N (C D + (text + shot + k chunks) (D + E)) with C chunks",
        "N (D + E), and a mean key a chunk",
        ("full self",),
        "arXiv 2508.21058",
        "mmzoo_kernels.contexts:mixture_of_contexts",
    ),
)


def list_attentions() -> list[AttentionAlgorithm]:
    """Every algorithm, in a fixed order."""
    return list(_ALL)
