"""The algebra of the folded ISTA step, shared by the implementations of ``ista_step`` and ``ista_block``.

With ``M = W − WᵀW`` the step is ``relu(x + step·x M − step·lambd)``: one n·d² product instead of three, plus one d³.
With fewer rows than channels, d³ costs more than it saves. The residual ``r = x − x Wᵀ`` then makes the step two
products: ``x W − x Wᵀ W = r W``.
"""

from __future__ import annotations

from torch import Tensor

from ..products import multiply


def fold(weight: Tensor) -> Tensor:
    """``M = W − Wᵀ W``, so that ``x W − x Wᵀ W = x M``."""
    return multiply(weight.T, weight, weight, alpha=-1)


def folds(x: Tensor, folded: Tensor | None) -> bool:
    """Whether the folded route is the shorter one: M is known, or there are at least as many rows as channels."""
    return folded is not None or x.shape[0] >= x.shape[1]


def residual(x: Tensor, weight: Tensor) -> Tensor:
    """``r = x − x Wᵀ``, so that ``x W − x Wᵀ W = r W``."""
    return multiply(x, weight.T, x, alpha=-1)


def weight_backward(x: Tensor, g: Tensor, weight: Tensor, step_size: float) -> Tensor:
    """``dM − W(dM + dMᵀ)`` with ``dM = step_size·xᵀg``: the gradient of ``W`` through :func:`fold`."""
    dm = multiply(x.T, g, alpha=step_size)
    return multiply(weight, dm + dm.T, dm, alpha=-1)


def residual_backward(g: Tensor, x: Tensor, weight: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
    """``(dx, dweight)`` of the residual route, given the gradient ``g`` before the ReLU; overwrites ``g``."""
    x, narrow = x.to(weight.dtype), g.to(weight.dtype)
    r = residual(x, weight)
    dr = multiply(narrow, weight.T, alpha=step_size)
    dweight = multiply(dr.T, x, multiply(r.T, narrow, alpha=step_size), alpha=-1)
    return multiply(dr, weight, g.add_(dr), alpha=-1), dweight
