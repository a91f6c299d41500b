"""LayerNorm, subspace attention, output projection and residual in stock PyTorch.

Saved for backward: ``z``, the projected tokens ``w``, the attended tokens ``o`` and scalars per row. The normalized
rows are recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer_norm import layer_norm, layer_norm_backward
from ..products import multiply
from ..subspace_attention import eager as attention


def why_not(z: Tensor, *_) -> None:
    return None


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> ``out (B, N, d)``, ``w, o (B, N, H, p)``, ``lse (B, H, N)``, ``mean, rstd (B, N)``."""
    x, mean, rstd = layer_norm(z, norm_weight, norm_bias, eps)
    w = multiply(x.flatten(0, 1).to(u_weight.dtype), u_weight.T).view(*z.shape[:2], heads, u_weight.shape[0] // heads)
    o, lse = attention.forward(w, None, lengths, scale, causal)
    if out_weight is None:
        out = torch.add(z, o.flatten(2), alpha=step_size)
    else:
        # The product starts from residual and bias, which saves one pass over the tokens. It reuses the memory of x,
        # which is no longer needed.
        start = z if out_bias is None else torch.add(z, out_bias, alpha=step_size, out=x)
        out = multiply(o.flatten(2).flatten(0, 1), out_weight.T, start.flatten(0, 1), alpha=step_size).view(z.shape)
    return out, w, o, lse, mean, rstd


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """-> ``(dz, dnorm_weight, dnorm_bias, du_weight, dout_weight, dout_bias)``, the last two None where absent."""
    step = (grad if step_size == 1 else step_size * grad).flatten(0, 1).to(u_weight.dtype)
    dout_weight = None if out_weight is None else multiply(step.T, o.flatten(2).flatten(0, 1))
    dout_bias = None if out_bias is None else step.sum(0)
    do = (step if out_weight is None else multiply(step, out_weight)).view(o.shape)
    dw, _ = attention.backward(do, w, None, lengths, o, lse, scale, causal)
    dw = dw.flatten(2).flatten(0, 1)
    x, _, _ = layer_norm(z, norm_weight, norm_bias, eps)
    du_weight = multiply(dw.T, x.flatten(0, 1).to(u_weight.dtype))
    dz, dnorm_weight, dnorm_bias = layer_norm_backward(
        multiply(dw, u_weight).view(z.shape).to(z.dtype), z, norm_weight, norm_bias, mean, rstd
    )
    return dz.add_(grad), dnorm_weight, dnorm_bias, du_weight, dout_weight, dout_bias
