"""``crate::ista_block``: schema, fake, gradient. The backends stand beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

IMPLEMENTATIONS = backends.implementations(__package__)


@torch.library.custom_op(
    "crate::ista_block",
    mutates_args=(),
    schema="(Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? folded, float step_size,"
    " float lambd, float eps, str backend) -> (Tensor, Tensor, Tensor)",
)
def ista_block(z, norm_weight, norm_bias, weight, folded, step_size, lambd, eps, backend):
    return backends.run(
        IMPLEMENTATIONS[backend].forward, z, norm_weight, norm_bias, weight, folded, step_size, lambd, eps
    )


@ista_block.register_fake
def _(z, norm_weight, norm_bias, weight, folded, step_size, lambd, eps, backend):
    mean = z.new_empty(z.shape[:-1], dtype=backends.accumulation_dtype(z.dtype))
    return torch.empty(z.shape, dtype=z.dtype, device=z.device), mean, torch.empty_like(mean)


@torch.library.custom_op(
    "crate::ista_block_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? folded, Tensor out,"
    " Tensor mean, Tensor rstd, float step_size, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def ista_block_backward(grad, z, norm_weight, norm_bias, weight, folded, out, mean, rstd, step_size, eps, backend):
    return backends.run(
        IMPLEMENTATIONS[backend].backward,
        grad, z, norm_weight, norm_bias, weight, folded, out, mean, rstd, step_size, eps,
    )  # fmt: skip


@ista_block_backward.register_fake
def _(grad, z, norm_weight, norm_bias, weight, folded, out, mean, rstd, step_size, eps, backend):
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    return dz, *(t.new_empty(t.shape) for t in (norm_weight, norm_bias, weight))


def _setup_context(ctx, inputs, output):
    z, norm_weight, norm_bias, weight, folded, ctx.step_size, _, ctx.eps, ctx.backend = inputs
    out, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, norm_weight, norm_bias, weight, folded, out, mean, rstd)


def _backward(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 9
    gradients = ista_block_backward(grad, *ctx.saved_tensors, ctx.step_size, ctx.eps, ctx.backend)
    return *gradients, None, None, None, None, None


ista_block.register_autograd(_backward, setup_context=_setup_context)
