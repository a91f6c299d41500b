"""Subspace attention: the specification and the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from ..masks import finite_where_hidden, forbidden


def why_not(w: Tensor, *_) -> None:
    return None


def subspace_attention(w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """``softmax(scale * w wᵀ) value`` per head; ``w, value (B, N, H, p)`` -> ``(B, N, H, p)``."""
    value = finite_where_hidden(w if value is None else value, lengths)
    return (attention_maps(w, scale, causal, lengths) @ value.transpose(1, 2)).transpose(1, 2).contiguous()


def attention_maps(w: Tensor, scale: float, causal: bool = False, lengths: Tensor | None = None) -> Tensor:
    """``softmax(scale · w wᵀ)``; ``w (B, N, H, p)`` -> ``(B, H, N, N)``."""
    heads = finite_where_hidden(w, lengths).transpose(1, 2)
    scores = scale * heads @ heads.transpose(-1, -2)
    mask = forbidden(w.shape[1], lengths, causal, w.device)
    return (scores if mask is None else scores.masked_fill(mask, -torch.inf)).softmax(dim=-1)
