"""``crate::ista_step``: schema and fake. The files beside this one contain the implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operator import Operator


def _fake(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


operator = Operator(
    __package__,
    "Tensor x, Tensor weight, Tensor? folded, float step_size, float lambd",
    outputs=("out",),
    saves=("out",),
    passes=("step_size",),
    constants=("folded",),
    casts=("weight", "folded"),
    sizes=lambda x, *_: (x.shape[1], x.shape[0]),
    fake=_fake,
)
