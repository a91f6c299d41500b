"""LayerNorm, subspace attention, output projection and residual: the specification and the test oracle."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import layer_norm, linear

from ..subspace_attention.reference import subspace_attention


def why_not(z: Tensor, *_) -> None:
    return None


def mssa_block(
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
) -> Tensor:
    """``z + step_size·MSSA(LN(z))``; ``z (B, N, d)`` -> ``(B, N, d)``."""
    x = layer_norm(z, z.shape[-1:], norm_weight.to(z.dtype), norm_bias.to(z.dtype), eps)
    w = linear(x, u_weight).unflatten(-1, (heads, -1))
    o = subspace_attention(w, None, lengths, scale, causal).flatten(2)
    o = o if out_weight is None else linear(o, out_weight, out_bias)
    return z + step_size * o if step_size != 1 else z + o
