"""LayerNorm and one ISTA step in C++ on the CPU: the second half of a layer (``csrc/cpu/layer.h``)."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_kernels


def why_not(z: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *_) -> str | None:
    return cpu_kernels.why_not(z, norm_weight, norm_bias, weight)


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
    weights = (*cpu_kernels.NO_ATTENTION, norm_weight, norm_bias, weight, folded)
    steps = (1.0, step_size, lambd)
    out, *_, mean, rstd = cpu_kernels.layer_forward(z[None], weights, None, 1, 1.0, False, steps, (0.0, eps))
    return out[0], mean[0], rstd[0]


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
    weights = (*cpu_kernels.NO_ATTENTION, norm_weight, norm_bias, weight, folded)
    dz, *_, dnorm_weight, dnorm_bias, dweight = cpu_kernels.layer_backward(
        grad[None],
        z[None],
        weights,
        None,
        out[None],
        *(None,) * 6,
        mean,
        rstd,
        1.0,
        False,
        (1.0, step_size, 0.0),
        (0.0, eps),
    )
    return dz[0], dnorm_weight, dnorm_bias, dweight
