"""How wrong a kernel may be: twice the error of the literal reference in the same dtype, plus one rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from crate_kernels import ops


def attention(w: Tensor, grad: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The literal reference in the dtype of ``w``: output and gradient."""
    leaf = w.clone().requires_grad_()
    o = ops.subspace_attention(leaf, **options, backend="reference")
    return o.detach(), torch.autograd.grad(o, leaf, grad)[0]


def error(got: Tensor, exact: Tensor) -> float:
    return (got.double() - exact).abs().max().item()


def check(got: Tensor, exact: Tensor, reference: Tensor):
    """``got`` within budget of the float64 ``exact``, given the ``reference`` computed in the dtype of ``got``."""
    assert got.isfinite().all()
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    allowed = 2 * error(reference, exact) + rounding
    assert error(got, exact) <= allowed, f"error {error(got, exact):.3g}, allowed {allowed:.3g}"
