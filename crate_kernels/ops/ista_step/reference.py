"""One ISTA step against a complete dictionary: the specification and the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not(x: Tensor, *_) -> None:
    return None


def ista_step(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``relu(x + step_size·(x W − x Wᵀ W) − step_size·lambd)``; ``x (n, d)``, ``weight (d, d)`` -> ``(n, d)``.

    ``folded`` is a cache that the equations do not need.
    """
    reconstruction = x @ weight.T @ weight
    return torch.relu(x + step_size * (x @ weight - reconstruction) - step_size * lambd)
