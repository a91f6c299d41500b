"""LayerNorm and one ISTA step in CUDA C++ and cuBLASLt.

The backward recomputes LN(z) in the kernel that applies the ReLU's mask, and sums the norm's gradients in the kernel
that takes the gradient through LayerNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_kernels
from ..ista_step import cuda as ista_step


def why_not(z: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *_) -> str | None:
    return cuda_kernels.why_not_columns(z, weight, z.shape[1])


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
    x, x_wide, mean, rstd = cuda_kernels.layer_norm(z, norm_weight, norm_bias, eps, weight.dtype, wide=True)
    return ista_step.step(x, x_wide, weight, folded, step_size, lambd), mean, rstd


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
    if z.shape[0] == 0:
        return torch.empty_like(z), *(torch.zeros_like(t) for t in (norm_weight, norm_bias, weight))
    x, g, g_wide = cuda_kernels.layer_norm_again(z, norm_weight, norm_bias, mean, rstd, weight.dtype, grad, out)
    dx, dweight = ista_step.gradients(g, g_wide, x, weight, folded, step_size)
    dz, dnorm_weight, dnorm_bias = cuda_kernels.layer_norm_backward(dx, z, mean, rstd, norm_weight)
    return dz, dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype), dweight
