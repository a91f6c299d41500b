"""LayerNorm and one ISTA step in Triton: one launch over the rows forward, where the step folds."""

from __future__ import annotations

from torch import Tensor

from .. import layer_norm as stock
from ..ista_step import folding
from ..ista_step import triton as ista_step
from ..triton_kernels import launch, layer_norm
from ..triton_kernels.product import fold_norm, product


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
    if not folding.folds(z, folded):
        x, mean, rstd = stock.layer_norm(z, norm_weight, norm_bias, eps)
        return ista_step.forward(x, weight, folded, step_size, lambd), mean, rstd
    norm = fold_norm(folding.fold(weight) if folded is None else folded, norm_weight, norm_bias, eps)
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
    if not folding.folds(z, folded):
        x, _, _ = stock.layer_norm(z, norm_weight, norm_bias, eps)
        dx, dweight = ista_step.backward(grad, x, weight, folded, out, step_size)
        return *stock.layer_norm_backward(dx, z, norm_weight, norm_bias, mean, rstd), dweight
    dx, g = ista_step.input_backward(grad, weight, folded, out, step_size)
    dz, dnorm_weight, dnorm_bias, x, _ = layer_norm.layer_norm_backward(dx, z, norm_weight, norm_bias, mean, rstd)
    return dz, dnorm_weight, dnorm_bias, folding.weight_backward(x, g, weight, step_size)
