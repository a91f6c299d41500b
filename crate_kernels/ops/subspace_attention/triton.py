"""Subspace attention in Triton: the scores are symmetric and one tensor is query, key and value.

Forward: one program per tile of queries computes the online softmax. The tiles that a mask cuts come first, as
straight-line code. One loop over whole tiles follows.

Backward: one program per tile of tokens has one loop over all other tokens and one output. Token i is a query to j and
a key to j. Both roles use the score ``w_i·w_j``::

    dw_i = Σ_j scale·(dS_ij + dS_ji) w_j + P_ji g_j,    dS = P∘(g valueᵀ − delta),    delta = rowsum(g∘o)

and ``P_ji = P_ij·2^(lse_i − lse_j)``, so one exponential serves both roles if the log-normalizers of a head are small
and close enough. There are no atomics, so gradients are bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import finite_where_hidden
from ..triton_kernels import launch
from ..triton_kernels.arithmetic import dot, rounded
from ..triton_kernels.configurations import configuration, once

LOG2E = 1.4426950408889634
MAX_WIDTH = 256

# exp2(-RANGE) times the 24 bits of a float32 is still a normal number.
_RANGE = tl.constexpr(96.0)
# Up to here a score and its log-normalizer differ by a fraction of 1 through rounding.
_LARGE = tl.constexpr(2.0**22)
_HIDDEN = tl.constexpr(-3.0e38)


def why_not(w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool) -> str | None:
    return why_not_width(w.shape[-1], w)


def why_not_width(width: int, tensor: Tensor) -> str | None:
    """The reason for heads of ``width`` channels, on the device and in the dtype of ``tensor``; None if the kernels can
    run."""
    if not 8 <= width <= MAX_WIDTH:
        return f"the Triton attention kernels take heads of width 8 to {MAX_WIDTH}, not {width}"
    return launch.why_not(tensor)


def _operands(w: Tensor, value: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The kernels' operands. The kernels multiply hidden rows by zero, so these rows must be finite."""
    w, value = (None if t is None else launch.unit_stride(finite_where_hidden(t, lengths)) for t in (w, value))
    return w, value


def forward(
    w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """-> ``o (B, N, H, p)`` contiguous, and the base-2 log-normalizer ``lse (B, H, N)`` of the softmax rows in
    float32: a natural logarithm would be rounded twice on its way through ``exp2``."""
    batch, tokens, heads, width = w.shape
    w, value = _operands(w, value, lengths)
    lengths = None if lengths is None else lengths.contiguous()
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=w.device)
    if o.numel() == 0:
        return o, lse
    tiles, options = _forward_options(
        w.device, w.dtype, tokens, width, scale < 0, causal, lengths is not None, launch.dot_precision(w.dtype)
    )
    launch.launch(
        _forward, tiles * batch * heads,
        w, value, lengths, o, lse, *w.stride()[:3], *(w if value is None else value).stride()[:3],
        heads, tokens, abs(scale) * LOG2E, **options,
    )  # fmt: skip
    return o, lse


@once
def _forward_options(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    negative: bool,
    causal: bool,
    hiding: bool,
    precision: str,
) -> tuple[int, dict]:
    """The tiles of a head in the forward, and its compile-time parameters."""
    options = configuration("attention_forward", device, dtype, tokens, width)
    options |= {"CUT": _cut(options, tokens, causal or hiding), "NEGATIVE": negative, "CAUSAL": causal}
    options |= {"P": width, "WIDTH": _padded(width), "PRECISION": precision}
    return triton.cdiv(tokens, options["BLOCK_M"]), options


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
    """-> ``(dw, dvalue)``. Without a separate value, ``dvalue`` is None and its part is included in ``dw``."""
    batch, tokens, heads, width = w.shape
    w, value = _operands(w, value, lengths)
    grad = launch.unit_stride(grad)
    lengths = None if lengths is None else lengths.contiguous()
    o, lse = o.contiguous(), lse.contiguous()
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    dvalue = None if value is None else torch.empty_like(dw)
    if dw.numel() == 0:
        return dw, dvalue
    delta = torch.empty_like(lse)
    symmetric = not causal and lengths is None
    weight = torch.empty_like(lse) if symmetric else None
    middle = torch.empty(lse.shape[:2], dtype=lse.dtype, device=lse.device) if symmetric else None
    delta_tiles, delta_options, tiles, options = _backward_options(
        w.device, w.dtype, tokens, width, causal, lengths is not None, value is not None,
        launch.dot_precision(w.dtype),
    )  # fmt: skip
    launch.launch(
        _delta, delta_tiles * batch * heads,
        o, grad, lse, delta, weight, middle, *grad.stride()[:3], heads, tokens, **delta_options,
    )  # fmt: skip
    launch.launch(
        _backward, tiles * batch * heads,
        grad, w, value, lengths, lse, delta, weight, middle, dw, dvalue,
        *grad.stride()[:3], *w.stride()[:3], *(w if value is None else value).stride()[:3],
        heads, tokens, scale, scale * LOG2E, **options,
    )  # fmt: skip
    return dw, dvalue


