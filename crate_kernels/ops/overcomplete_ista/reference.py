"""Two ISTA steps against an overcomplete dictionary: the specification and the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(x: Tensor, *_) -> None:
    return None


def overcomplete_ista(x: Tensor, D: Tensor, D1: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``x (n, d)``, ``D, D1 (d, m)`` -> ``(n, d)``; the codes start at zero and take two steps."""
    a = x @ D
    z1 = torch.relu(step_size * a - step_size * lambd)
    z2 = torch.relu(z1 - step_size * (z1 @ D.T @ D - a) - step_size * lambd)
    return z2 @ (D if D1 is None else D1).T
