"""LayerNorm and one ISTA step in stock PyTorch; the backward recomputes the normalized rows."""

from __future__ import annotations

from torch import Tensor

from ..ista_step import eager as ista_step
from ..layer_norm import layer_norm, layer_norm_backward


def why_not(z: Tensor, *_) -> None:
    return None


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
    x, mean, rstd = layer_norm(z, norm_weight, norm_bias, eps)
    return ista_step.forward(x, weight, folded, step_size, lambd), mean, rstd


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
    x, _, _ = layer_norm(z, norm_weight, norm_bias, eps)
    dx, dweight = ista_step.backward(grad, x, weight, folded, out, step_size)
    return *layer_norm_backward(dx, z, norm_weight, norm_bias, mean, rstd), dweight
