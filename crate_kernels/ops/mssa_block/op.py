"""``crate::mssa_block``: schema, fake, gradient. The backends stand beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

IMPLEMENTATIONS = backends.implementations(__package__)

_PARAMETERS = "Tensor norm_weight, Tensor norm_bias, Tensor u_weight, Tensor? out_weight, Tensor? out_bias"


@torch.library.custom_op(
    "crate::mssa_block",
    mutates_args=(),
    schema=f"(Tensor z, {_PARAMETERS}, Tensor? lengths, int heads, float scale, bool causal, float step_size,"
    " float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def mssa_block(
    z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, heads, scale, causal, step_size, eps, backend
):
    return backends.run(
        IMPLEMENTATIONS[backend].forward,
        z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, heads, scale, causal, step_size, eps,
    )  # fmt: skip


@mssa_block.register_fake
def _(
    z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, heads, scale, causal, step_size, eps, backend
):
    batch, tokens, _ = z.shape
    statistics = backends.accumulation_dtype(z.dtype)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    w = z.new_empty((batch, tokens, heads, u_weight.shape[0] // heads))
    lse = z.new_empty((batch, heads, tokens), dtype=statistics)
    mean = z.new_empty((batch, tokens), dtype=statistics)
    return out, w, torch.empty_like(w), lse, mean, torch.empty_like(mean)


@torch.library.custom_op(
    "crate::mssa_block_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor z, {_PARAMETERS}, Tensor? lengths, Tensor w, Tensor o, Tensor lse, Tensor mean,"
    " Tensor rstd, float scale, bool causal, float step_size, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def mssa_block_backward(
    grad, z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, w, o, lse, mean, rstd,
    scale, causal, step_size, eps, backend,
):  # fmt: skip
    gradients = backends.run(
        IMPLEMENTATIONS[backend].backward,
        grad, z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, w, o, lse, mean, rstd,
        scale, causal, step_size, eps,
    )  # fmt: skip
    # A schema cannot return an absent tensor; an empty one stands for it.
    return tuple(z.new_empty(0) if g is None else g for g in gradients)


@mssa_block_backward.register_fake
def _(
    grad, z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, w, o, lse, mean, rstd,
    scale, causal, step_size, eps, backend,
):  # fmt: skip
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    parameters = (norm_weight, norm_bias, u_weight, out_weight, out_bias)
    return dz, *(z.new_empty(0) if t is None else t.new_empty(t.shape) for t in parameters)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.scale, ctx.causal, ctx.step_size, ctx.eps, ctx.backend = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _backward(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 13
    saved = ctx.saved_tensors  # read once: under activation checkpointing each read would run the layer again
    _, _, _, _, out_weight, out_bias, *_ = saved
    *gradients, dout_weight, dout_bias = mssa_block_backward(
        grad, *saved, ctx.scale, ctx.causal, ctx.step_size, ctx.eps, ctx.backend
    )
    dout_weight = None if out_weight is None else dout_weight
    dout_bias = None if out_bias is None else dout_bias
    return *gradients, dout_weight, dout_bias, *(None,) * 7


mssa_block.register_autograd(_backward, setup_context=_setup_context)
