"""``crate::ista_block``: schema and fake. The files beside this one contain the implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..operator import Operator


def _fake(z: Tensor, *_):
    mean = z.new_empty(z.shape[:-1], dtype=backends.accumulation_dtype(z.dtype))
    return torch.empty(z.shape, dtype=z.dtype, device=z.device), mean, torch.empty_like(mean)


operator = Operator(
    __package__,
    "Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? folded,"
    "float step_size, float lambd, float eps",
    outputs=("out", "mean", "rstd"),
    saves=("out", "mean", "rstd"),
    passes=("step_size", "eps"),
    constants=("folded",),
    casts=("weight", "folded"),
    sizes=lambda z, *_: (z.shape[1], z.shape[0]),
    fake=_fake,
)
