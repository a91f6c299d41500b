"""LayerNorm, subspace attention, output projection and residual in Triton: four launches over the rows forward.

The first launch takes the statistics of the rows. The projection normalizes its rows itself. The output projection adds
bias and residual, and can measure the rows that it writes, for the norm that follows. In the backward the products
without an epilogue are the vendor's; one pass over the rows does LayerNorm, residual and their parameters' gradients.
"""

from __future__ import annotations

from torch import Tensor

from ..subspace_attention import triton as attention
from ..triton_kernels import layer_norm
from ..triton_kernels.product import FoldedNorm, Statistics, fold_norm, product


def why_not(
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
    *_,
) -> str | None:
    return layer_norm.why_not(z) or attention.why_not_width(u_weight.shape[0] // heads, z)


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
    return measured_forward(
        z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, heads, scale, causal, step_size, eps
    )[:-2]


def fold(u_weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float) -> FoldedNorm:
    """The norm folded into the projection."""
    return fold_norm(u_weight.T, norm_weight, norm_bias, eps)


def measured_forward(
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
    *,
    norm: FoldedNorm | None = None,
    measure: bool = False,
    copy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Statistics | None, Tensor | None]:
    """What ``forward`` returns, the statistics of the rows of ``out``, and ``out`` in the dtype of the matrices.

    The last two are None where ``measure`` and ``copy`` do not ask for them, and where no product writes ``out``.
    ``norm`` is what :func:`fold` returns, if it is known.
    """
    batch, tokens, width = z.shape
    rows = z.reshape(-1, width)
    projected = product(rows, fold(u_weight, norm_weight, norm_bias, eps) if norm is None else norm)
    w = projected.out.view(batch, tokens, heads, u_weight.shape[0] // heads)
    o, lse = attention.forward(w, None, lengths, scale, causal)
    statistics = copied = None
    if out_weight is None:
        out = z.add(o.flatten(2), alpha=step_size).contiguous()
    else:
        result = product(
            o.view(-1, u_weight.shape[0]), out_weight.T, alpha=step_size, bias=out_bias, residual=rows,
            measure=measure, copy=u_weight.dtype if copy else None,
        )  # fmt: skip
        out, statistics, copied = result.out.view(z.shape), result.statistics, result.copy
    mean, rstd = projected.mean.view(batch, tokens), projected.rstd.view(batch, tokens)
    return out, w, o, lse, mean, rstd, statistics, copied


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
    step = grad.reshape(-1, z.shape[-1])
    rows = z.reshape(-1, z.shape[-1])
    narrow = step.to(u_weight.dtype)
    if out_weight is None:
        dout_weight = None
        do = narrow if step_size == 1 else step_size * narrow
    else:
        # The step size multiplies the small factor, which saves a pass over the rows.
        dout_weight = _scaled(narrow.T @ o.view(-1, u_weight.shape[0]), step_size)
        do = narrow @ (out_weight if step_size == 1 else step_size * out_weight)
    dw, _ = attention.backward(do.view(o.shape), w, None, lengths, o, lse, scale, causal)
    dw = dw.view(-1, u_weight.shape[0])
    dz, dnorm_weight, dnorm_bias, x, total = layer_norm.layer_norm_backward(
        dw @ u_weight, rows, norm_weight, norm_bias, mean.view(-1), rstd.view(-1),
        residual=step, dtype=u_weight.dtype,
    )  # fmt: skip
    dout_bias = None if out_bias is None else _scaled(total, step_size).to(out_bias.dtype)
    return dz.view(z.shape), dnorm_weight, dnorm_bias, dw.T @ x, dout_weight, dout_bias


def _scaled(gradient: Tensor, step_size: float) -> Tensor:
    return gradient if step_size == 1 else gradient.mul_(step_size)