@once
def _backward_options(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    causal: bool,
    hiding: bool,
    value: bool,
    precision: str,
) -> tuple[int, dict, int, dict]:
    """The tiles of a head in both kernels of the backward, each with its compile-time parameters."""
    shape = {"P": width, "WIDTH": _padded(width)}
    delta = configuration("attention_delta", device, dtype, tokens, width) | shape
    options = configuration("attention_backward", device, dtype, tokens, width) | shape
    options |= {"CUT": _cut(options, tokens, causal or hiding), "CAUSAL": causal, "PRECISION": precision}
    options["SEPARATE"] = value or launch.tensor_memory(device)
    if launch.tensor_memory(device) and shape["WIDTH"] > 64:
        options["num_stages"] = 1  # two stages of operands that wait for tensor memory would not fit shared memory
    return triton.cdiv(tokens, delta["BLOCK_M"]), delta, triton.cdiv(tokens, options["BLOCK_M"]), options


def _padded(width: int) -> int:
    """The power of two to which a head's width is padded. A matrix product takes at least 16."""
    return max(16, triton.next_power_of_2(width))


def _cut(options: dict, tokens: int, masked: bool) -> int:
    """The width of the tile with the last tokens. It is no wider than they need, if their position is known here."""
    block = options["BLOCK_N"]
    rest = (tokens - 1) % block + 1
    return block if masked else min(block, max(options["CUT"], triton.next_power_of_2(rest)))


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(head, stride, start, limit, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows start, start+1, … of a head as a tile (BLOCK, WIDTH), with zeros from row ``limit`` and from column P on."""
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
    """The number of visible keys of a sequence, limited to valid values whatever ``lengths`` contains."""
    visible = tokens
    if lengths is not None:
        visible = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int64), 0), tokens).to(tl.int32)
    return visible


@triton.jit
def _last_tile(keys, BLOCK: tl.constexpr):
    """The start of the last tile that contains any of ``keys`` keys; 0 for no keys."""
    return tl.maximum(keys - 1, 0) // BLOCK * BLOCK


@triton.jit
def _attend(
    q, acc, total, top, w, w_n, value, v_n, first, start, visible, scale,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys start … start + BLOCK_N to the softmax sums of a tile of queries. FIRST: the sums are still
    empty."""
    k = _rows(w, w_n, start, visible, P=P, WIDTH=WIDTH, BLOCK=BLOCK_N, MASKED=MASKED)
    v = k
    if value is not None:
        v = _rows(value, v_n, start, visible, P=P, WIDTH=WIDTH, BLOCK=BLOCK_N, MASKED=MASKED)
    scores = dot(q, tl.trans(k), None, PRECISION)
    if MASKED:
        key = start + tl.arange(0, BLOCK_N)[None, :]
        seen = key < visible
        if CAUSAL:
            seen = seen & (key <= first + tl.arange(0, BLOCK_M)[:, None])
        scores = tl.where(seen, scores, _HIDDEN)
    higher = tl.max(scores, 1) * scale
    if not FIRST:
        higher = tl.maximum(top, higher)
    p = tl.exp2(scores * scale - higher[:, None])
    if MASKED:
        # The exponential alone does not hide keys: with a scale of 0 a hidden key would have the weight of a visible
        # one.
        p = tl.where(seen, p, 0.0)
    if FIRST:
        total = tl.sum(p, 1)
        acc = dot(rounded(p, v.dtype), v, None, PRECISION)
    else:
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = dot(rounded(p, v.dtype), v, acc * shrink[:, None], PRECISION)
    return acc, total, higher


@triton.jit
def _forward(
    w, value, lengths, o, lse, w_b, w_n, w_h, v_b, v_n, v_h, heads, tokens, scale,
    NEGATIVE: tl.constexpr, CAUSAL: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(tokens, BLOCK_M)
    head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # begin with the longest rows
    batch = (head // heads).to(tl.int64)
    w += batch * w_b + (head % heads).to(tl.int64) * w_h
    if value is not None:
        value += batch * v_b + (head % heads).to(tl.int64) * v_h
    first = tile * BLOCK_M
    visible = _visible(lengths, batch, tokens)
    # The tiles that some rows do not see completely come first, as straight-line code. Between two loops with one
    # accumulator, ptxas would wait for every single wgmma. Each row sees a key of the very first tile.
    full = _last_tile(visible, BLOCK_N)
    if CAUSAL:
        full = tl.minimum(full, first // BLOCK_N * BLOCK_N)
    q = _rows(w, w_n, first, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M, MASKED=True)
    if NEGATIVE:
        q = rounded(-q.to(tl.float32), q.dtype)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.zeros([BLOCK_M], tl.float32)
    for cut in tl.static_range(BLOCK_M // BLOCK_N if CAUSAL and BLOCK_M > BLOCK_N else 1):
        acc, total, top = _attend(
            q, acc, total, top, w, w_n, value, v_n, first, full + cut * BLOCK_N, visible, scale,
            P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=CUT,
            CAUSAL=CAUSAL, MASKED=True, FIRST=cut == 0, PRECISION=PRECISION,
        )  # fmt: skip
    for start in range(0, full, BLOCK_N):
        acc, total, top = _attend(
            q, acc, total, top, w, w_n, value, v_n, first, start, visible, scale,
            P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            CAUSAL=CAUSAL, MASKED=False, FIRST=False, PRECISION=PRECISION,
        )  # fmt: skip

    row = first + tl.arange(0, BLOCK_M)
    tl.store(lse + head.to(tl.int64) * tokens + row, top + tl.log2(total), mask=row < tokens)
    o += (batch * tokens * heads + head % heads) * P
    _store_rows(o, heads * P, first, tokens, acc / total[:, None], P=P, WIDTH=WIDTH, BLOCK=BLOCK_M)


@triton.jit
def _delta(
    o, g, lse, delta, weight, middle, g_b, g_n, g_h, heads, tokens,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(g∘o)``. With ``weight``, also ``weight = 2^(middle − lse)`` with one ``middle`` per head.

    ``middle`` is NaN if the log-normalizers of the head are too large or differ too much for this.
    """
    tiles = tl.cdiv(tokens, BLOCK_M)
    head = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_M
    batch = (head // heads).to(tl.int64)
    o += (batch * tokens * heads + head % heads) * P
    g += batch * g_b + (head % heads).to(tl.int64) * g_h
    product = _rows(o, heads * P, first, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M, MASKED=True).to(tl.float32)
    product *= _rows(g, g_n, first, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M, MASKED=True).to(tl.float32)
    row = first + tl.arange(0, BLOCK_M)
    start = head.to(tl.int64) * tokens
    tl.store(delta + start + row, tl.sum(product, 1), mask=row < tokens)
    if weight is not None:
        index = tl.arange(0, 256)
        low = tl.full([256], float("inf"), tl.float32)
        high = -low
        for column in range(0, tokens, 256):
            inside = column + index < tokens
            some = tl.load(lse + start + column + index, mask=inside, other=0.0)
            low = tl.minimum(low, tl.where(inside, some, low))
            high = tl.maximum(high, tl.where(inside, some, high))
        lowest = tl.min(low, 0)
        highest = tl.max(high, 0)
        center = (lowest + highest) * 0.5
        own = tl.load(lse + start + row, mask=row < tokens, other=0.0)
        tl.store(weight + start + row, tl.exp2(center - own), mask=row < tokens)
        if first == 0:
            close = (highest - lowest <= _RANGE) & (tl.abs(center) <= _LARGE)
            tl.store(middle + head, tl.where(close, center, float("nan")))


@triton.jit
def _pair(
    dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, start,
    g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
    P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    QUERY: tl.constexpr, KEY: tl.constexpr, DIAGONAL: tl.constexpr, MASKED: tl.constexpr, HIDING: tl.constexpr,
    SYMMETRIC: tl.constexpr, SEPARATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of tile i the contribution of tile j: as keys of i (QUERY), as queries to i (KEY), or both.

    MASKED: tile j extends beyond the last token. HIDING: ``lengths`` hide keys. SYMMETRIC: both roles, no mask except
    MASKED, and ``P_ij = e·weight_i``, ``P_ji = e·weight_j`` with the symmetric ``e = 2^(score − middle)``.

    ``weight_i`` and ``delta_i`` are already multiplied by ``scale``. With SYMMETRIC, ``delta_i`` is also multiplied by
    ``weight_i``. ``slope`` is ``scale·log2 e``, rounded once as in the forward. Otherwise large scores would not match
    their log-normalizer.
    """
    i = first + tl.arange(0, BLOCK_M)[:, None]
    j = start + tl.arange(0, BLOCK_N)
    w_j = _rows(w, w_n, start, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_N, MASKED=MASKED)
    scores = dot(w_i, tl.trans(w_j), None, PRECISION) * slope
    if QUERY:
        v_j = w_j
        if value is not None:
            v_j = _rows(value, v_n, start, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_N, MASKED=MASKED)
        query = dot(g_i, tl.trans(v_j), None, PRECISION)
        if not SYMMETRIC:
            p = _probability(scores - lse_i[:, None])
            if DIAGONAL:
                p = tl.where((j[None, :] < visible) & (j[None, :] <= i), p, 0.0)
            elif MASKED or HIDING:
                p = tl.where(j[None, :] < visible, p, 0.0)
            ds = p * (query * scale - delta_i[:, None])
    if KEY:
        g_j = _rows(g, g_n, start, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_N, MASKED=MASKED)
        key = dot(v_i, tl.trans(g_j), None, PRECISION)
        delta_j = _entries(delta, j, tokens, 0.0, MASKED=MASKED)
        if SYMMETRIC:
            e = tl.exp2(scores - middle)
            if MASKED:
                e = tl.where(j[None, :] < tokens, e, 0.0)
            weight_j = _entries(weight, j, tokens, 0.0, MASKED=MASKED)
            p = e * weight_j[None, :]
            ds = query * weight_i[:, None] - delta_i[:, None]
            ds = e * (ds + (key - delta_j[None, :]) * (weight_j * scale)[None, :])
        else:
            # Queries beyond the last token get exp(-inf).
            p = _probability(scores - _entries(lse, j, tokens, float("inf"), MASKED=MASKED)[None, :])
            if DIAGONAL:
                p = tl.where((i < visible) & (i <= j[None, :]), p, 0.0)
            elif HIDING:
                p = tl.where(i < visible, p, 0.0)
            more = p * (key * scale - (delta_j * scale)[None, :])
            if QUERY:
                ds += more
            else:
                ds = more
        if SEPARATE:
            dv = dot(rounded(p, g_j.dtype), g_j, dv, PRECISION)
        else:
            dw = dot(rounded(p, g_j.dtype), g_j, dw, PRECISION)
    dw = dot(rounded(ds, w_j.dtype), w_j, dw, PRECISION)
    return dw, dv


@triton.jit
def _probability(exponent):
    """``2^exponent``, at most 1: a large score differs from its log-normalizer by rounding, which must not become a
    power of two. NaN stays."""
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _entries(vector, index, limit, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(vector + index, mask=index < limit, other=other)
    else:
        return tl.load(vector + index)


@triton.jit
def _backward(
    g, w, value, lengths, lse, delta, weight, middles, dw_out, dv_out, g_b, g_n, g_h, w_b, w_n, w_h, v_b, v_n, v_h,
    heads, tokens, scale, slope,
    CAUSAL: tl.constexpr, SEPARATE: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr,
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
    w_i = _rows(w, w_n, first, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M, MASKED=True)
    g_i = _rows(g, g_n, first, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M, MASKED=True)
    v_i = w_i
    if value is not None:
        value += batch * v_b + inner * v_h
        v_i = _rows(value, v_n, first, tokens, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M, MASKED=True)
    lse_i = _entries(lse, row, tokens, 0.0, MASKED=True)
    delta_i = _entries(delta, row, tokens, 0.0, MASKED=True) * scale
    weight_i = lse_i
    dw = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_M, WIDTH], tl.float32) if SEPARATE else dw

    # As in the forward, tiles with a mask come first, as straight-line code. The loops after them need no mask.
    if CAUSAL:
        for cut in tl.static_range(BLOCK_M // BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, first + cut * BLOCK_N,
                g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, QUERY=True, KEY=True, DIAGONAL=True, MASKED=True,
                HIDING=HIDING, SYMMETRIC=False, SEPARATE=SEPARATE, PRECISION=PRECISION,
            )  # fmt: skip
        for start in range(0, tl.minimum(first, visible), BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, start,
                g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, QUERY=True, KEY=False, DIAGONAL=False, MASKED=False,
                HIDING=HIDING, SYMMETRIC=False, SEPARATE=SEPARATE, PRECISION=PRECISION,
            )  # fmt: skip
        end = tokens
        if first >= visible:
            end = first  # hidden keys have no queries
        for start in range(first + BLOCK_M, end, BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, start,
                g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, QUERY=False, KEY=True, DIAGONAL=False, MASKED=True,
                HIDING=HIDING, SYMMETRIC=False, SEPARATE=SEPARATE, PRECISION=PRECISION,
            )  # fmt: skip
    elif HIDING:
        end = tokens
        if first >= visible:
            end = visible
        for start in range(0, end, BLOCK_N):
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, start,
                g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, 0.0,
                P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, QUERY=True, KEY=True, DIAGONAL=False, MASKED=True,
                HIDING=True, SYMMETRIC=False, SEPARATE=SEPARATE, PRECISION=PRECISION,
            )  # fmt: skip
    else:
        full = _last_tile(tokens, BLOCK_N)
        middle = tl.load(middles + head)
        if middle == middle:
            weight += head.to(tl.int64) * tokens
            weight_i = _entries(weight, row, tokens, 0.0, MASKED=True)
            delta_i *= weight_i
            weight_i *= scale
            dw, dv = _pair(
                dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, full,
                g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
                P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=CUT, QUERY=True, KEY=True, DIAGONAL=False, MASKED=True,
                HIDING=False, SYMMETRIC=True, SEPARATE=SEPARATE, PRECISION=PRECISION,
            )  # fmt: skip
            for start in range(0, full, BLOCK_N):
                dw, dv = _pair(
                    dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, start,
                    g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
                    P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, QUERY=True, KEY=True, DIAGONAL=False,
                    MASKED=False, HIDING=False, SYMMETRIC=True, SEPARATE=SEPARATE, PRECISION=PRECISION,
                )  # fmt: skip
        else:
            for start in range(0, tokens, BLOCK_N):
                dw, dv = _pair(
                    dw, dv, w_i, g_i, v_i, lse_i, delta_i, weight_i, first, start,
                    g, w, value, lse, delta, weight, g_n, w_n, v_n, tokens, visible, scale, slope, middle,
                    P=P, WIDTH=WIDTH, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, QUERY=True, KEY=True, DIAGONAL=False,
                    MASKED=True, HIDING=False, SYMMETRIC=False, SEPARATE=SEPARATE, PRECISION=PRECISION,
                )  # fmt: skip

    if SEPARATE and value is None:
        dw += dv
    dw_out += (batch * tokens * heads + inner) * P
    _store_rows(dw_out, heads * P, first, tokens, dw, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M)
    if value is not None:
        dv_out += (batch * tokens * heads + inner) * P
        _store_rows(dv_out, heads * P, first, tokens, dv, P=P, WIDTH=WIDTH, BLOCK=BLOCK_M)
