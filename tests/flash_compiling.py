"""Compile a kernel of mmzoo_kernels.flash_kernels for a GPU that need not be there: prints its shared memory in bytes.

python tests/flash_compiling.py KERNEL CAPABILITY HEAD_DIM DTYPE [KERNEL CAPABILITY HEAD_DIM DTYPE ...]
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmzoo_kernels import flash_kernels
from mmzoo_kernels.flash import blocks

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
TENSORS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")
TABLES = (
    *("query_sample", "key_sample", "lower", "upper", "key_value"),
    *("partial_count", "partial_index", "full_count", "full_index"),
)


def shared_memory(
    kernel: str, capability: int, head_dim: int, dtype: str, size: int = 128, terms: int = 2, branches: int = 1
) -> int:
    function = getattr(flash_kernels, kernel)
    options = blocks(head_dim, getattr(torch, dtype), size, SHARED_MEMORY[capability])[kernel.split("_")[0]]
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    wide = triton.next_power_of_2(head_dim)
    constants = {"TERMS": terms, "D": head_dim, "WIDE": wide, "SIZE": size, **options}
    constants |= {"PRECISION": "tf32x3" if dtype == "float32" else "tf32", "BRANCHES": branches}
    signature = {}
    for name in function.arg_names:
        if name in TENSORS:
            signature[name] = TYPES[dtype]
        elif name in TABLES:
            signature[name] = "*i32"
        elif name in ("lse", "delta"):
            signature[name] = "*fp32"
        elif name == "scale":
            signature[name] = "fp32"
        else:
            signature[name] = "constexpr" if name in constants else "i32"
    known = {name: value for name, value in constants.items() if name in function.arg_names}
    # What a launch finds out by itself: pointers and strides that are multiples of 16.
    multiples = ("_batch", "_head", "_row")
    whole = [i for i, name in enumerate(function.arg_names) if signature[name][0] == "*" or name.endswith(multiples)]
    source = ASTSource(function, signature, known, {(i,): [["tt.divisibility", 16]] for i in whole})
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


if __name__ == "__main__":
    words = sys.argv[1:]
    for kernel, capability, head_dim, dtype in zip(*(words[i::4] for i in range(4)), strict=True):
        used = shared_memory(kernel, int(capability), int(head_dim), dtype)
        assert used <= SHARED_MEMORY[int(capability)], f"{kernel} needs {used} bytes of shared memory on sm{capability}"
        print(kernel, capability, head_dim, dtype, used, flush=True)
