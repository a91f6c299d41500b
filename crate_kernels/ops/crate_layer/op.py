"""``crate::crate_layer``: schema and fake. The files beside this one contain the implementations.

The interface of every implementation (``C`` is the dtype of the matrices, ``S`` that of the stream ``z``; ``S`` is
``C`` except under autocast, where it is float32)::

    forward(
        z (B, N, d) S, mssa_norm_weight (d,), mssa_norm_bias (d,), u_weight (H·p, d) C, out_weight (d, H·p) C or None,
        out_bias (d,) C or None, ista_norm_weight (d,), ista_norm_bias (d,), weight (d, d) C, folded (d, d) C or None,
        lengths (B,) or None, heads, scale, causal, mssa_step_size, step_size, lambd, mssa_eps, ista_eps, save,
    ) -> (
        out (B, N, d) S, w (B, N, H, p) C, o (B, N, H, p) C, lse (B, H, N), mssa_mean (B, N), mssa_rstd (B, N),
        between (B, N, d) C, ista_mean (B, N), ista_rstd (B, N),
    )
    backward(
        grad (B, N, d) S, z … lengths as above, out, w, o, lse, mssa_mean, mssa_rstd, between, ista_mean, ista_rstd,
        scale, causal, mssa_step_size, step_size, mssa_eps, ista_eps,
    ) -> gradients of z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, ista_norm_weight,
         ista_norm_bias, weight, each in the dtype of its tensor; None for an absent one
    why_not(the arguments of forward without save) -> None, or the reason why it cannot run them

``lse`` and the statistics are float32 (float64 for float64). Their contents, and those of ``between`` (the stream
between the halves), are private to the implementation: only its own ``backward`` reads them. With ``save=False`` no
gradient will be needed, and every result but ``out`` may be an empty tensor of any shape. ``forward`` and ``backward``
run with autocast off. Their results share memory neither with each other nor with an argument.

An implementation may also have ``prepare(z, …)``, see :func:`crate_kernels.nn.prepare_for_inference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..operator import Operator


def _fake(
    z: Tensor, mssa_norm_weight, mssa_norm_bias, u_weight: Tensor, out_weight, out_bias, ista_norm_weight,
    ista_norm_bias, weight, folded, lengths, heads: int, *rest,
):  # fmt: skip
    batch, tokens, _ = z.shape
    statistics = backends.accumulation_dtype(z.dtype)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    w = u_weight.new_empty((batch, tokens, heads, u_weight.shape[0] // heads))
    lse = z.new_empty((batch, heads, tokens), dtype=statistics)
    mean = z.new_empty((batch, tokens), dtype=statistics)
    between = torch.empty(z.shape, dtype=u_weight.dtype, device=z.device)
    rows = (torch.empty_like(mean) for _ in range(3))
    return out, w, torch.empty_like(w), lse, mean, next(rows), between, *rows


operator = Operator(
    __package__,
    "Tensor z, Tensor mssa_norm_weight, Tensor mssa_norm_bias, Tensor u_weight, Tensor? out_weight, Tensor? out_bias,"
    "Tensor ista_norm_weight, Tensor ista_norm_bias, Tensor weight, Tensor? folded, Tensor? lengths,"
    "int heads, float scale, bool causal, float mssa_step_size, float step_size, float lambd,"
    "float mssa_eps, float ista_eps",
    outputs=("out", "w", "o", "lse", "mssa_mean", "mssa_rstd", "between", "ista_mean", "ista_rstd"),
    saves=("out", "w", "o", "lse", "mssa_mean", "mssa_rstd", "between", "ista_mean", "ista_rstd"),
    passes=("scale", "causal", "mssa_step_size", "step_size", "mssa_eps", "ista_eps"),
    constants=("folded", "lengths"),
    casts=("u_weight", "out_weight", "out_bias", "weight", "folded"),
    sizes=lambda z, *_: (z.shape[1], z.shape[0] * z.shape[1]),
    fake=_fake,
    optional=True,
)
