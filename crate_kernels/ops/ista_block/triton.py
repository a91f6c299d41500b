"""LayerNorm and one ISTA step in Triton: one launch over the rows forward, where the step folds."""

from __future__ import annotations

from torch import Tensor

from ..ista_step import eager as step
from ..ista_step.triton import input_backward
from ..triton_kernels import launch, layer_norm
from ..triton_kernels.product import fold_norm, product
from . import eager


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
) -> tuple[Tensor, Tensor, Tensor]:
    """``z (n, d)`` -> ``out (n, d)`` and the row statistics ``mean, rstd (n,)``."""
    if not step.folds(z, folded):
        return eager.forward(z, norm_weight, norm_bias, weight, folded, step_size, lambd, eps)
    norm = fold_norm(step.fold(weight) if folded is None else folded, norm_weight, norm_bias, eps)
    return product(z, norm, alpha=step_size, residual=z, shift=step_size * lambd, relu=True)


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
    """-> ``(dz, dnorm_weight, dnorm_bias, dweight)``."""
    if not step.folds(z, folded):
        return eager.backward(grad, z, norm_weight, norm_bias, weight, folded, out, mean, rstd, step_size, eps)
    dx, g = input_backward(grad, weight, folded, out, step_size)
    dz, dnorm_weight, dnorm_bias, x, _ = layer_norm.layer_norm_backward(dx, z, norm_weight, norm_bias, mean, rstd)
    return dz, dnorm_weight, dnorm_bias, step.weight_backward(x, g, weight, step_size)
