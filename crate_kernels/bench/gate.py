"""The correctness gate: nothing is timed before its outputs and gradients have been held against float64.

Budget of the project for a result in low precision: twice the error of the literal equations run in that dtype, plus
one rounding. Where a function is smooth, the largest error of every tensor is judged. The gradient of a ReLU is not:
a unit within rounding of its threshold may fall on either side and changes the gradient by its whole share. Among
units whose relative error is delta about a fraction delta changes sides, and the gradient by sqrt(delta) in norm; so
behind a ReLU gradients are judged in relative norm with that allowance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """The worst error of a contender as a multiple of what it may be; ``passed`` up to 1 (never for NaN)."""

    share: float
    detail: str

    @property
    def passed(self) -> bool:
        return self.share <= 1.0


def largest(got: Tensor, exact: Tensor) -> float:
    return (got.to(torch.float64) - exact).abs().max().item() if exact.numel() else 0.0


def relative(got: Tensor, exact: Tensor) -> float:
    """``‖got − exact‖ / ‖exact‖``; over zero it is the norm of what should be zero."""
    norm = exact.norm().item()
    return (got.to(torch.float64) - exact).norm().item() / (norm or 1.0)


def judge(
    got: Sequence[Tensor],
    exact: Sequence[Tensor],
    literal: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    kinks: bool,
    score: float = 0.0,
) -> Verdict:
    """Hold ``got`` (the output, then gradients) against ``exact`` in float64.

    Args:
        literal: the same from the literal equations in the dtype that is timed: their error sets the budget.
        kinks: a ReLU lies before the gradients.
        score: the largest attention score; a backward that recomputes the softmax from its float32 log-normaliser
            moves the probabilities by a few eps·score where the literal one keeps them.
    """
    if len(got) != len(exact):
        return Verdict(float("inf"), f"{len(got)} tensors instead of {len(exact)}")
    rounding = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * score
    worst = Verdict(0.0, "exact")
    allowance = 0.0
    for index, (tensor, truth, reference) in enumerate(zip(got, exact, literal, strict=True)):
        name = f"gradient {index}" if index else "output"
        if tensor.shape != truth.shape:
            return Verdict(float("inf"), f"{name} has shape {tuple(tensor.shape)} instead of {tuple(truth.shape)}")
        if index and kinks:
            error, budget = relative(tensor, truth), 2 * relative(reference, truth) + rounding + allowance
        else:
            scale = truth.abs().max().item() if truth.numel() else 0.0
            error, budget = largest(tensor, truth), 2 * largest(reference, truth) + rounding * scale
        if index == 0:
            allowance = (2 * relative(reference, truth) + rounding) ** 0.5
        share = error / budget if budget else (0.0 if error == 0 else float("inf"))
        if not share <= worst.share:  # NaN counts as worse
            worst = Verdict(share, f"{name}: error {error:.3g}, budget {budget:.3g}")
            if share != share:
                return Verdict(float("inf"), f"{name}: not a number")
    return worst
