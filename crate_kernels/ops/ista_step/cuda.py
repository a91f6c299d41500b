"""One ISTA step through cuBLASLt. The epilogue of the folded product adds residual and threshold and applies the ReLU.

With fewer rows than channels the step takes the residual route, as in ``folding.py``. Matrices of weight gradients stay
float32 until they are complete.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_kernels
from ..cuda_kernels import product
from . import folding


def why_not(x: Tensor, weight: Tensor, *_) -> str | None:
    return cuda_kernels.why_not_columns(x, weight, x.shape[1])


def fold(weight: Tensor) -> Tensor:
    """``M = W − Wᵀ W``."""
    return product(weight.T, weight, weight, alpha=-1)


def forward(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``weight (d, d)``, ``folded`` = ``fold(weight)`` if known -> ``(n, d)`` in the dtype of ``x``.

    The products have the dtype of ``weight``.
    """
    x = x.contiguous()
    return step(x.to(weight.dtype), x, weight, folded, step_size, lambd)


def step(x: Tensor, x_wide: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """The step on ``x`` in the dtype of ``weight``, for the products, and in the dtype of the result, for the sum."""
    if x.shape[0] == 0:
        return torch.empty_like(x_wide, memory_format=torch.contiguous_format)
    weight = weight.contiguous()
    if folding.folds(x, folded):
        rows, matrix = x, fold(weight) if folded is None else folded
    else:
        rows, matrix = product(x, weight.T, x, alpha=-1), weight
    threshold = x_wide.new_full((x.shape[1],), -step_size * lambd)
    return product(rows, matrix, x_wide, threshold, alpha=step_size, relu=True, dtype=x_wide.dtype)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``(dx, dweight)``. The ReLU's mask is the sign of ``out``."""
    g = torch.ops.aten.threshold_backward(grad, out, 0).contiguous()
    return gradients(g.to(weight.dtype), g, x.contiguous().to(weight.dtype), weight, folded, step_size)


def gradients(
    g: Tensor, g_wide: Tensor, x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``(dx, dweight)``, given the gradient before the ReLU in the dtypes of ``weight`` and of ``dx``."""
    if x.shape[0] == 0:
        return torch.empty_like(g_wide), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    weight = weight.contiguous()
    if folding.folds(x, folded):
        m = fold(weight) if folded is None else folded
        dx = product(g, m.T, g_wide, alpha=step_size, dtype=g_wide.dtype)
        dm = product(x.T, g, alpha=step_size, dtype=torch.float32)
        symmetric = (dm + dm.T).to(weight.dtype)
        return dx, product(weight, symmetric, dm, alpha=-1, dtype=torch.float32).to(weight.dtype)
    r = product(x, weight.T, x, alpha=-1)
    dr = product(g, weight.T, alpha=step_size)
    dweight = product(r.T, g, alpha=step_size, dtype=torch.float32)
    dweight = product(dr.T, x, dweight, alpha=-1, dtype=torch.float32)
    return product(dr, weight, g_wide + dr, alpha=-1, dtype=g_wide.dtype), dweight.to(weight.dtype)
