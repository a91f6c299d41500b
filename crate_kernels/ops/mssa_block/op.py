"""``crate::mssa_block``: schema and fake. The files beside this one contain the implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..operator import Operator


def _fake(z: Tensor, norm_weight, norm_bias, u_weight: Tensor, out_weight, out_bias, lengths, heads: int, *rest):
    batch, tokens, _ = z.shape
    statistics = backends.accumulation_dtype(z.dtype)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    w = u_weight.new_empty((batch, tokens, heads, u_weight.shape[0] // heads))
    lse = z.new_empty((batch, heads, tokens), dtype=statistics)
    mean = z.new_empty((batch, tokens), dtype=statistics)
    return out, w, torch.empty_like(w), lse, mean, torch.empty_like(mean)


operator = Operator(
    __package__,
    "Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor u_weight, Tensor? out_weight, Tensor? out_bias,"
    "Tensor? lengths, int heads, float scale, bool causal, float step_size, float eps",
    outputs=("out", "w", "o", "lse", "mean", "rstd"),
    saves=("w", "o", "lse", "mean", "rstd"),
    passes=("scale", "causal", "step_size", "eps"),
    constants=("lengths",),
    casts=("u_weight", "out_weight", "out_bias"),
    sizes=lambda z, *_: (z.shape[1], z.shape[0] * z.shape[1]),
    fake=_fake,
)
