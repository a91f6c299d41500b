"""One matrix product with what stands around the products of a CRATE layer.

The LayerNorm in front (``norm``) is folded into the product: with ``A = γ∘a``, ``LN(z) a = (z A − μ·1ᵀA)/σ + βᵀa``. The
product runs on raw rows, their statistics are gathered from the very tiles it multiplies, and ``LN(z)`` is never
written. Behind it, in float32: bias, scale, residual, threshold, ReLU, the mask of a ReLU's gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .arithmetic import dot, rounded
from .configurations import configuration


class FoldedNorm(NamedTuple):
    """LayerNorm and the matrix ``a (k, m)`` behind it, prepared by :func:`fold_norm`."""

    weight: Tensor
    bias: Tensor
    eps: float
    folded: Tensor
    """``γ∘a (k, m)`` in the dtype of ``a``."""
    column_sum: Tensor
    """``1ᵀ(γ∘a) (m,)`` of the rounded matrix, float32: what a row's mean contributes, to the last bit."""
    shift: Tensor
    """``βᵀa (m,)``, float32."""


def fold_norm(a: Tensor, weight: Tensor, bias: Tensor, eps: float) -> FoldedNorm:
    """Fold LayerNorm's ``weight, bias (k,)`` into ``a (k, m)`` (any strides)."""
    inner, columns = a.shape
    weight, bias = weight.contiguous(), bias.contiguous()  # kernels read vectors densely
    folded = torch.empty_like(a)  # keeps the strides of a dense a, so that it is read the way it was laid out
    column_sum = torch.empty(columns, dtype=torch.float32, device=a.device)
    shift = torch.empty_like(column_sum)
    options = configuration("fold_norm", a, columns, inner)
    launch.launch(
        _fold_norm, triton.cdiv(columns, options["BLOCK_N"]),
        a, weight, bias, folded, column_sum, shift, inner, columns, *a.stride(), *folded.stride(), **options,
    )  # fmt: skip
    return FoldedNorm(weight, bias, eps, folded, column_sum, shift)


