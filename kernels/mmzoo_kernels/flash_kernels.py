"""Triton kernels of attention under compact masks: forward, and a backward without atomics, hence deterministic.

What they are given is described in `mmzoo_kernels.flash`. Scores are kept in base 2.

Shape legend: Z masks (branches x batch), B batch, H query heads, G key/value heads, Q queries, K keys, D head dim, T
terms; M and N are the sides of a block, which divide a tile of the lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _opened(
    query_sample, key_sample, lower, upper, value, z, rows, columns, padded_q, padded_k, TERMS: tl.constexpr
):  # fmt: skip
    """bool [rows, columns]. The arrays are padded to whole tiles, and padding is open to nothing."""
    of_query = tl.load(query_sample + z * padded_q + rows)
    of_key = tl.load(key_sample + z * padded_k + columns)
    same = (of_query[:, None] == of_key[None, :]) & (of_key != -1)[None, :]
    inside = same & False
    for t in tl.static_range(TERMS):
        least = tl.load(lower + (z * TERMS + t) * padded_q + rows)
        most = tl.load(upper + (z * TERMS + t) * padded_q + rows)
        place = tl.load(value + (z * TERMS + t) * padded_k + columns)
        inside = inside | ((least[:, None] <= place[None, :]) & (place[None, :] <= most[:, None]))
    return same & inside


@triton.jit
def _rows_of(base, rows, stride, length, D: tl.constexpr, WIDE: tl.constexpr):
    """[rows, WIDE] of a matrix [length, D], zeros outside."""
    dims = tl.arange(0, WIDE)
    inside = (rows < length)[:, None] & (dims < D)[None, :]
    return tl.load(base + rows[:, None].to(tl.int64) * stride + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(base, rows, stride, length, matrix, D: tl.constexpr, WIDE: tl.constexpr):
    dims = tl.arange(0, WIDE)
    inside = (rows < length)[:, None] & (dims < D)[None, :]
    tl.store(base + rows[:, None].to(tl.int64) * stride + dims[None, :], matrix.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _tile(index, i, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The places of the i-th block of a list of tiles."""
    per_tile: tl.constexpr = SIZE // BLOCK
    return tl.load(index + i // per_tile) * SIZE + (i % per_tile) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def forward(
    query, key, value, output, lse,
    query_sample, key_sample, lower, upper, key_value, partial_count, partial_index, full_count, full_index,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    batch, heads, group, queries, keys, padded_q, padded_k, scale,
    TERMS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [Z, H, Q, D] and log-sum-exp [Z, H, Q] of a block of queries."""
    z, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = tl.program_id(0) * M + tl.arange(0, M)
    b, g = (z % batch).to(tl.int64), h // group
    key += b * k_batch + g * k_head
    value += b * v_batch + g * v_head
    q = _rows_of(query + b * q_batch + h * q_head, rows, q_row, queries, D, WIDE)
    listed = z * (padded_q // SIZE) + tl.program_id(0) // (SIZE // M)
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.full([M], 0.0, tl.float32)
    summed = tl.full([M, WIDE], 0.0, tl.float32)
    for masked in tl.static_range(2):
        count, index = (partial_count, partial_index) if masked else (full_count, full_index)
        index += listed * (padded_k // SIZE)
        for i in range(tl.load(count + listed) * (SIZE // N)):
            columns = _tile(index, i, SIZE, N)
            k = _rows_of(key, columns, k_row, keys, D, WIDE)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            if masked:
                open_pairs = _opened(
                    query_sample, key_sample, lower, upper, key_value, z, rows, columns, padded_q, padded_k, TERMS
                )
                scores = tl.where(open_pairs, scores, float("-inf"))
            larger = tl.maximum(most, tl.max(scores, 1))
            reference = tl.where(larger == float("-inf"), 0.0, larger)
            weights = tl.exp2(scores - reference[:, None])
            kept = tl.exp2(most - reference)
            total = total * kept + tl.sum(weights, 1)
            v = _rows_of(value, columns, v_row, keys, D, WIDE)
            summed = summed * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            most = larger
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    summed = summed / total[:, None]
    _store_rows(output + z.to(tl.int64) * o_batch + h * o_head, rows, o_row, queries, summed, D, WIDE)
    logs = tl.where(empty, float("-inf"), most * LN_2 + tl.log(total))
    tl.store(lse + tl.program_id(1).to(tl.int64) * queries + rows, logs, mask=rows < queries)


@triton.jit
def _statistics(lse, delta, first, rows, queries):
    """Log-sum-exp in base 2 and delta of some rows; where nothing is open, every score is -inf and 0 does."""
    logs = tl.load(lse + first + rows, mask=rows < queries, other=0.0)
    return tl.where(logs == float("-inf"), 0.0, logs) * LOG2_E, tl.load(
        delta + first + rows, mask=rows < queries, other=0.0
    )


@triton.jit
def backward_query(
    query, key, value, grad_output, lse, delta, grad_query,
    query_sample, key_sample, lower, upper, key_value, partial_count, partial_index, full_count, full_index,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    batch, heads, group, queries, keys, padded_q, padded_k, scale,
    BRANCHES: tl.constexpr, TERMS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient [B, H, Q, D] of a block of queries, contiguous."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    rows = tl.program_id(0) * M + tl.arange(0, M)
    wide_b, g = b.to(tl.int64), h // group
    key += wide_b * k_batch + g * k_head
    value += wide_b * v_batch + g * v_head
    q = _rows_of(query + wide_b * q_batch + h * q_head, rows, q_row, queries, D, WIDE)
    grad = _rows_of(grad_output + wide_b * o_batch + h * o_head, rows, o_row, queries, D, WIDE)
    summed = tl.full([M, WIDE], 0.0, tl.float32)
    for branch in tl.static_range(BRANCHES):
        z = branch * batch + b
        logs, means = _statistics(lse, delta, (z * heads + h).to(tl.int64) * queries, rows, queries)
        listed = z * (padded_q // SIZE) + tl.program_id(0) // (SIZE // M)
        for masked in tl.static_range(2):
            count, index = (partial_count, partial_index) if masked else (full_count, full_index)
            index += listed * (padded_k // SIZE)
            for i in range(tl.load(count + listed) * (SIZE // N)):
                columns = _tile(index, i, SIZE, N)
                k = _rows_of(key, columns, k_row, keys, D, WIDE)
                v = _rows_of(value, columns, v_row, keys, D, WIDE)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
                if masked:
                    open_pairs = _opened(
                        query_sample, key_sample, lower, upper, key_value, z, rows, columns, padded_q, padded_k, TERMS
                    )
                    scores = tl.where(open_pairs, scores, float("-inf"))
                weights = tl.exp2(scores - logs[:, None])
                pulled = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                change = weights * (pulled - means[:, None])
                summed += tl.dot(change.to(k.dtype), k, input_precision=PRECISION)
    _store_rows(
        grad_query + tl.program_id(1).to(tl.int64) * queries * D, rows, D, queries, summed * scale, D, WIDE
    )  # fmt: skip


@triton.jit
def backward_key_value(
    query, key, value, grad_output, lse, delta, grad_key, grad_value,
    query_sample, key_sample, lower, upper, key_value, partial_count, partial_index, full_count, full_index,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    batch, heads, group, queries, keys, padded_q, padded_k, scale,
    BRANCHES: tl.constexpr, TERMS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients [B, G, K, D] of a block of keys and values, contiguous; the lists are those by key."""
    kv_heads = heads // group
    b, g = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    columns = tl.program_id(0) * N + tl.arange(0, N)
    wide_b = b.to(tl.int64)
    k = _rows_of(key + wide_b * k_batch + g * k_head, columns, k_row, keys, D, WIDE)
    v = _rows_of(value + wide_b * v_batch + g * v_head, columns, v_row, keys, D, WIDE)
    summed_k, summed_v = tl.full([N, WIDE], 0.0, tl.float32), tl.full([N, WIDE], 0.0, tl.float32)
    for branch in tl.static_range(BRANCHES):
        z = branch * batch + b
        listed = z * (padded_k // SIZE) + tl.program_id(0) // (SIZE // N)
        for masked in tl.static_range(2):
            count, index = (partial_count, partial_index) if masked else (full_count, full_index)
            index += listed * (padded_q // SIZE)
            blocks = tl.load(count + listed) * (SIZE // M)
            for i in range(blocks * group):
                h = g * group + i // blocks
                rows = _tile(index, i % blocks, SIZE, M)
                q = _rows_of(query + wide_b * q_batch + h * q_head, rows, q_row, queries, D, WIDE)
                grad = _rows_of(grad_output + wide_b * o_batch + h * o_head, rows, o_row, queries, D, WIDE)
                logs, means = _statistics(lse, delta, (z * heads + h).to(tl.int64) * queries, rows, queries)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
                if masked:
                    open_pairs = _opened(
                        query_sample, key_sample, lower, upper, key_value, z, rows, columns, padded_q, padded_k, TERMS
                    )
                    scores = tl.where(open_pairs, scores, float("-inf"))
                weights = tl.exp2(scores - logs[:, None])
                summed_v += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=PRECISION)
                pulled = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                change = weights * (pulled - means[:, None])
                summed_k += tl.dot(tl.trans(change.to(q.dtype)), q, input_precision=PRECISION)
    first = tl.program_id(1).to(tl.int64) * keys * D
    _store_rows(grad_key + first, columns, D, keys, summed_k * scale, D, WIDE)
    _store_rows(grad_value + first, columns, D, keys, summed_v, D, WIDE)
