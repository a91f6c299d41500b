"""Two overcomplete ISTA steps in stock PyTorch.

With the residual ``r = z1 Dᵀ − x`` the second step is ``z2 = relu(z1 − step·r D − step·lambd)``: ``x D`` is needed for
the first step only. The two codes are saved for backward; ``r`` is recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..products import multiply


def why_not(x: Tensor, *_) -> None:
    return None


def forward(x: Tensor, D: Tensor, D1: Tensor | None, step_size: float, lambd: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> ``out (n, d)`` and the codes ``z1, z2 (n, m)``."""
    z1 = multiply(x, D).sub_(lambd).mul_(step_size).relu_()
    z2 = multiply(_residual(x, z1, D), D, z1 - step_size * lambd, alpha=-step_size).relu_()
    return multiply(z2, (D if D1 is None else D1).T), z1, z2


def backward(
    grad: Tensor, x: Tensor, D: Tensor, D1: Tensor | None, z1: Tensor, z2: Tensor, step_size: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> ``(dx, dD, dD1)``; ``dD1`` is None where the dictionaries are tied, its part is then in ``dD``."""
    r = _residual(x, z1, D)
    g2 = torch.ops.aten.threshold_backward(multiply(grad, D if D1 is None else D1), z2, 0)
    dr = multiply(g2, D.T, alpha=-step_size)
    g1 = torch.ops.aten.threshold_backward(multiply(dr, D, g2), z1, 0).mul_(step_size)
    dD = multiply(x.T, g1, multiply(dr.T, z1, multiply(r.T, g2, alpha=-step_size)))
    dx = multiply(g1, D.T, dr.neg_())
    if D1 is None:
        return dx, multiply(grad.T, z2, dD), None
    return dx, dD, multiply(grad.T, z2)


def _residual(x: Tensor, z1: Tensor, D: Tensor) -> Tensor:
    return multiply(z1, D.T, -x)
