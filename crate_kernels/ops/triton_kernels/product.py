"""GEMM with an optional LayerNorm prologue, and bias, residual, threshold, ReLU and row statistics in the epilogue.

The LayerNorm (``norm``) is folded into the product: with ``A = γ∘a``, ``LN(z) a = (z A − μ·1ᵀA)/σ + βᵀa``. The product
reads raw rows. Their statistics come from the kernel that wrote the rows, or from one pass over them. ``LN(z)`` is
never written. The epilogue computes in float32: bias, scale, residual, threshold, ReLU, the mask of a ReLU's gradient,
and the statistics of the resulting rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .arithmetic import dot, rounded
from .configurations import configuration, once


class Statistics(NamedTuple):
    """Mean and spread of the rows of a matrix ``(n, k)``, in parts of ``part`` columns."""

    mean: Tensor
    """``(parts, n)`` float32."""
    spread: Tensor
    """``(parts, n)`` float32: the sum of the squared distances from the mean."""
    part: int
    """Number of columns in a part. The last part may be shorter."""


class Result(NamedTuple):
    """Results of :func:`product`; None for those that were not requested."""

    out: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    gated: Tensor | None = None
    statistics: Statistics | None = None
    copy: Tensor | None = None


class FoldedNorm(NamedTuple):
    """LayerNorm and the matrix ``a (k, m)`` after it, prepared by :func:`fold_norm`."""

    weight: Tensor
    bias: Tensor
    eps: float
    folded: Tensor
    """``γ∘a (k, m)`` in the dtype of ``a``."""
    column_sum: Tensor
    """``1ᵀ(γ∘a) (m,)`` of the rounded matrix, float32: the exact factor of a row's mean."""
    shift: Tensor
    """``βᵀa (m,)``, float32."""


def fold_norm(a: Tensor, weight: Tensor, bias: Tensor, eps: float) -> FoldedNorm:
    """Fold LayerNorm's ``weight, bias (k,)`` into ``a (k, m)`` (any strides)."""
    inner, columns = a.shape
    weight, bias = weight.contiguous(), bias.contiguous()  # kernels need dense vectors
    folded = torch.empty_like(a)  # has the strides of a dense a, so that the product reads it in the same order
    column_sum = torch.empty(columns, dtype=torch.float32, device=a.device)
    shift = torch.empty_like(column_sum)
    options = _fold_options(a.device, a.dtype, columns, inner)
    launch.launch(
        _fold_norm, triton.cdiv(columns, options["BLOCK_N"]),
        a, weight, bias, folded, column_sum, shift, inner, columns, *a.stride(), *folded.stride(), **options,
    )  # fmt: skip
    return FoldedNorm(weight, bias, eps, folded, column_sum, shift)


