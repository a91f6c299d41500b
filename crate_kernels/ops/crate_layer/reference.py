"""A whole CRATE layer: the specification and the test oracle."""

from __future__ import annotations

from torch import Tensor

from ..ista_block.reference import ista_block
from ..mssa_block.reference import mssa_block


def why_not(z: Tensor, *_) -> None:
    return None


def crate_layer(
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
) -> Tensor:
    """``ISTA(LN(z + mssa_step_size·MSSA(LN(z))))``; ``z (B, N, d)`` -> ``(B, N, d)``."""
    between = mssa_block(
        z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, lengths,
        heads, scale, causal, mssa_step_size, mssa_eps,
    )  # fmt: skip
    return ista_block(between, ista_norm_weight, ista_norm_bias, weight, folded, step_size, lambd, ista_eps)
