"""A whole CRATE layer in C++ on the CPU (``csrc/cpu/layer.h``)."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_kernels
from ..mssa_block import cpu as mssa_block


def why_not(
    z: Tensor,
    mssa_norm_weight: Tensor,
    mssa_norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    ista_norm_weight: Tensor,
    ista_norm_bias: Tensor,
    weight: Tensor,
    folded: Tensor | None,
    lengths: Tensor | None,
    heads: int,
    *_,
) -> str | None:
    attention = (z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, lengths, heads)
    return mssa_block.why_not(*attention) or cpu_kernels.why_not(ista_norm_weight, ista_norm_bias, weight)


def forward(
    z: Tensor,
    mssa_norm_weight: Tensor,
    mssa_norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    ista_norm_weight: Tensor,
    ista_norm_bias: Tensor,
    weight: Tensor,
    folded: Tensor | None,
    lengths: Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    mssa_step_size: float,
    step_size: float,
    lambd: float,
    mssa_eps: float,
    ista_eps: float,
    save: bool,
) -> tuple[Tensor | None, ...]:
    """-> ``out (B, N, d)`` and what ``op.py`` lists; the tokens between the halves are saved in the matrices' dtype."""
    weights = (
        mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias,
        ista_norm_weight, ista_norm_bias, weight, folded,
    )  # fmt: skip
    steps, eps = (mssa_step_size, step_size, lambd), (mssa_eps, ista_eps)
    packed = (0, 0, 0)
    if folded is not None and not save:  # prepared for inference: the weights stay
        kept = cpu_kernels.kept_pack
        packed = (kept(u_weight, True), kept(out_weight, True), kept(folded, False))
    return cpu_kernels.layer_forward(z, weights, lengths, heads, scale, causal, steps, eps, save, packed)


def backward(
    grad: Tensor,
    z: Tensor,
    mssa_norm_weight: Tensor,
    mssa_norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    ista_norm_weight: Tensor,
    ista_norm_bias: Tensor,
    weight: Tensor,
    folded: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    w: Tensor,
    o: Tensor,
    lse: Tensor,
    mssa_mean: Tensor,
    mssa_rstd: Tensor,
    between: Tensor,
    ista_mean: Tensor,
    ista_rstd: Tensor,
    scale: float,
    causal: bool,
    mssa_step_size: float,
    step_size: float,
    mssa_eps: float,
    ista_eps: float,
) -> list[Tensor | None]:
    """-> the gradients that ``op.py`` lists."""
    weights = (
        mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias,
        ista_norm_weight, ista_norm_bias, weight, folded,
    )  # fmt: skip
    saved = (out, w, o, lse, mssa_mean, mssa_rstd, between, ista_mean, ista_rstd)
    return cpu_kernels.layer_backward(
        grad, z, weights, lengths, *saved, scale, causal, (mssa_step_size, step_size, 0.0), (mssa_eps, ista_eps)
    )
