"""LayerNorm and one ISTA step in Triton.

Where the step folds, the forward reads the rows once for their statistics,
unless it is given them, and once for norm, product, residual, threshold and ReLU.
"""

from __future__ import annotations

from torch import Tensor

from .. import layer_norm as stock
from ..ista_step import folding
from ..ista_step import triton as ista_step
from ..triton_kernels import launch, layer_norm
from ..triton_kernels.product import FoldedNorm, Statistics, fold_norm, product


def why_not(z: Tensor, *_) -> str | None:
    return layer_norm.why_not(z) or launch.why_not(z)


def forward(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    folded: Tensor | None,
    step_size: float,
    lambd: float,
    eps: float,
    *,
    norm: FoldedNorm | None = None,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``z (n, d)`` -> ``out (n, d)`` and the row statistics ``mean, rstd (n,)``.

    ``norm`` is what :func:`fold` returns, if it is known. ``statistics`` of ``z`` save a pass over ``z`` where the
    kernel that wrote it has measured them.
    """
    if not folding.folds(z, folded):
        x, mean, rstd = stock.layer_norm(z, norm_weight, norm_bias, eps)
        return ista_step.forward(x, weight, folded, step_size, lambd), mean, rstd
    norm = fold(weight, folded, norm_weight, norm_bias, eps) if norm is None else norm
    result = product(z, norm, statistics=statistics, alpha=step_size, residual=z, shift=step_size * lambd, relu=True)
    return result.out, result.mean, result.rstd


def fold(weight: Tensor, folded: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> FoldedNorm:
    """The norm folded into ``W − WᵀW``."""
    return fold_norm(folding.fold(weight) if folded is None else folded, norm_weight, norm_bias, eps)


def backward(
    grad: Tensor,
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    folded: Tensor | None,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    step_size: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> ``(dz, dnorm_weight, dnorm_bias, dweight)``. ``z`` may be narrower than it was: ``dz`` is like ``grad``."""
    if not folding.folds(z, folded):
        z = z.to(grad.dtype)
        x, _, _ = stock.layer_norm(z, norm_weight, norm_bias, eps)
        dx, dweight = ista_step.backward(grad, x, weight, folded, out, step_size)
        return *stock.layer_norm_backward(dx, z, norm_weight, norm_bias, mean, rstd), dweight
    dx, g = ista_step.input_backward(grad, weight, folded, out, step_size)
    dz, dnorm_weight, dnorm_bias, x, _ = layer_norm.layer_norm_backward(
        dx, z, norm_weight, norm_bias, mean, rstd, dtype=weight.dtype
    )
    return dz, dnorm_weight, dnorm_bias, folding.weight_backward(x, g, weight, step_size)
