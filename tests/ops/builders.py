"""Seeded inputs of one call, by its sizes."""

from __future__ import annotations

import torch

from crate_kernels import ops

from .cases import Case


def normal(*shape, spread=1.0, seed=0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def attention(batch, tokens, heads, width, *, value=False, spread=1.0, **options):
    w = normal(batch, tokens, heads, width, spread=spread)
    v = normal(batch, tokens, heads, width, seed=1) if value else None
    return Case("", ops.subspace_attention, (w, v), options)


def mssa(batch, tokens, width, heads, p, *, output=True, bias=True, **options):
    norm = 1 + normal(width, spread=0.2), normal(width, spread=0.2, seed=1)
    out_weight = normal(width, heads * p, spread=(heads * p) ** -0.5) if output else None
    out_bias = normal(width, seed=2) if output and bias else None
    tensors = normal(batch, tokens, width), *norm, normal(heads * p, width, spread=width**-0.5), out_weight, out_bias
    return Case("", ops.mssa_block, tensors, dict(heads=heads, **options))


def ista(batch, tokens, width, **options):
    norm = 1 + normal(width, spread=0.2), normal(width, spread=0.2, seed=1)
    tensors = normal(batch, tokens, width), *norm, normal(width, width, spread=width**-0.5)
    return Case("", ops.ista_block, tensors, options)
