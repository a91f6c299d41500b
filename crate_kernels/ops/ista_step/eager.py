"""One ISTA step in stock PyTorch, with W − WᵀW folded into one matrix where there are more rows than channels.

Folded, the step is one n·d² product instead of three, plus one d³; for few rows the residual ``r = x − x Wᵀ`` makes it
two. The gradients follow the same choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import multiply


def why_not(x: Tensor, *_) -> None:
    return None


def fold(weight: Tensor) -> Tensor:
    """``M = W − Wᵀ W``, so that ``x W − x Wᵀ W = x M``."""
    return multiply(weight.T, weight, weight, alpha=-1)


def forward(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``weight (d, d)``, ``folded`` = ``fold(weight)`` if known -> ``(n, d)``."""
    # x stays outside the matrix, in the product's accumulator: I + step·M would round it away in low precision.
    shifted = x - step_size * lambd
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
        return multiply(g, m.T, g, alpha=step_size), weight_backward(x, g, weight, step_size)
    r = residual(x, weight)
    dr = multiply(g, weight.T, alpha=step_size)
    dweight = multiply(dr.T, x, multiply(r.T, g, alpha=step_size), alpha=-1)
    return multiply(dr, weight, g.add_(dr), alpha=-1), dweight


def weight_backward(x: Tensor, g: Tensor, weight: Tensor, step_size: float) -> Tensor:
    """``dM − W(dM + dMᵀ)`` with ``dM = step_size·xᵀg``: the gradient of ``W`` through :func:`fold`."""
    dm = multiply(x.T, g, alpha=step_size)
    return multiply(weight, dm + dm.T, dm, alpha=-1)


def folds(x: Tensor, folded: Tensor | None) -> bool:
    """Whether the folded route is the shorter one: M is known, or its d³ product is paid by the rows."""
    return folded is not None or x.shape[0] >= x.shape[1]


def residual(x: Tensor, weight: Tensor) -> Tensor:
    """``r = x − x Wᵀ``, so that ``x W − x Wᵀ W = r W``."""
    return multiply(x, weight.T, x, alpha=-1)
