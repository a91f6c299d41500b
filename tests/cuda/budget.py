"""The reference backend's attention, and the error budget of single tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_kernels import ops
from crate_kernels.agreement import judge


def attention(w: Tensor, grad: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The reference in the dtype of ``w``: output and gradient."""
    leaf = w.clone().requires_grad_()
    o = ops.subspace_attention(leaf, **options, backend="reference")
    return o.detach(), torch.autograd.grad(o, leaf, grad)[0]


def check(got: Tensor, exact: Tensor, reference: Tensor):
    """``got`` within the error budget of the float64 ``exact``; ``reference`` was computed in the dtype of ``got``."""
    assert got.isfinite().all()
    verdict = judge([got], [exact], [reference], got.dtype, kinks=False)
    assert verdict.passed, verdict.detail
