"""One ISTA step in Triton: the folded product with residual, threshold and ReLU in its float32 epilogue.

Fewer rows than channels take the residual route, as in ``eager.py``; products without an epilogue are the vendor's.
"""

from __future__ import annotations

from torch import Tensor

from ..triton_kernels import launch
from ..triton_kernels.product import product
from . import eager


def why_not(x: Tensor, *_) -> str | None:
    return launch.why_not(x)


def forward(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``weight (d, d)``, ``folded`` = ``fold(weight)`` if known -> ``(n, d)``."""
    if eager.folds(x, folded):
        rows, matrix = x, eager.fold(weight) if folded is None else folded
    else:
        rows, matrix = eager.residual(x, weight), weight
    return product(rows, matrix, alpha=step_size, residual=x, shift=step_size * lambd, relu=True)[0]


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``(dx, dweight)``. The ReLU's mask is the sign of ``out``."""
    if not eager.folds(x, folded):
        return eager.backward(grad, x, weight, folded, out, step_size)
    dx, g = input_backward(grad, weight, folded, out, step_size)
    return dx, eager.weight_backward(x, g, weight, step_size)


def input_backward(
    grad: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``dx = g + step_size·g Mᵀ`` and ``g = grad·[out > 0]``."""
    m = eager.fold(weight) if folded is None else folded
    return product(grad, m.T, alpha=step_size, residual=grad, gate_rows=out)
