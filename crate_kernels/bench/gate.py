"""The correctness gate: nothing is timed before its outputs and gradients have been held against float64.

Budget of the project for a result in low precision: twice the error of the literal equations run in that dtype, plus
one rounding. Where a function is smooth, the largest error of every tensor is judged. The gradient of a ReLU is not:
a unit within rounding of its threshold may fall on either side and changes the gradient by its whole share. Among
units whose relative error is delta about a fraction delta changes sides, and the gradient by sqrt(delta) in norm; so
behind a ReLU gradients are judged in relative norm with that allowance.

A whole model has a hundred gradients, and its literal errors, which set the budgets, are a few roundings of luck: of
so many some are tiny. So a model's gradients are judged together, errors and budgets each relative to the gradient's
own norm and summed in squares. A gradient that is wrong, however small, is wrong by about its norm and breaks the sum.
"""

from __future__ import annotations

import math
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
    together: bool = False,
) -> Verdict:
    """Hold ``got`` (the output, then gradients) against ``exact`` in float64.

    Args:
        literal: the same from the literal equations in the dtype that is timed: their error sets the budget.
        kinks: a ReLU lies before the gradients.
        score: the largest attention score; a backward that recomputes the softmax from its float32 log-normaliser
            moves the probabilities by a few eps·score where the literal one keeps them.
        together: the gradients are those of a whole model, in relative norm and against the sum of their budgets.
    """
    if len(got) != len(exact):
        return Verdict(float("inf"), f"{len(got)} tensors instead of {len(exact)}")
    rounding = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * score
    worst = Verdict(0.0, "exact")
    allowance = 0.0
    errors, budgets = [], []
    for index, (tensor, truth, reference) in enumerate(zip(got, exact, literal, strict=True)):
        name = f"gradient {index}" if index else "output"
        if tensor.shape != truth.shape:
            return Verdict(float("inf"), f"{name} has shape {tuple(tensor.shape)} instead of {tuple(truth.shape)}")
        if index and (kinks or together):
            error, budget = relative(tensor, truth), 2 * relative(reference, truth) + rounding + allowance
        else:
            scale = truth.abs().max().item() if truth.numel() else 0.0
            error, budget = largest(tensor, truth), 2 * largest(reference, truth) + rounding * scale
        if index == 0:
            allowance = (2 * relative(reference, truth) + rounding) ** 0.5 if kinks else 0.0
        elif together:
            errors.append(error)
            budgets.append(budget)
            continue
        worst = _worse(worst, name, error, budget)
    return _worse(worst, "all gradients", math.hypot(*errors), math.hypot(*budgets)) if errors else worst


def _worse(worst: Verdict, name: str, error: float, budget: float) -> Verdict:
    if math.isnan(error):
        return Verdict(math.inf, f"{name}: not a number")
    share = error / budget if budget else (0.0 if error == 0 else math.inf)
    return worst if share <= worst.share else Verdict(share, f"{name}: error {error:.3g}, budget {budget:.3g}")
