"""Subspace attention, literally: the specification and the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(w: Tensor, *_) -> None:
    return None


def subspace_attention(w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """``softmax(scale * w wᵀ) value`` per head; ``w, value (B, N, H, p)`` -> ``(B, N, H, p)``."""
    value = w if value is None else value
    heads = w.transpose(1, 2)
    scores = scale * heads @ heads.transpose(-1, -2)
    mask = forbidden(w.shape[1], lengths, causal, w.device)
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value.transpose(1, 2)).transpose(1, 2)


def forbidden(tokens: int, lengths: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """True where query i may not see key j, broadcastable to ``(B, H, N, N)``: ``j >= lengths[b]``, or ``j > i``."""
    index = torch.arange(tokens, device=device)
    future = (index[None, :] > index[:, None])[None, None] if causal else None
    if lengths is None:
        return future
    padding = (index[None, :] >= lengths[:, None])[:, None, None]
    return padding if future is None else padding | future
