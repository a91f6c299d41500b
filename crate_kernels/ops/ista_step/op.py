"""``crate::ista_step``: schema, fake, gradient. The backends stand beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

IMPLEMENTATIONS = backends.implementations(__package__)


@torch.library.custom_op(
    "crate::ista_step",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? folded, float step_size, float lambd, str backend) -> Tensor",
)
def ista_step(x, weight, folded, step_size, lambd, backend):
    return backends.run(IMPLEMENTATIONS[backend].forward, x, weight, folded, step_size, lambd)


@ista_step.register_fake
def _(x, weight, folded, step_size, lambd, backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op(
    "crate::ista_step_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor? folded, Tensor out, float step_size, str backend)"
    " -> (Tensor, Tensor)",
)
def ista_step_backward(grad, x, weight, folded, out, step_size, backend):
    return backends.run(IMPLEMENTATIONS[backend].backward, grad, x, weight, folded, out, step_size)


@ista_step_backward.register_fake
def _(grad, x, weight, folded, out, step_size, backend):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, weight, folded, ctx.step_size, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, folded, output)


def _backward(ctx, grad: Tensor):
    x, weight, folded, out = ctx.saved_tensors
    dx, dweight = ista_step_backward(grad, x, weight, folded, out, ctx.step_size, ctx.backend)
    return dx, dweight, None, None, None, None


ista_step.register_autograd(_backward, setup_context=_setup_context)
