"""Two overcomplete ISTA steps in Triton: thresholds, ReLUs, their masks and the sums with other terms in epilogues."""

from __future__ import annotations

from torch import Tensor

from ..triton_kernels import launch
from ..triton_kernels.product import product


def why_not(x: Tensor, *_) -> str | None:
    return launch.why_not(x)


def forward(x: Tensor, D: Tensor, D1: Tensor | None, step_size: float, lambd: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> ``out (n, d)`` and the codes ``z1, z2 (n, m)``."""
    threshold = step_size * lambd
    z1 = product(x, D, alpha=step_size, shift=threshold, relu=True).out
    z2 = product(_residual(x, z1, D), D, alpha=-step_size, residual=z1, shift=threshold, relu=True).out
    return z2 @ (D if D1 is None else D1).T, z1, z2


def backward(
    grad: Tensor, x: Tensor, D: Tensor, D1: Tensor | None, z1: Tensor, z2: Tensor, step_size: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> ``(dx, dD, dD1)``; ``dD1`` is None where the dictionaries are tied, its part is then in ``dD``."""
    r = _residual(x, z1, D)
    g2 = product(grad, D if D1 is None else D1, gate=z2).out
    dr = g2 @ D.T  # of -step_size·r
    g1 = product(dr, D, alpha=-step_size * step_size, residual=g2, beta=step_size, gate=z1).out
    dx = product(g1, D.T, residual=dr, beta=step_size).out
    dD = (r.T @ g2).addmm_(dr.T, z1).mul_(-step_size).addmm_(x.T, g1)
    if D1 is None:
        return dx, dD.addmm_(grad.T, z2), None
    return dx, dD, grad.T @ z2


def _residual(x: Tensor, z1: Tensor, D: Tensor) -> Tensor:
    return product(z1, D.T, residual=x, beta=-1.0).out
