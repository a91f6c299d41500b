"""Masks: the keys that a query may not see. All torch implementations share these rules."""

from __future__ import annotations

import torch
from torch import Tensor


def forbidden(tokens: int, lengths: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """True if query i may not see key j, broadcastable to ``(B, H, N, N)``: ``j >= lengths[b]``, or ``j > i``."""
    index = torch.arange(tokens, device=device)
    future = (index[None, :] > index[:, None])[None, None] if causal else None
    if lengths is None:
        return future
    padding = (index[None, :] >= lengths[:, None])[:, None, None]
    return padding if future is None else padding | future


def finite_where_hidden(w: Tensor, lengths: Tensor | None) -> Tensor:
    """``w (B, N, H, p)`` with zeros in place of NaN and inf at ``lengths[b]`` and beyond.

    Hidden tokens have the weight zero. Zero times NaN is NaN, so NaN in a hidden token would reach every row.
    """
    if lengths is None:
        return w
    hidden = torch.arange(w.shape[1], device=w.device) >= lengths[:, None]
    return w.masked_fill(hidden[..., None, None] & ~w.isfinite(), 0)
