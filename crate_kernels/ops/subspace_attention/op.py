"""``crate::subspace_attention``: schema, fake, gradient. The backends stand beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

IMPLEMENTATIONS = backends.implementations(__package__)


@torch.library.custom_op(
    "crate::subspace_attention",
    mutates_args=(),
    schema="(Tensor w, Tensor? value, Tensor? lengths, float scale, bool causal, str backend) -> (Tensor, Tensor)",
)
def subspace_attention(w, value, lengths, scale, causal, backend):
    return backends.run(IMPLEMENTATIONS[backend].forward, w, value, lengths, scale, causal)


@subspace_attention.register_fake
def _(w, value, lengths, scale, causal, backend):
    batch, tokens, heads, _ = w.shape
    o = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    return o, w.new_empty((batch, heads, tokens), dtype=backends.accumulation_dtype(w.dtype))


@torch.library.custom_op(
    "crate::subspace_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor w, Tensor? value, Tensor? lengths, Tensor o, Tensor lse, float scale, bool causal,"
    " str backend) -> (Tensor, Tensor)",
)
def subspace_attention_backward(grad, w, value, lengths, o, lse, scale, causal, backend):
    dw, dvalue = backends.run(IMPLEMENTATIONS[backend].backward, grad, w, value, lengths, o, lse, scale, causal)
    # A schema cannot return an absent tensor; an empty one stands for it.
    return dw, w.new_empty(0) if dvalue is None else dvalue


@subspace_attention_backward.register_fake
def _(grad, w, value, lengths, o, lse, scale, causal, backend):
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    return dw, w.new_empty(0) if value is None else torch.empty_like(dw)


def _setup_context(ctx, inputs, output):
    w, value, lengths, ctx.scale, ctx.causal, ctx.backend = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(w, value, lengths, o, lse)


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 6
    w, value, lengths, o, lse = ctx.saved_tensors
    dw, dvalue = subspace_attention_backward(grad, w, value, lengths, o, lse, ctx.scale, ctx.causal, ctx.backend)
    return dw, None if value is None else dvalue, None, None, None, None


subspace_attention.register_autograd(_backward, setup_context=_setup_context)
