"""One ISTA step in Triton: the folded product with residual, threshold and ReLU in its float32 epilogue.

With fewer rows than channels the step takes the residual route, as in ``folding.py``. Products without an epilogue use
the vendor's library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton_kernels import launch
from ..triton_kernels.product import product
from . import folding


def why_not(x: Tensor, *_) -> str | None:
    return launch.why_not(x)


def forward(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``weight (d, d)``, ``folded`` = ``fold(weight)`` if known -> ``(n, d)`` in the dtype of ``x``."""
    if folding.folds(x, folded):
        rows, matrix = x, folding.fold(weight) if folded is None else folded
    else:
        rows, matrix = folding.residual(x.to(weight.dtype), weight), weight
    return product(rows, matrix, alpha=step_size, residual=x, shift=step_size * lambd, relu=True).out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``(dx, dweight)``. The ReLU's mask is the sign of ``out``."""
    if not folding.folds(x, folded):
        g = torch.ops.aten.threshold_backward(grad, out, 0)
        return folding.residual_backward(g, x, weight, step_size)
    dx, g = input_backward(grad, weight, folded, out, step_size)
    return dx, folding.weight_backward(x.to(weight.dtype), g, weight, step_size)


def input_backward(
    grad: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``dx = g + step_size·g Mᵀ`` and ``g = grad·[out > 0]``, the latter in the dtype of ``weight``."""
    m = folding.fold(weight) if folded is None else folded
    result = product(grad, m.T, alpha=step_size, residual=grad, gate_rows=out)
    return result.out, result.gated
