"""Subspace cross-attention: the specification and the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import finite_where_hidden, forbidden


def why_not(w: Tensor, *_) -> None:
    return None


def subspace_cross_attention(
    w: Tensor, context: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float
) -> Tensor:
    """``softmax(scale * w cᵀ) value`` per head; ``w (B, N, H, p)``, ``context, value (B, M, H, p)`` -> as ``w``."""
    value = context if value is None else value
    context, value = finite_where_hidden(context, lengths), finite_where_hidden(value, lengths)
    scores = scale * w.transpose(1, 2) @ context.permute(0, 2, 3, 1)
    mask = forbidden(context.shape[1], lengths, False, w.device)
    scores = scores if mask is None else scores.masked_fill(mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2).contiguous()
