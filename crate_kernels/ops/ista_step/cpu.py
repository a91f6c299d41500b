"""One ISTA step in C++ on the CPU: the second half of a layer without its norm (``csrc/cpu/layer.h``)."""

from __future__ import annotations

from torch import Tensor

from .. import cpu_kernels


def why_not(x: Tensor, weight: Tensor, *_) -> str | None:
    return cpu_kernels.why_not(x, weight)


def forward(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``weight (d, d)``, ``folded`` = ``fold(weight)`` if known -> ``(n, d)``."""
    weights = (*cpu_kernels.NO_ATTENTION, None, None, weight, folded)
    steps = (1.0, step_size, lambd)
    return cpu_kernels.layer_forward(x[None], weights, None, 1, 1.0, False, steps, (0.0, 0.0))[0][0]


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, folded: Tensor | None, out: Tensor, step_size: float
) -> tuple[Tensor, Tensor]:
    """-> ``(dx, dweight)``. The ReLU's mask is the sign of ``out``."""
    weights = (*cpu_kernels.NO_ATTENTION, None, None, weight, folded)
    dx, *_, dweight = cpu_kernels.layer_backward(
        grad[None], x[None], weights, None, out[None], *(None,) * 8, 1.0, False, (1.0, step_size, 0.0), (0.0, 0.0)
    )
    return dx[0], dweight
