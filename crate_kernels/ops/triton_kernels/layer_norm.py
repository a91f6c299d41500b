"""LayerNorm backward, together with the other parts of a block's backward that read the same rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .arithmetic import rounded

MAX_WIDTH = 8192
PROGRAMS = 512
"""Number of partial sums over the rows. It is fixed, so that gradients do not depend on the device's size."""


def why_not(z: Tensor) -> str | None:
    """The reason why the kernel cannot take the rows of ``z (..., d)``; None if it can."""
    if z.shape[-1] > MAX_WIDTH:
        return f"the Triton LayerNorm kernel takes rows of up to {MAX_WIDTH} channels, not {z.shape[-1]}"
    return None


def layer_norm_backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of ``x = LN(z)`` for ``grad (n, d)``, all in one pass over the rows.

    Returns:
        ``dz (n, d)``, with ``residual (n, d)`` added if it is given, in the dtype of ``residual``, else in that of
        ``grad``; ``dweight, dbias (d,)``; ``x (n, d)`` in ``dtype`` (that of ``z`` if None), which the gradient of the
        next matrix needs; the float32 sum (d,) of the rows of ``residual``, or None.
    """
    rows, width = z.shape
    dz = torch.empty((rows, width), dtype=(grad if residual is None else residual).dtype, device=z.device)
    x = torch.empty((rows, width), dtype=z.dtype if dtype is None else dtype, device=z.device)
    block = triton.next_power_of_2(width)
    tile = max(1, min(16, 2048 // block))
    programs = min(PROGRAMS, triton.cdiv(rows, tile))
    kinds = 2 if residual is None else 3
    partial = torch.empty((kinds, programs, width), dtype=torch.float32, device=z.device)
    if rows:
        grad, z = launch.unit_stride(grad), launch.unit_stride(z)
        weight, bias, mean, rstd = (
            t.contiguous() for t in (weight, bias, mean, rstd)
        )  # the kernel needs dense vectors
        residual = None if residual is None else launch.unit_stride(residual)
        launch.launch(
            _layer_norm_backward, programs,
            grad, z, weight, bias, mean, rstd, residual, dz, x, partial,
            rows, width, programs, grad.stride(0), z.stride(0), 0 if residual is None else residual.stride(0),
            BLOCK_M=tile, BLOCK_N=block, num_warps=min(16, max(4, block * tile // 512)),
        )  # fmt: skip
    # Separate tensors, because outputs of an operator must not share memory.
    dweight, dbias, *total = (p.sum(0) for p in partial)
    return dz, dweight.to(weight.dtype), dbias.to(bias.dtype), x, total[0] if total else None


@triton.jit
def _layer_norm_backward(
    grad, z, weight, bias, mean, rstd, residual, dz, x, partial, rows, width, programs, g_m, z_m, r_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BLOCK_N)
    n_in = n < width
    gamma = tl.load(weight + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(tl.program_id(0) * BLOCK_M, rows, programs * BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        m_in = m < rows
        inside = m_in[:, None] & n_in[None, :]
        row = tl.cast(m, tl.int64)[:, None]
        g = tl.load(grad + row * g_m + n[None, :], mask=inside, other=0.0).to(tl.float32)
        mu = tl.load(mean + m, mask=m_in, other=0.0)[:, None]
        scale = tl.load(rstd + m, mask=m_in, other=0.0)[:, None]
        normal = (tl.load(z + row * z_m + n[None, :], mask=inside, other=0.0).to(tl.float32) - mu) * scale
        normal = tl.where(inside, normal, 0.0)
        dweight += g * normal
        dbias += g
        g *= gamma
        along = tl.sum(g * normal, 1)[:, None] / width
        d = (g - tl.sum(g, 1)[:, None] / width - normal * along) * scale
        if residual is not None:
            r = tl.load(residual + row * r_m + n[None, :], mask=inside, other=0.0).to(tl.float32)
            total += r
            d += r
        at = row * width + n[None, :]
        tl.store(dz + at, rounded(d, dz.dtype.element_ty), mask=inside)
        tl.store(x + at, rounded(normal * gamma + offset, x.dtype.element_ty), mask=inside)
    at = partial + tl.program_id(0) * width + n
    tl.store(at, tl.sum(dweight, 0), mask=n_in)
    at += programs * width
    tl.store(at, tl.sum(dbias, 0), mask=n_in)
    if residual is not None:
        at += programs * width
        tl.store(at, tl.sum(total, 0), mask=n_in)
