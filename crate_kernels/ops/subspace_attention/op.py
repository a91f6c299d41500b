"""``crate::subspace_attention``: schema and fake. The files beside this one contain the implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..operator import Operator


def _fake(w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool):
    batch, tokens, heads, _ = w.shape
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    return o, w.new_empty((batch, heads, tokens), dtype=backends.accumulation_dtype(w.dtype))


operator = Operator(
    __package__,
    "Tensor w, Tensor? value, Tensor? lengths, float scale, bool causal",
    outputs=("o", "lse"),
    saves=("o", "lse"),
    passes=("scale", "causal"),
    constants=("lengths",),
    casts=("w", "value"),
    sizes=lambda w, *_: (w.shape[1], w.shape[0] * w.shape[1]),
    fake=_fake,
)
