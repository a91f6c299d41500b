"""``crate::overcomplete_ista``: schema, fake, gradient. The backends stand beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

IMPLEMENTATIONS = backends.implementations(__package__)


@torch.library.custom_op(
    "crate::overcomplete_ista",
    mutates_args=(),
    schema="(Tensor x, Tensor D, Tensor? D1, float step_size, float lambd, str backend) -> (Tensor, Tensor, Tensor)",
)
def overcomplete_ista(x, D, D1, step_size, lambd, backend):
    return backends.run(IMPLEMENTATIONS[backend].forward, x, D, D1, step_size, lambd)


@overcomplete_ista.register_fake
def _(x, D, D1, step_size, lambd, backend):
    codes = x.new_empty((x.shape[0], D.shape[1]))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), codes, torch.empty_like(codes)


@torch.library.custom_op(
    "crate::overcomplete_ista_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor D, Tensor? D1, Tensor z1, Tensor z2, float step_size, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def overcomplete_ista_backward(grad, x, D, D1, z1, z2, step_size, backend):
    dx, dD, dD1 = backends.run(IMPLEMENTATIONS[backend].backward, grad, x, D, D1, z1, z2, step_size)
    # A schema cannot return an absent tensor; an empty one stands for it.
    return dx, dD, x.new_empty(0) if dD1 is None else dD1


@overcomplete_ista_backward.register_fake
def _(grad, x, D, D1, z1, z2, step_size, backend):
    dx, dD = torch.empty(x.shape, dtype=x.dtype, device=x.device), D.new_empty(D.shape)
    return dx, dD, x.new_empty(0) if D1 is None else torch.empty_like(dD)


def _setup_context(ctx, inputs, output):
    x, D, D1, ctx.step_size, _, ctx.backend = inputs
    _, z1, z2 = output
    ctx.mark_non_differentiable(z1, z2)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, D, D1, z1, z2)


def _backward(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 6
    x, D, D1, z1, z2 = ctx.saved_tensors
    dx, dD, dD1 = overcomplete_ista_backward(grad, x, D, D1, z1, z2, ctx.step_size, ctx.backend)
    return dx, dD, None if D1 is None else dD1, None, None, None


overcomplete_ista.register_autograd(_backward, setup_context=_setup_context)
