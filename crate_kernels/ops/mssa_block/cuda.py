"""LayerNorm, subspace attention, output projection and residual in CUDA C++ and cuBLASLt.

The output projection adds residual and bias in its epilogue. In the backward, one kernel takes the gradient through
LayerNorm, adds the residual's, and sums the gradients of the norm and of the output bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_kernels
from ..cuda_kernels import product


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
    inner = u_weight.shape[0]
    return cuda_kernels.why_not_heads(u_weight, z.shape[1], inner // heads) or cuda_kernels.why_not_columns(
        z, u_weight, z.shape[2], inner
    )


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
    batch, tokens, _ = z.shape
    rows = z.flatten(0, 1).contiguous()
    x, _, mean, rstd = cuda_kernels.layer_norm(rows, norm_weight, norm_bias, eps, u_weight.dtype)
    w = product(x, u_weight.T) if batch else x.new_empty(0, u_weight.shape[0])
    w = w.view(batch, tokens, heads, -1) if batch else w.view(0, tokens, heads, u_weight.shape[0] // heads)
    o, lse = cuda_kernels.attention_forward(w, lengths, scale, causal)
    attended = o.view(batch * tokens, u_weight.shape[0])
    if out_weight is None or not batch:
        out = torch.add(rows, attended, alpha=step_size) if batch else torch.empty_like(rows)
    else:
        bias = None if out_bias is None else (out_bias if step_size == 1 else step_size * out_bias).to(z.dtype)
        out = product(attended, out_weight.T, rows, bias, alpha=step_size, dtype=z.dtype)
    return out.view(z.shape), w, o, lse, mean.view(batch, tokens), rstd.view(batch, tokens)


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
    if z.shape[0] == 0:
        parameters = (norm_weight, norm_bias, u_weight, out_weight, out_bias)
        return torch.empty_like(z), *(None if t is None else torch.zeros_like(t) for t in parameters)
    rows, upper = z.flatten(0, 1).contiguous(), grad.flatten(0, 1).contiguous()
    attended, narrow = o.flatten(2).flatten(0, 1), upper.to(o.dtype)
    if out_weight is None:
        do, dout_weight = step_size * narrow, None
    else:
        do = product(narrow, out_weight, alpha=step_size)
        dout_weight = product(narrow.T, attended, alpha=step_size)
    dw = cuda_kernels.attention_backward(do.view(o.shape), w, lengths, o, lse, scale, causal).view(attended.shape)
    x, _, _ = cuda_kernels.layer_norm_again(rows, norm_weight, norm_bias, mean.flatten(), rstd.flatten(), dw.dtype)
    du_weight = product(dw.T, x)
    dz, dnorm_weight, dnorm_bias, column_sums = cuda_kernels.layer_norm_backward(
        product(dw, u_weight, dtype=z.dtype), rows, mean.flatten(), rstd.flatten(), norm_weight, upper
    )
    dout_bias = None if out_bias is None else (step_size * column_sums).to(out_bias.dtype)
    return (
        dz.view(z.shape), dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype), du_weight,
        dout_weight, dout_bias,
    )  # fmt: skip
