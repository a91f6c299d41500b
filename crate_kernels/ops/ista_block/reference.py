"""LayerNorm and one ISTA step: the specification and the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ista_step.reference import ista_step


def why_not(z: Tensor, *_) -> None:
    return None


def ista_block(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    folded: Tensor | None,
    step_size: float,
    lambd: float,
    eps: float,
) -> Tensor:
    """``ista_step(LN(z))``; ``z (n, d)`` -> ``(n, d)``."""
    x = torch.nn.functional.layer_norm(z, z.shape[-1:], norm_weight.to(z.dtype), norm_bias.to(z.dtype), eps)
    x = x.to(z.dtype)  # autocast on GPUs normalizes in float32
    return ista_step(x, weight, folded, step_size, lambd)