def product(
    a: Tensor,
    b: Tensor | FoldedNorm,
    *,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    shift: float = 0.0,
    relu: bool = False,
    gate: Tensor | None = None,
    gate_rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """``relu(alpha·(a b + bias) + beta·residual − shift)`` for ``a (n, k)``, ``b (k, m)``; the ReLU where asked for.

    - ``b`` a :class:`FoldedNorm`: ``a`` and, if given, ``residual`` are normalized. Returns also the rows' mean, rstd.
    - ``gate (n, m)``: the result is zeroed where ``gate <= 0``, the gradient of the ReLU that gave ``gate``.
      The mean's part is subtracted from a float32 sum that holds it, which leaves an error of about
      ``2^-23·√k·|μ|/σ·|A|`` in the result, so rows whose mean is thousands of standard deviations away should be
      normalized first. Float32 rows are centered on their first element, whose distance from the mean replaces ``|μ|``.
    - ``gate_rows (n, k)``: the same on ``a``, whose rows are not normalized. Returns also that gated ``a``; where
      ``residual is a``, it is gated too.
    """
    norm = b if isinstance(b, FoldedNorm) else None
    matrix = b if norm is None else norm.folded
    if norm is not None:
        bias = norm.shift
    a = launch.unit_stride(a)
    bias, gate, gate_rows = (None if t is None else t.contiguous() for t in (bias, gate, gate_rows))
    rows, inner = a.shape
    columns = matrix.shape[1]
    out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    mean = None if norm is None else torch.empty(rows, dtype=torch.float32, device=a.device)
    rstd = None if norm is None else torch.empty_like(mean)
    gated = None if gate_rows is None else torch.empty((rows, inner), dtype=a.dtype, device=a.device)
    if rows:
        options = configuration("product", a, rows, columns)
        options["BLOCK_K"] = max(16, min(options["BLOCK_K"], triton.next_power_of_2(inner)))
        programs = triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(columns, options["BLOCK_N"])
        residual = None if residual is None else launch.unit_stride(residual)
        launch.launch(
            _product, programs,
            a, matrix, out, bias, residual, gate, gate_rows, gated,
            None if norm is None else norm.weight, None if norm is None else norm.bias,
            None if norm is None else norm.column_sum, mean, rstd,
            rows, columns, inner, a.stride(0), *matrix.stride(), 0 if residual is None else residual.stride(0),
            alpha, beta, shift, 0.0 if norm is None else norm.eps,
            RELU=relu, EVEN_K=inner % options["BLOCK_K"] == 0, PRECISION=launch.dot_precision(a.dtype), **options,
        )  # fmt: skip
    return tuple(t for t in (out, mean, rstd, gated) if t is not None)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _fold_norm(
    a, weight, bias, folded, column_sum, shift, inner, columns, a_k, a_n, f_k, f_n,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    moved = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < inner)[:, None] & (n < columns)[None, :]
        at, across = tl.cast(k, tl.int64)[:, None], tl.cast(n, tl.int64)[None, :]
        tile = tl.load(a + at * a_k + across * a_n, mask=inside, other=0.0).to(tl.float32)
        gamma = tl.load(weight + k, mask=k < inner, other=0.0).to(tl.float32)
        beta = tl.load(bias + k, mask=k < inner, other=0.0).to(tl.float32)
        scaled = rounded(tile * gamma[:, None], folded.dtype.element_ty)
        tl.store(folded + at * f_k + across * f_n, scaled, mask=inside)
        total += tl.sum(scaled.to(tl.float32), 0)
        moved += tl.sum(tile * beta[:, None], 0)
    tl.store(column_sum + n, total, mask=n < columns)
    tl.store(shift + n, moved, mask=n < columns)


@triton.jit
def _product(
    a, b, out, bias, residual, gate, gate_rows, gated, norm_weight, norm_bias, column_sum, mean_out, rstd_out,
    rows, columns, inner, a_m, b_k, b_n, r_m, alpha, beta, shift, eps,
    RELU: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = norm_weight is not None
    # Float32 operands are centered on the row's first element, lest the mean's part drown the rest. 16-bit rows go to
    # the tensor cores as they are: each product is exact there, their float32 sums are not (see ``product``).
    CENTRE: tl.constexpr = NORM and a.dtype.element_ty == tl.float32
    # All column tiles of some rows run together: the rows are read once, the small b stays in L2.
    across = tl.cdiv(columns, BLOCK_N)
    tile_n = tl.program_id(0) % across
    first = tl.program_id(0) // across * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.cast(m, tl.int64)
    m_in = (m < rows)[:, None]
    n_in = (n < columns)[None, :]

    a_at = a + row[:, None] * a_m + k[None, :]
    b_at = b + tl.cast(k, tl.int64)[:, None] * b_k + tl.cast(n, tl.int64)[None, :] * b_n
    g_at = gate_rows
    if gate_rows is not None:
        g_at = gate_rows + row[:, None] * inner + k[None, :]
    origin = tl.zeros([BLOCK_M], tl.float32)
    if CENTRE:
        origin = tl.load(a + row * a_m, mask=m < rows, other=0.0)
    mean = tl.zeros([BLOCK_M], tl.float32)
    spread = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN_K:
            x = tl.load(a_at, mask=m_in, other=0.0)
            y = tl.load(b_at, mask=n_in, other=0.0)
        else:
            k_in = start + k < inner
            x = tl.load(a_at, mask=m_in & k_in[None, :], other=0.0)
            y = tl.load(b_at, mask=k_in[:, None] & n_in, other=0.0)
        if gate_rows is not None:
            if EVEN_K:
                open_ = tl.load(g_at, mask=m_in, other=0.0)
            else:
                open_ = tl.load(g_at, mask=m_in & k_in[None, :], other=0.0)
            x = tl.where(open_.to(tl.float32) <= 0, 0.0, x)
            g_at += BLOCK_K
        if CENTRE:
            x = x - origin[:, None]
            if not EVEN_K:
                x = tl.where(k_in[None, :], x, 0.0)
        acc = dot(x, y, acc, PRECISION)
        if NORM:  # while the tensor cores work
            # Means and squared deviations per tile, merged as Chan et al. do: as exact as two passes over the row.
            count = tl.minimum(inner - start, BLOCK_K).to(tl.float32)
            wide = x.to(tl.float32)
            tile_mean = tl.sum(wide, 1) / count
            off = wide - tile_mean[:, None]
            if not EVEN_K:
                off = tl.where(k_in[None, :], off, 0.0)
            gap = tile_mean - mean
            share = count / (start + count)
            spread += tl.sum(off * off, 1) + gap * gap * (start * share)
            mean += gap * share
        a_at += BLOCK_K
        b_at += tl.cast(BLOCK_K, tl.int64) * b_k

    inside = m_in & n_in
    if NORM:
        rstd = 1.0 / tl.sqrt(spread / inner + eps)
        sums = tl.load(column_sum + n, mask=n < columns, other=0.0)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
        mean += origin
        if tile_n == 0:
            tl.store(mean_out + m, mean, mask=m < rows)
            tl.store(rstd_out + m, rstd, mask=m < rows)
    # All that is added to a column as one vector: each vector that is live in here costs a register per column.
    column = tl.zeros([BLOCK_N], tl.float32) - shift
    if bias is not None:
        column += alpha * tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    if NORM and residual is not None:
        column += beta * tl.load(norm_bias + n, mask=n < columns, other=0.0).to(tl.float32)
    acc = acc * alpha + column[None, :]
    if residual is not None:
        r = tl.load(residual + row[:, None] * r_m + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            gamma = tl.load(norm_weight + n, mask=n < columns, other=0.0).to(tl.float32)
            r = (r - mean[:, None]) * (rstd[:, None] * gamma[None, :])
        if gate_rows is not None:
            at = row[:, None] * inner + n[None, :]
            r = tl.where(tl.load(gate_rows + at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, r)
            tl.store(gated + at, rounded(r, gated.dtype.element_ty), mask=inside)
        acc += beta * r
    out_at = row[:, None] * columns + n[None, :]
    if RELU:
        acc = tl.where(acc <= 0, 0.0, acc)  # NaN stays
    if gate is not None:
        acc = tl.where(tl.load(gate + out_at, mask=inside, other=0.0).to(tl.float32) <= 0, 0.0, acc)
    tl.store(out + out_at, rounded(acc, out.dtype.element_ty), mask=inside)
