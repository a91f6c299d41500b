"""``crate::subspace_cross_attention``: schema and fake. The files beside this one contain the implementations.

``lse`` is private to the implementation: only its own ``backward`` reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..operator import Operator


def _fake(w: Tensor, context: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float):
    batch, queries, heads, _ = w.shape
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    shape = (batch, heads, context.shape[1] + queries)
    return o, w.new_empty(shape, dtype=backends.accumulation_dtype(w.dtype))


operator = Operator(
    __package__,
    "Tensor w, Tensor context, Tensor? value, Tensor? lengths, float scale",
    outputs=("o", "lse"),
    saves=("o", "lse"),
    passes=("scale",),
    constants=("lengths",),
    casts=("w", "context", "value"),
    sizes=lambda w, *_: (w.shape[1], w.shape[0] * w.shape[1]),
    fake=_fake,
    keys=1,
)
