"""Attention of a few new tokens to a cache in Triton, split over the keys.

Key and value are one tensor, so each tile of the cache is read once for both roles. One head of one sequence is too
little work for a GPU. Several programs therefore share its keys, and a second kernel merges their sums. The cache is
one tensor for each sequence, or a pool of blocks with a table of the blocks of each sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .arithmetic import dot, rounded
from .configurations import configuration, once

LOG2E = 1.4426950408889634
MAX_WIDTH = 256
MAX_QUERIES = 64
"""Largest number of new tokens at a time. More tokens are a prompt, whose attention is not decoding."""
ROUNDS = 4
"""Target number of programs per multiprocessor, so that enough reads are in flight."""


def why_not(w: Tensor, cache: Tensor) -> str | None:
    """The reason why the kernel cannot run on ``w (B, M, H, p)`` and ``cache (B, N, H, p)``; None if it can."""
    _, queries, _, width = w.shape
    if not 8 <= width <= MAX_WIDTH:
        return f"the Triton decoding kernel takes heads of width 8 to {MAX_WIDTH}, not {width}"
    if queries > MAX_QUERIES:
        return f"the Triton decoding kernel takes up to {MAX_QUERIES} new tokens at a time, not {queries}"
    if torch.is_grad_enabled() and (w.requires_grad or cache.requires_grad):
        return "the Triton decoding kernel has no gradient"
    return launch.why_not(w)


def decode(w: Tensor, cache: Tensor, positions: Tensor, scale: float, table: Tensor | None = None) -> Tensor:
    """``w (B, M, H, p)``, ``cache (B, N, H, p)``, ``positions (B, M)`` int64 in 0..N-1 -> ``(B, M, H, p)``.

    ``o_i = softmax_j(scale · w_i · cache_j) cache_j`` over ``j <= positions_i``. With ``table (B, T)``, int32 or int64,
    the cache is ``(blocks, S, H, p)``, N is T·S, and ``cache_j`` is ``cache[table[b, j // S], j % S]``.
    """
    batch, queries, heads, width = w.shape
    w, cache, positions = launch.unit_stride(w), launch.unit_stride(cache), positions.contiguous()
    page, keys = 0, cache.shape[1]
    if table is not None:
        table, page, keys = table.contiguous(), keys, keys * table.shape[1]
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    if o.numel() == 0:
        return o
    splits, span, options, merge = _options(
        w.device, w.dtype, batch * heads, queries, keys, width, page, launch.dot_precision(w.dtype)
    )
    part, lse = o, None
    if splits > 1:
        part = torch.empty((batch * heads, splits, queries, width), dtype=torch.float32, device=w.device)
        lse = torch.empty((batch * heads, splits, queries), dtype=torch.float32, device=w.device)
    launch.launch(
        _decode, batch * heads * splits,
        w, cache, table, positions, part, lse, *w.stride()[:3], *cache.stride()[:3],
        heads, queries, keys, cache.shape[0], splits, span, scale * LOG2E, **options,
    )  # fmt: skip
    if splits > 1:
        launch.launch(_merge, batch * heads * queries, part, lse, o, heads, queries, splits, **merge)
    return o


@once
def _options(
    device: torch.device,
    dtype: torch.dtype,
    pairs: int,
    queries: int,
    keys: int,
    width: int,
    page: int,
    precision: str,
) -> tuple[int, int, dict, dict]:
    """The number of programs that share the keys of a head, the keys of each, and the parameters of both kernels."""
    options = configuration("decoding", device, dtype, keys, width)
    block = options["BLOCK_N"]
    tiles = triton.cdiv(keys, block)
    splits = max(1, min(triton.cdiv(ROUNDS * launch.multiprocessors(device), pairs), tiles // 2))
    span = triton.cdiv(tiles, splits) * block
    splits = triton.cdiv(keys, span)
    shape = {"P": width, "WIDTH": max(16, triton.next_power_of_2(width))}
    # One query needs no matrix product. tl.dot multiplies at least 16 rows.
    rows = 1 if queries == 1 else max(16, triton.next_power_of_2(queries))
    options |= shape | {"BLOCK_M": rows, "PAGE": page, "STAGES": options["num_stages"], "PRECISION": precision}
    return splits, span, options, shape | {"SPLITS": triton.next_power_of_2(splits), "num_warps": 4}


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _decode(
    w, cache, table, positions, out, lse, w_b, w_m, w_h, c_b, c_n, c_h, heads, queries, keys, blocks, splits, span,
    scale,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The attention of the queries of one head to the keys of one split. Without ``lse`` there is only one split."""
    split = tl.program_id(0) % splits
    head = tl.program_id(0) // splits
    batch = (head // heads).to(tl.int64)
    inner = (head % heads).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    column = tl.arange(0, WIDTH)[None, :]
    m_in = (m < queries)[:, None]
    c_in = column < P
    place = tl.load(positions + batch * queries + m, mask=m < queries, other=-1)
    place = tl.minimum(place, keys - 1).to(tl.int32)  # valid whatever the positions contain
    end = tl.minimum(tl.max(place, 0) + 1, (split + 1) * span)
    q = tl.load(w + batch * w_b + inner * w_h + m[:, None] * w_m + column, mask=m_in & c_in, other=0.0)
    if BLOCK_M == 1:
        q = q.to(tl.float32)
    cache += inner * c_h
    if table is None:
        cache += batch * c_b
    else:
        table += batch * (keys // PAGE)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -3.0e38, tl.float32)
    # Stages are requested explicitly, because Triton itself prefetches only operands of a matrix product.
    for start in tl.range(split * span, end, BLOCK_N, num_stages=STAGES):
        key = start + n
        if table is None:
            row = tl.cast(key, tl.int64) * c_n
        else:
            # One entry for each key, even if a block contains the whole tile. A single entry would not be prefetched.
            block = tl.load(table + key // PAGE, mask=key < end, other=0)
            block = tl.minimum(tl.maximum(tl.cast(block, tl.int64), 0), blocks - 1)  # valid whatever the table contains
            row = block * c_b + tl.cast(key % PAGE, tl.int64) * c_n
        at = cache + row[:, None] + column
        k = tl.load(at, mask=(key < end)[:, None] & c_in, other=0.0)
        if BLOCK_M == 1:
            k = k.to(tl.float32)
            scores = tl.sum(q * k, 1)[None, :] * scale
        else:
            scores = dot(q, tl.trans(k), None, PRECISION) * scale
        seen = (key[None, :] <= place[:, None]) & (key < end)[None, :]
        higher = tl.maximum(top, tl.max(tl.where(seen, scores, -3.0e38), 1))
        p = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc *= shrink[:, None]
        if BLOCK_M == 1:
            acc += tl.sum(tl.trans(p) * k, 0)[None, :]
        else:
            acc = dot(rounded(p, k.dtype), k, acc, PRECISION)
        top = higher
    o = tl.where(total[:, None] > 0, acc / total[:, None], acc)  # NaN stays; a split without keys gives zeros
    if lse is None:
        at = out + ((batch * queries + m[:, None]) * heads + inner) * P + column
        tl.store(at, rounded(o, out.dtype.element_ty), mask=m_in & c_in)
    else:
        at = tl.program_id(0).to(tl.int64) * queries + m
        tl.store(lse + at, tl.where(total == 0, float("-inf"), top + tl.log2(total)), mask=m < queries)
        tl.store(out + at[:, None] * P + column, o, mask=m_in & c_in)


@triton.jit
def _merge(
    part, lse, o, heads, queries, splits, P: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query of one head: the mean of its splits, weighted by their sums of exponentials."""
    m = tl.program_id(0) % queries
    head = (tl.program_id(0) // queries).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, WIDTH)
    at = (head * splits + split) * queries + m
    own = tl.load(lse + at, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(own - tl.max(own, 0))
    inside = (split < splits)[:, None] & (column < P)[None, :]
    parts = tl.load(part + at[:, None] * P + column[None, :], mask=inside, other=0.0)
    mean = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    at = o + ((head // heads * queries + m) * heads + head % heads) * P + column
    tl.store(at, rounded(mean, o.dtype.element_ty), mask=column < P)
