"""Which keys a query may not see: the one rule that the reference and the eager backend share."""

from __future__ import annotations

import torch
from torch import Tensor


def forbidden(tokens: int, lengths: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """True where query i may not see key j, broadcastable to ``(B, H, N, N)``: ``j >= lengths[b]``, or ``j > i``."""
    index = torch.arange(tokens, device=device)
    future = (index[None, :] > index[:, None])[None, None] if causal else None
    if lengths is None:
        return future
    padding = (index[None, :] >= lengths[:, None])[:, None, None]
    return padding if future is None else padding | future
