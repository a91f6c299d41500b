"""``crate::overcomplete_ista``: schema and fake. The files beside this one contain the implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operator import Operator


def _fake(x: Tensor, D: Tensor, D1: Tensor | None, step_size: float, lambd: float):
    codes = x.new_empty((x.shape[0], D.shape[1]))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), codes, torch.empty_like(codes)


operator = Operator(
    __package__,
    "Tensor x, Tensor D, Tensor? D1, float step_size, float lambd",
    outputs=("out", "z1", "z2"),
    saves=("z1", "z2"),
    passes=("step_size",),
    casts=("x", "D", "D1"),
    sizes=lambda x, *_: (x.shape[1], x.shape[0]),
    fake=_fake,
)
