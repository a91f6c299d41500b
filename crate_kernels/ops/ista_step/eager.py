"""One ISTA step in stock PyTorch, with W − WᵀW folded into one matrix where there are more rows than channels.

Folded, the step is one n·d² product instead of three, plus one d³; for few rows the residual ``r = x − x Wᵀ`` makes it
two. The gradients follow the same choice.
"""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(x: Tensor, *_) -> None:
    return None


FOLD_STRIPS = 4
"""On the CPU ``WᵀW`` is made in so many strips of rows up to the diagonal and then mirrored: 5/8 of the product, and
strips still wide enough for the vendor's GEMM."""


def fold(weight: Tensor) -> Tensor:
    """``M = W − Wᵀ W``, so that ``x W − x Wᵀ W = x M``."""
    width = weight.shape[0]
    half = weight.dtype in (torch.float16, torch.bfloat16)  # mirroring would round once more
    if weight.device.type != "cpu" or half or width % FOLD_STRIPS or width < 64 * FOLD_STRIPS:
        return torch.addmm(weight, weight.T, weight, alpha=-1)
    m = torch.empty_like(weight)
    ends = range(width // FOLD_STRIPS, width + 1, width // FOLD_STRIPS)
    for end in ends:
        strip = slice(end - ends.step, end)
        torch.mm(weight[:, strip].T, weight[:, :end], out=m[strip, :end])
    for end in ends[:-1]:
        m[:end, end : end + ends.step] = m[end : end + ends.step, :end].T
    return torch.sub(weight, m, out=m)


def forward(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``weight (d, d)``, ``folded`` = ``fold(weight)`` if known -> ``(n, d)``."""
    # x stays outside the matrix, in the product's accumulator: I + step·M would round it away in low precision.
    shifted = x - step_size * lambd
    if folds(x, folded):
        shifted.addmm_(x, fold(weight) if folded is None else folded, alpha=step_size)
    else:
        shifted.addmm_(residual(x, weight), weight, alpha=step_size)
    return shifted.relu_()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``(dx, dweight)``. The ReLU's mask is the sign of ``out``."""
    g = torch.ops.aten.threshold_backward(grad, out, 0)
    if folds(x, folded):
        m = fold(weight) if folded is None else folded
        dx = torch.addmm(g, g, m.T, alpha=step_size)
        dm = (x.T @ g).mul_(step_size)
        return dx, torch.addmm(dm, weight, dm + dm.T, alpha=-1)
    r = residual(x, weight)
    dr = (g @ weight.T).mul_(step_size)
    dweight = (r.T @ g).mul_(step_size).addmm_(dr.T, x, alpha=-1)
    return g.add_(dr).addmm_(dr, weight, alpha=-1), dweight


def folds(x: Tensor, folded: Tensor | None) -> bool:
    """Whether the folded route is the shorter one: M is known, or its d³ product is paid by the rows."""
    return folded is not None or x.shape[0] >= x.shape[1]


def residual(x: Tensor, weight: Tensor) -> Tensor:
    """``r = x − x Wᵀ``, so that ``x W − x Wᵀ W = r W``."""
    return torch.addmm(x, x, weight.T, alpha=-1)