def row_statistics(rows: Tensor) -> Statistics:
    """The statistics of ``rows (n, k)``, in one pass over them."""
    rows = launch.unit_stride(rows)
    count, width = rows.shape
    mean = torch.empty((1, count), dtype=torch.float32, device=rows.device)
    spread = torch.empty_like(mean)
    if count:
        block = triton.next_power_of_2(width)
        tile = max(1, 4096 // block)
        launch.launch(
            _row_statistics, triton.cdiv(count, tile), rows, mean, spread, count, width, rows.stride(0),
            BLOCK_M=tile, BLOCK_N=block, num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return Statistics(mean, spread, width)


def product(
    a: Tensor,
    b: Tensor | FoldedNorm,
    *,
    statistics: Statistics | None = None,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    beta: float = 1.0,
    shift: float = 0.0,
    relu: bool = False,
    gate: Tensor | None = None,
    gate_rows: Tensor | None = None,
    measure: bool = False,
    copy: torch.dtype | None = None,
) -> Result:
    """``relu(alpha·(a b + bias) + beta·residual − shift)`` for ``a (n, k)``, ``b (k, m)``; the ReLU where asked for.

    - ``b`` a :class:`FoldedNorm`: ``a`` and, if given, ``residual`` (which must be the same tensor) are normalized. The
      rows' ``mean`` and ``rstd`` are also returned. ``statistics`` are those of ``a``. Without them one more pass reads
      ``a``. Float32 rows are normalized before the product. 16-bit rows are multiplied directly, and the mean's part is
      then subtracted from a float32 sum. This leaves an error of about ``2^-23·√k·|μ|/σ·|A|`` in the result. Rows whose
      mean is thousands of standard deviations away from zero should be normalized first.
    - ``gate (n, m)``: the result is zeroed where ``gate <= 0``. This is the gradient of the ReLU that produced
      ``gate``.
    - ``gate_rows (n, k)``: the same for ``a``, whose rows are not normalized. The ``gated`` a is also returned, in the
      dtype of ``b``. If ``residual is a``, it is gated, too.
    - ``a`` may be float32 with a 16-bit ``b``. The kernel rounds it to the dtype of ``b`` before it multiplies.
    - The result has the dtype of ``residual``, or of ``b`` if there is no residual.
    - ``copy``: a copy of the result in this dtype is also returned.
    - ``measure``: the ``statistics`` of the result's rows are also returned, for the product after the next norm.
    """
    norm = b if isinstance(b, FoldedNorm) else None
    matrix = b if norm is None else norm.folded
    a = launch.unit_stride(a)
    rows, inner = a.shape
    columns = matrix.shape[1]

    def vector(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=a.device)

    dtype = matrix.dtype if residual is None else residual.dtype
    out = torch.empty((rows, columns), dtype=dtype, device=a.device)
    mean = rstd = gated = measured = None
    if norm is not None:
        bias = norm.shift
        mean, rstd = vector(rows), vector(rows)
        statistics = row_statistics(a) if statistics is None else statistics
    if gate_rows is not None:
        gated = torch.empty((rows, inner), dtype=matrix.dtype, device=a.device)
    bias, gate, gate_rows = (None if t is None else t.contiguous() for t in (bias, gate, gate_rows))
    parts = 1 if statistics is None else statistics.mean.shape[0]
    changed = gate_rows is not None or (norm is not None and a.dtype == torch.float32)
    read = a.dtype.itemsize + (0 if gate_rows is None else gate_rows.dtype.itemsize)
    programs, across, options = _options(
        a.device, matrix.dtype, rows, inner, columns, parts, relu, changed, read,
        residual is not None and residual.dtype == matrix.dtype and norm is None and gate is None and not changed,
        launch.dot_precision(matrix.dtype),
    )  # fmt: skip
    copied = None if copy is None else torch.empty((rows, columns), dtype=copy, device=a.device)
    if measure:
        measured = Statistics(vector(across, rows), vector(across, rows), options["BLOCK_N"])
    if rows:
        residual = None if residual is None else launch.unit_stride(residual)
        launch.launch(
            _product, programs,
            a, matrix, out, copied, bias, residual, gate, gate_rows, gated,
            None if norm is None else norm.weight, None if norm is None else norm.bias,
            None if norm is None else norm.column_sum,
            None if norm is None else statistics.mean, None if norm is None else statistics.spread,
            mean, rstd, None if measured is None else measured.mean, None if measured is None else measured.spread,
            rows, columns, inner, a.stride(0), *matrix.stride(), 0 if residual is None else residual.stride(0),
            parts, 0 if norm is None else statistics.part,
            alpha, beta, shift, 0.0 if norm is None else norm.eps,
            **options,
        )  # fmt: skip
    return Result(out, mean, rstd, gated, measured, copied)


@once
def _fold_options(device: torch.device, dtype: torch.dtype, columns: int, inner: int) -> dict:
    return configuration("fold_norm", device, dtype, columns, inner)


@once
def _options(
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    inner: int,
    columns: int,
    parts: int,
    relu: bool,
    changed: bool,
    read: int,
    added: bool,
    precision: str,
) -> tuple[int, int, dict]:
    """The number of programs of a product, the number of them side by side over its columns, and its compile-time
    parameters.

    ``changed``: the rows are gated or normalized before the product. ``read``: the bytes that each of their elements
    needs, including its gate. ``added``: the epilogue adds a residual and does nothing else.
    """
    options = configuration("product", device, dtype, rows, columns)
    options["BLOCK_K"] = max(16, min(options["BLOCK_K"], triton.next_power_of_2(inner)))
    # As many stages as fit. With sums in registers, the product reads one stage while copies fill the others.
    stage = options["BLOCK_K"] * (options["BLOCK_M"] * read + options["BLOCK_N"] * dtype.itemsize)
    buffers = launch.shared_memory(device) // stage + (0 if launch.tensor_memory(device) else 1)
    options["num_stages"] = max(1, min(options["num_stages"], buffers))
    if added and launch.wgmma(device) and options["num_warps"] == 8:
        # The sums and a residual need slightly more than the 128 registers with which a multiprocessor holds two
        # programs. The compiler then stores eight registers once per tile. After a norm it would store 80.
        options.setdefault("maxnreg", 128)
    across = triton.cdiv(columns, options["BLOCK_N"])
    options |= {
        "RELU": relu,
        "EVEN_K": inner % options["BLOCK_K"] == 0,
        "PARTS": triton.next_power_of_2(parts),
        "PRECISION": precision,
        "FLIP": changed and options.get("FLIP", launch.wgmma(device)),
    }
    return triton.cdiv(rows, options["BLOCK_M"]) * across, across, options


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
def _row_statistics(
    z, mean, spread, rows, width, z_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = (m < rows)[:, None] & (n < width)[None, :]
    values = tl.load(z + tl.cast(m, tl.int64)[:, None] * z_m + n[None, :], mask=inside, other=0.0).to(tl.float32)
    middle, squares = _spread(values, inside, width)
    tl.store(mean + m, middle, mask=m < rows)
    tl.store(spread + m, squares, mask=m < rows)


@triton.jit
def _spread(values, inside, count):
    """The mean of each row of a tile (with zeros outside), and the sum of the squared distances from it."""
    middle = tl.sum(values, 1) / count
    off = tl.where(inside, values - middle[:, None], 0.0)
    return middle, tl.sum(off * off, 1)


@triton.jit
def _product(
    a, b, out, copy, bias, residual, gate, gate_rows, gated, norm_weight, norm_bias, column_sum, part_mean, part_spread,
    mean_out, rstd_out, measured_mean, measured_spread,
    rows, columns, inner, a_m, b_k, b_n, r_m, parts, part, alpha, beta, shift, eps,
    RELU: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, FLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    NORM: tl.constexpr = norm_weight is not None
    # Float32 rows are normalized before the product: rounding for the tensor cores (tf32, or a 16-bit b) would also
    # round the mean. 16-bit rows are exact without this; their float32 sums are not (see ``product``).
    CENTRE: tl.constexpr = NORM and a.dtype.element_ty == tl.float32
    # All column tiles of some rows run together, so the rows are read once, and the small b stays in L2.
    across = tl.cdiv(columns, BLOCK_N)
    tile_n = tl.program_id(0) % across
    first = tl.program_id(0) // across * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.cast(m, tl.int64)
    m_in = (m < rows)[:, None]
    n_in = (n < columns)[None, :]

    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    if NORM:
        # The parts of a row are merged by the formula of Chan et al., which is as exact as two passes over the row.
        t = tl.arange(0, PARTS)
        at = tl.cast(t, tl.int64)[None, :] * rows + row[:, None]
        inside = m_in & (t < parts)[None, :]
        count = tl.minimum(inner - t * part, part).to(tl.float32)[None, :]
        means = tl.load(part_mean + at, mask=inside, other=0.0)
        mean = tl.sum(means * count, 1) / inner
        gap = tl.where(inside, means - mean[:, None], 0.0)
        spread = tl.sum(tl.load(part_spread + at, mask=inside, other=0.0) + gap * gap * count, 1)
        rstd = 1.0 / tl.sqrt(spread / inner + eps)
        if tile_n == 0:
            tl.store(mean_out + m, mean, mask=m < rows)
            tl.store(rstd_out + m, rstd, mask=m < rows)

    a_at = a + row[:, None] * a_m + k[None, :]
    b_at = b + tl.cast(k, tl.int64)[:, None] * b_k + tl.cast(n, tl.int64)[None, :] * b_n
    g_at = gate_rows
    if gate_rows is not None:
        g_at = gate_rows + row[:, None] * inner + k[None, :]
    # FLIP: bᵀaᵀ instead of a b. Changed rows would be wgmma's first operand in registers, and ptxas would then wait for
    # every wgmma (C7515). As the second operand they go through shared memory.
    acc = tl.zeros([BLOCK_N if FLIP else BLOCK_M, BLOCK_M if FLIP else BLOCK_N], tl.float32)
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
            x = (x - mean[:, None]) * rstd[:, None]  # beyond column k it is multiplied by zeros of b
        if x.dtype != y.dtype:
            x = rounded(x.to(tl.float32), y.dtype)
        if FLIP:
            x, y = tl.trans(y), tl.trans(x)
        acc = dot(x, y, acc, PRECISION)
        a_at += BLOCK_K
        b_at += tl.cast(BLOCK_K, tl.int64) * b_k

    if FLIP:
        acc = tl.trans(acc)
    inside = m_in & n_in
    if NORM and not CENTRE:
        sums = tl.load(column_sum + n, mask=n < columns, other=0.0)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
    # All additions to a column are one vector, because each vector that is live here needs a register per column.
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
    result = rounded(acc, out.dtype.element_ty)
    tl.store(out + out_at, result, mask=inside)
    if copy is not None:
        tl.store(copy + out_at, rounded(acc, copy.dtype.element_ty), mask=inside)
    if measured_mean is not None:
        # The statistics are those of the stored values, because the next norm reads these.
        count = tl.minimum(columns - tile_n * BLOCK_N, BLOCK_N)
        middle, squares = _spread(tl.where(inside, result.to(tl.float32), 0.0), inside, count)
        at = tl.cast(tile_n, tl.int64) * rows + row
        tl.store(measured_mean + at, middle, mask=m < rows)
        tl.store(measured_spread + at, squares, mask=m < rows)
