"""LayerNorm, subspace attention, output projection and residual in C++ on the CPU: the first half of a layer."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_kernels


def why_not(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    lengths: Tensor | None,
    heads: int,
    *_,
) -> str | None:
    reason = cpu_kernels.why_not(z, norm_weight, norm_bias, u_weight, out_weight, out_bias)
    return reason or cpu_kernels.why_not_heads(u_weight.shape[0] // heads)


def forward(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    lengths: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    step_size: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """-> ``out (B, N, d)``, ``w, o (B, N, H, p)``, ``lse (B, H, N)``, ``mean, rstd (B, N)``."""
    weights = (norm_weight, norm_bias, u_weight, out_weight, out_bias, *cpu_kernels.NO_ISTA)
    steps = (step_size, 0.0, 0.0)
    return cpu_kernels.layer_forward(z, weights, lengths, heads, scale, causal, steps, (eps, 0.0))[:6]


def backward(
    grad: Tensor,
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    lengths: Tensor | None,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: float,
    causal: bool,
    step_size: float,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """-> ``(dz, dnorm_weight, dnorm_bias, du_weight, dout_weight, dout_bias)``, the last two None where absent."""
    weights = (norm_weight, norm_bias, u_weight, out_weight, out_bias, *cpu_kernels.NO_ISTA)
    saved = (None, w, o, lse, mean, rstd, None, None, None)
    return tuple(
        cpu_kernels.layer_backward(grad, z, weights, lengths, *saved, scale, causal, (step_size, 0.0, 0.0), (eps, 0.0))[
            :6
        ]
    )
