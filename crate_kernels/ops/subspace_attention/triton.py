"""Subspace attention in Triton: the scores are symmetric and one tensor is query, key and value.

Forward: one program per tile of queries. The ordinary path is the online softmax. Where the norms of the tokens allow
it, ``s·w_i·w_j <= c_i + c_j`` with ``c = s‖w‖²/2`` bounds every score of row i by ``c_i + max c``: with that bound in
place of the running maximum nothing is ever rescaled. The largest term left, the row's own ``exp(c_i − max c)``, must
not underflow; each program decides that for its rows.

Backward: one program per tile of tokens, one loop over all other tokens, one output. Token i is a query to j and a key
to j, and both roles take the score ``w_i·w_j``::

    dw_i = Σ_j scale·(dS_ij + dS_ji) w_j + P_ji g_j,    dS = P∘(g valueᵀ − delta),    delta = rowsum(g∘o)

and ``P_ji = P_ij·2^(lse_i − lse_j)``, one exponential for both where the log-normalisers of a head lie close enough
together. No atomics, so gradients are bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import length_values
from ..triton_kernels import launch
from ..triton_kernels.arithmetic import dot, rounded
from ..triton_kernels.configurations import configuration

LOG2E = 1.4426950408889634
MAX_WIDTH = 256

# exp2(-RANGE) times the 24 bits of a float32 is still a normal number.
_RANGE = tl.constexpr(96.0)
# Bound and score are rounded apart: below this they differ by little, whatever the sums' order.
_LARGEST = tl.constexpr(65536.0)
_HIDDEN = tl.constexpr(-3.0e38)


def why_not(w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool) -> str | None:
    return why_not_width(w.shape[-1], w)


def why_not_width(width: int, tensor: Tensor) -> str | None:
    """The same for heads of ``width`` channels on the device and in the dtype of ``tensor``."""
    if not 8 <= width <= MAX_WIDTH:
        return f"the Triton attention kernels take heads of width 8 to {MAX_WIDTH}, not {width}"
    return launch.why_not(tensor)


def forward(
    w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """-> ``o (B, N, H, p)`` contiguous, and the base-2 log-normaliser ``lse (B, H, N)`` of the softmax rows in
    float32: a natural logarithm would be rounded twice on its way through ``exp2``."""
    batch, tokens, heads, width = w.shape
    length_values(lengths, tokens)
    w = launch.unit_stride(w)
    value = None if value is None else launch.unit_stride(value)
    lengths = None if lengths is None else lengths.contiguous()
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=w.device)
    if o.numel() == 0:
        return o, lse
    options = configuration("attention_forward", w, tokens, width)
    # Under a sum of fewer than float32's exponents, under a negative scale (no bound) or for rows that do not see
    # themselves (hidden by lengths) the bound of the rows cannot replace their maximum.
    options["MAX_FREE"] &= w.dtype != torch.float16 and scale > 0 and lengths is None
    launch.launch(
        _forward, triton.cdiv(tokens, options["BLOCK_M"]) * batch * heads,
        w, value, lengths, o, lse, *w.stride()[:3], *(w if value is None else value).stride()[:3],
        heads, tokens, abs(scale) * LOG2E,
        NEGATIVE=scale < 0, CAUSAL=causal, P=width, WIDTH=_padded(width),
        PRECISION=launch.dot_precision(w.dtype), **options,
    )  # fmt: skip
    return o, lse


def backward(
    grad: Tensor,
    w: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """-> ``(dw, dvalue)``; ``dvalue`` is None without a separate value, its part is then in ``dw``."""
    batch, tokens, heads, width = w.shape
    w, grad = launch.unit_stride(w), launch.unit_stride(grad)
    value = None if value is None else launch.unit_stride(value)
    lengths = None if lengths is None else lengths.contiguous()
    o, lse = o.contiguous(), lse.contiguous()
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    dvalue = None if value is None else torch.empty_like(dw)
    if dw.numel() == 0:
        return dw, dvalue
    delta = torch.empty_like(lse)
    shape = {"P": width, "WIDTH": _padded(width)}
    options = configuration("attention_delta", w, tokens, width)
    launch.launch(
        _delta, triton.cdiv(tokens, options["BLOCK_M"]) * batch * heads,
        o, grad, delta, *grad.stride()[:3], heads, tokens, **shape, **options,
    )  # fmt: skip
    options = configuration("attention_backward", w, tokens, width)
    launch.launch(
        _backward, triton.cdiv(tokens, options["BLOCK_M"]) * batch * heads,
        grad, w, value, lengths, lse, delta, dw, dvalue,
        *grad.stride()[:3], *w.stride()[:3], *(w if value is None else value).stride()[:3],
        heads, tokens, scale, scale * LOG2E,
        CAUSAL=causal, SEPARATE=value is not None or launch.tensor_memory(w.device),
        PRECISION=launch.dot_precision(w.dtype), **shape, **options,
    )  # fmt: skip
    return dw, dvalue


def _padded(width: int) -> int:
    """The power of two that a head's width is padded to; a matrix product takes 16 at least."""
    return max(16, triton.next_power_of_2(width))


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(head, stride, start, limit, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows start, start+1, … of a head as a tile (BLOCK, WIDTH); zero at and beyond row ``limit`` and column P."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    pointers = head + tl.cast(start, tl.int64) * stride + tl.cast(row, tl.int64) * stride + column
    if MASKED:
        return tl.load(pointers, mask=(start + row < limit) & (column < P), other=0.0)
    elif P < WIDTH:
        return tl.load(pointers, mask=column < P, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_rows(head, stride, start, limit, tile, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    pointers = head + tl.cast(start, tl.int64) * stride + tl.cast(row, tl.int64) * stride + column
    tl.store(pointers, rounded(tile, head.dtype.element_ty), mask=(start + row < limit) & (column < P))


@triton.jit
def _visible(lengths, batch, tokens):
    """The number of keys that a sequence shows; within bounds whatever ``lengths`` holds."""
    visible = tokens
    if lengths is not None:
        visible = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int64), 0), tokens).to(tl.int32)
    return visible


