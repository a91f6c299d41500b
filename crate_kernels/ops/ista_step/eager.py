"""One ISTA step in stock PyTorch: folded, or through the residual if there are few rows (``folding.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import multiply
from .folding import fold, folds, residual, residual_backward, weight_backward


def why_not(x: Tensor, *_) -> None:
    return None


def forward(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``weight (d, d)``, ``folded`` = ``fold(weight)`` if known -> ``(n, d)`` in the dtype of ``x``.

    The products have the dtype of ``weight``.
    """
    # x is added in the product's accumulator. Inside the matrix, I + step·M would be rounded in low precision.
    shifted, x = x - step_size * lambd, x.to(weight.dtype)
    if folds(x, folded):
        return multiply(x, fold(weight) if folded is None else folded, shifted, alpha=step_size).relu_()
    return multiply(residual(x, weight), weight, shifted, alpha=step_size).relu_()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``(dx, dweight)``. The ReLU's mask is the sign of ``out``."""
    g = torch.ops.aten.threshold_backward(grad, out, 0)
    if folds(x, folded):
        m = fold(weight) if folded is None else folded
        narrow = g.to(weight.dtype)
        dx = multiply(narrow, m.T, g, alpha=step_size)
        return dx, weight_backward(x.to(weight.dtype), narrow, weight, step_size)
    return residual_backward(g, x, weight, step_size)
