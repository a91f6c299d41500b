"""The error budget: how far a result in low precision may be from the exact one.

Training, the benchmark and the tests apply this one rule. The exact result is the reference backend in float64. A
result may be wrong by twice the error of the reference backend in the same dtype, plus one rounding.

If a function is smooth, the rule judges the largest error of each tensor. The gradient of a ReLU is not smooth.
Rounding can move a unit across its threshold, and the unit then changes the gradient by its whole share. If the units
have a relative error of delta, about a fraction delta of them changes sides, which changes the gradient by sqrt(delta)
in norm. Gradients behind a ReLU are therefore judged in relative norm, with that allowance.

A whole model has a hundred gradients. The errors of the reference set the budgets, and some of a hundred errors are
tiny by chance. The gradients of a model are therefore judged together: errors and budgets are relative to the norm of
each gradient, and their squares are summed. The error of a wrong gradient is about as large as its norm, so the sum
exceeds the budget even if the gradient is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """The worst error as a multiple of its budget, and the tensor that has it."""

    share: float
    detail: str

    @property
    def passed(self) -> bool:
        """Whether no error exceeds its budget. NaN never passes."""
        return self.share <= 1.0


def largest(got: Tensor, exact: Tensor) -> float:
    """The largest absolute difference between two entries."""
    return (got.to(torch.float64) - exact.to(torch.float64)).abs().max().item() if exact.numel() else 0.0


def relative(got: Tensor, exact: Tensor) -> float:
    """``‖got − exact‖ / ‖exact‖``; if ``exact`` is zero, the norm of ``got``."""
    exact = exact.to(torch.float64)
    return (got.to(torch.float64) - exact).norm().item() / (exact.norm().item() or 1.0)


def judge(
    got: Sequence[Tensor],
    exact: Sequence[Tensor],
    reference: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    kinks: bool,
    score: float = 0.0,
    together: bool = False,
) -> Verdict:
    """Compare a result with the exact one. Each of the two is a sequence: the output, then all gradients.

    Args:
        got: the result to judge.
        exact: the result of the reference backend in float64.
        reference: the result of the reference backend in ``dtype``. Its error sets the budget. A tensor in which it
            overflows is not judged.
        dtype: the precision of the computation.
        kinks: whether the gradients pass a ReLU.
        score: the largest attention score. A backward that recomputes the softmax from its float32 log-normalizer moves
            the probabilities by a few eps·score; the reference saves the probabilities instead.
        together: whether the gradients are those of a whole model.
    """
    if len(got) != len(exact):
        return Verdict(math.inf, f"{len(got)} tensors instead of {len(exact)}")
    rounding = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * score
    worst = Verdict(0.0, "exact")
    allowance = 0.0
    errors, budgets = [], []
    for index, (tensor, truth, own) in enumerate(zip(got, exact, reference, strict=True)):
        name = f"gradient {index}" if index else "output"
        if tensor.shape != truth.shape:
            return Verdict(math.inf, f"{name} has shape {tuple(tensor.shape)} instead of {tuple(truth.shape)}")
        if not own.isfinite().all():
            continue
        if index and (kinks or together):
            error, budget = relative(tensor, truth), 2 * relative(own, truth) + rounding + allowance
        else:
            scale = truth.abs().max().item() if truth.numel() else 0.0
            error, budget = largest(tensor, truth), 2 * largest(own, truth) + rounding * scale
        if index == 0:
            allowance = (2 * relative(own, truth) + rounding) ** 0.5 if kinks else 0.0
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