@triton.jit
def _attend(
    q, acc, total, top, w, w_n, value, v_n, first, start, visible, scale,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys start … start + BLOCK_N to the softmax sums of a tile of queries."""
    k = _rows(w, w_n, start, visible, P, WIDTH, BLOCK_N, MASKED)
    v = k
    if value is not None:
        v = _rows(value, v_n, start, visible, P, WIDTH, BLOCK_N, MASKED)
    scores = dot(q, tl.trans(k), None, PRECISION)
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)[None, :]
        seen = key < visible
        if CAUSAL:
            seen = seen & (key <= first + tl.arange(0, BLOCK_M)[:, None])
        scores = tl.where(seen, scores, _HIDDEN)
    if ONLINE:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        shrink = tl.exp2(top - higher)
        acc *= shrink[:, None]
        total *= shrink
        top = higher
    p = tl.exp2(scores * scale - top[:, None])
    if MASKED:
        # Not left to the exponential: a hidden key would weigh exp(0) in a row whose bound it has lowered itself.
        p = tl.where(seen, p, 0.0)
    total += tl.sum(p, 1)
    acc = dot(rounded(p, v.dtype), v, acc, PRECISION)
    return acc, total, top


@triton.jit
def _forward(
    w, value, lengths, o, lse, w_b, w_n, w_h, v_b, v_n, v_h, heads, tokens, scale,
    NEGATIVE: tl.constexpr, CAUSAL: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    MAX_FREE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_M)
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    batch = (head // heads).to(tl.int64)
    w += batch * w_b + (head % heads).to(tl.int64) * w_h
    if value is not None:
        value += batch * v_b + (head % heads).to(tl.int64) * v_h
    first = tile * BLOCK_M
    visible = _visible(lengths, batch, tokens)
    end = visible
    full = visible
    if CAUSAL:
        end = tl.minimum(visible, first + BLOCK_M)
        full = tl.minimum(visible, first)
    full = full // BLOCK_N * BLOCK_N

    q = _rows(w, w_n, first, tokens, P, WIDTH, BLOCK_M, True)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    online = True
    if MAX_FREE:
        row = first + tl.arange(0, BLOCK_M)
        largest = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, end, BLOCK_N):
            k = _rows(w, w_n, start, visible, P, WIDTH, BLOCK_N, True).to(tl.float32)
            largest = tl.maximum(largest, tl.sum(k * k, 1))
        highest = tl.max(largest, 0) * (scale * 0.5)
        norm = tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) * (scale * 0.5)
        lowest = tl.min(tl.where(row < tokens, norm, highest), 0)
        # Norms all large and nearly equal pass the first test, yet the rounded bound may lie far from the scores.
        # inf fails both. NaN may pass, as hardware drops it from maxima: it still reaches the row's top or its scores.
        bounded = (highest - lowest <= _RANGE) & (highest <= _LARGEST)
        online = bounded == 0
        if bounded:
            top = norm + highest
            for start in range(0, full, BLOCK_N):
                acc, total, top = _attend(
                    q, acc, total, top, w, w_n, value, v_n, first, start, visible, scale,
                    P, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, False, False, PRECISION,
                )  # fmt: skip
            for start in range(full, end, BLOCK_N):
                acc, total, top = _attend(
                    q, acc, total, top, w, w_n, value, v_n, first, start, visible, scale,
                    P, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, True, False, PRECISION,
                )  # fmt: skip
    if online:
        if NEGATIVE:
            q = rounded(-q.to(tl.float32), q.dtype)
        for start in range(0, full, BLOCK_N):
            acc, total, top = _attend(
                q, acc, total, top, w, w_n, value, v_n, first, start, visible, scale,
                P, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, False, True, PRECISION,
            )  # fmt: skip
        for start in range(full, end, BLOCK_N):
            acc, total, top = _attend(
                q, acc, total, top, w, w_n, value, v_n, first, start, visible, scale,
                P, WIDTH, BLOCK_M, BLOCK_N, CAUSAL, True, True, PRECISION,
            )  # fmt: skip

    row = first + tl.arange(0, BLOCK_M)
    tl.store(lse + head.to(tl.int64) * tokens + row, top + tl.log2(total), mask=row < tokens)
    o += (batch * tokens * heads + head % heads) * P
    _store_rows(o, heads * P, first, tokens, acc / total[:, None], P, WIDTH, BLOCK_M)


@triton.jit
def _delta(o, g, delta, g_b, g_n, g_h, heads, tokens, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """``delta = rowsum(g∘o)``, (B, H, N)."""
    tiles = tl.cdiv(tokens, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    batch = (head // heads).to(tl.int64)
    o += (batch * tokens * heads + head % heads) * P
    g += batch * g_b + (head % heads).to(tl.int64) * g_h
    product = _rows(o, heads * P, first, tokens, P, WIDTH, BLOCK_M, True).to(tl.float32)
    product *= _rows(g, g_n, first, tokens, P, WIDTH, BLOCK_M, True).to(tl.float32)
    row = first + tl.arange(0, BLOCK_M)
    tl.store(delta + head.to(tl.int64) * tokens + row, tl.sum(product, 1), mask=row < tokens)


@triton.jit
def _pair(
    dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
    g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr, DIAGONAL: tl.constexpr, MASKED: tl.constexpr, HIDING: tl.constexpr,
    SYMMETRIC: tl.constexpr, SEPARATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of tile i what tile j contributes: as keys of i (QUERY), as queries to i (KEY), or both.

    ``slope`` is ``scale·log2 e`` rounded once, as in the forward: else large scores would miss their log-normaliser.
    """
    i = first + tl.arange(0, BLOCK_M)[:, None]
    j = start + tl.arange(0, BLOCK_N)
    w_j = _rows(w, w_n, start, tokens, P, WIDTH, BLOCK_N, MASKED)
    scores = dot(w_i, tl.trans(w_j), None, PRECISION) * slope
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if QUERY:
        v_j = w_j
        if value is not None:
            v_j = _rows(value, v_n, start, tokens, P, WIDTH, BLOCK_N, MASKED)
        p = tl.exp2(scores - lse_i[:, None])
        if DIAGONAL:
            p = tl.where((j[None, :] < visible) & (j[None, :] <= i), p, 0.0)
        elif MASKED or HIDING:
            p = tl.where(j[None, :] < visible, p, 0.0)
        ds += p * dot(g_i, tl.trans(v_j), tl.broadcast_to(-delta_i[:, None], [BLOCK_M, BLOCK_N]), PRECISION)
    if KEY:
        g_j = _rows(g, g_n, start, tokens, P, WIDTH, BLOCK_N, MASKED)
        # No query beyond the last token: exp(-inf).
        lse_j = tl.load(lse + j, mask=j < tokens, other=float("inf"))
        delta_j = tl.load(delta + j, mask=j < tokens, other=0.0)
        if SYMMETRIC:
            p = p * tl.exp2(lse_i - middle)[:, None] * tl.exp2(middle - lse_j)[None, :]
        else:
            p = tl.exp2(scores - lse_j[None, :])
            if DIAGONAL:
                p = tl.where((i < visible) & (i <= j[None, :]), p, 0.0)
            elif HIDING:
                p = tl.where(i < visible, p, 0.0)
        ds += p * dot(v_i, tl.trans(g_j), tl.broadcast_to(-delta_j[None, :], [BLOCK_M, BLOCK_N]), PRECISION)
        if SEPARATE:
            dv = dot(rounded(p, g_j.dtype), g_j, dv, PRECISION)
        else:
            dw = dot(rounded(p, g_j.dtype), g_j, dw, PRECISION)
    dw = dot(rounded(ds * scale, w_j.dtype), w_j, dw, PRECISION)
    return dw, dv


@triton.jit
def _backward(
    g, w, value, lengths, lse, delta, dw_out, dv_out, g_b, g_n, g_h, w_b, w_n, w_h, v_b, v_n, v_h,
    heads, tokens, scale, slope,
    CAUSAL: tl.constexpr, SEPARATE: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    tl.static_assert(SEPARATE or value is None)
    HIDING: tl.constexpr = lengths is not None
    tiles = tl.cdiv(tokens, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    batch = (head // heads).to(tl.int64)
    inner = (head % heads).to(tl.int64)
    visible = _visible(lengths, batch, tokens)
    g += batch * g_b + inner * g_h
    w += batch * w_b + inner * w_h
    lse += head.to(tl.int64) * tokens
    delta += head.to(tl.int64) * tokens

    row = first + tl.arange(0, BLOCK_M)
    w_i = _rows(w, w_n, first, tokens, P, WIDTH, BLOCK_M, True)
    g_i = _rows(g, g_n, first, tokens, P, WIDTH, BLOCK_M, True)
    v_i = w_i
    if value is not None:
        value += batch * v_b + inner * v_h
        v_i = _rows(value, v_n, first, tokens, P, WIDTH, BLOCK_M, True)
    lse_i = tl.load(lse + row, mask=row < tokens, other=0.0)
    delta_i = tl.load(delta + row, mask=row < tokens, other=0.0)
    dw = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_M, WIDTH], tl.float32) if SEPARATE else dw

    if CAUSAL:
        for start in range(0, tl.minimum(first, visible), BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
                g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P, WIDTH, BLOCK_M, BLOCK_N, True, False, False, False, HIDING, False, SEPARATE, PRECISION,
            )  # fmt: skip
        after = tl.minimum(first + BLOCK_M, tokens)
        # Both roles at once would need one product less on these few tiles, and more registers in the whole kernel.
        for start in range(first, tl.minimum(after, visible), BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
                g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P, WIDTH, BLOCK_M, BLOCK_N, True, False, True, True, HIDING, False, SEPARATE, PRECISION,
            )  # fmt: skip
        for start in range(first, after, BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
                g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P, WIDTH, BLOCK_M, BLOCK_N, False, True, True, True, HIDING, False, SEPARATE, PRECISION,
            )  # fmt: skip
        end = tokens
        if first >= visible:
            end = after  # hidden keys have no queries
        for start in range(first + BLOCK_M, end, BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
                g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P, WIDTH, BLOCK_M, BLOCK_N, False, True, False, True, HIDING, False, SEPARATE, PRECISION,
            )  # fmt: skip
    else:
        symmetric = False
        middle = 0.0
        end = tokens
        if HIDING:
            if first >= visible:
                end = visible
        else:
            index = tl.arange(0, 256)
            low = tl.full([256], float("inf"), tl.float32)
            high = -low
            for start in range(0, tokens, 256):
                inside = start + index < tokens
                some = tl.load(lse + start + index, mask=inside, other=float("nan"))
                low = tl.minimum(low, tl.where(inside, some, low))
                high = tl.maximum(high, tl.where(inside, some, high))
            lowest = tl.min(low, 0)
            highest = tl.max(high, 0)
            middle = (lowest + highest) * 0.5
            symmetric = highest - lowest <= _RANGE
        full = end // BLOCK_N * BLOCK_N
        if symmetric:
            for start in range(0, full, BLOCK_N):
                dw, dv = _pair(
                    dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
                    g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
                    P, WIDTH, BLOCK_M, BLOCK_N, True, True, False, False, HIDING, True, SEPARATE, PRECISION,
                )  # fmt: skip
            for start in range(full, end, BLOCK_N):
                dw, dv = _pair(
                    dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
                    g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
                    P, WIDTH, BLOCK_M, BLOCK_N, True, True, False, True, HIDING, True, SEPARATE, PRECISION,
                )  # fmt: skip
        else:
            for start in range(0, end, BLOCK_N):
                dw, dv = _pair(
                    dw, dv, w_i, g_i, v_i, lse_i, delta_i, first, start,
                    g, w, value, lse, delta, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
                    P, WIDTH, BLOCK_M, BLOCK_N, True, True, False, True, HIDING, False, SEPARATE, PRECISION,
                )  # fmt: skip

    if SEPARATE and value is None:
        dw += dv
    dw_out += (batch * tokens * heads + inner) * P
    _store_rows(dw_out, heads * P, first, tokens, dw, P, WIDTH, BLOCK_M)
    if value is not None:
        dv_out += (batch * tokens * heads + inner) * P
        _store_rows(dv_out, heads * P, first, tokens, dv, P, WIDTH, BLOCK_M)
