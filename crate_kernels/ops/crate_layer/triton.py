"""A whole CRATE layer in Triton: the two halves, with what passes between them.

The attention half measures the rows that it writes, so the norm of the ISTA half needs no pass over them. In a model
that is prepared for inference both norms stay folded into their matrices from call to call.
"""

from __future__ import annotations

from torch import Tensor

from ..ista_block import triton as ista_block
from ..kept import kept
from ..mssa_block import triton as mssa_block
from .halves import compose

why_not, _, backward = compose(mssa_block, ista_block, narrow=True)


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
) -> tuple[Tensor, ...]:
    """-> ``out (B, N, d)`` and what ``op.py`` lists; ``between`` is the stream between the halves."""
    mssa_norm = (mssa_norm_weight, mssa_norm_bias, mssa_eps)
    ista_norm = (ista_norm_weight, ista_norm_bias, ista_eps)

    def fold() -> tuple:
        return mssa_block.fold(u_weight, *mssa_norm), ista_block.fold(weight, folded, *ista_norm)

    norms = None
    if folded is not None and not save:
        weights = (mssa_norm_weight, mssa_norm_bias, u_weight, ista_norm_weight, ista_norm_bias)
        norms = kept(folded, ("norms", mssa_eps, ista_eps), fold, weights)
    mssa_fold, ista_fold = norms or (None, None)
    copy = save and z.dtype != u_weight.dtype
    between, w, o, lse, mssa_mean, mssa_rstd, statistics, copied = mssa_block.measured_forward(
        z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, lengths,
        heads, scale, causal, mssa_step_size, mssa_eps, norm=mssa_fold, measure=True, copy=copy,
    )  # fmt: skip
    out, ista_mean, ista_rstd = ista_block.forward(
        between.flatten(0, 1), ista_norm_weight, ista_norm_bias, weight, folded, step_size, lambd, ista_eps,
        norm=ista_fold, statistics=statistics,
    )  # fmt: skip
    if save:
        between = between.to(u_weight.dtype) if copied is None else copied.view(z.shape)
        ista_mean, ista_rstd = ista_mean.view(mssa_mean.shape), ista_rstd.view(mssa_mean.shape)
    return out.view(z.shape), w, o, lse, mssa_mean, mssa_rstd, between, ista_mean, ista_rstd
