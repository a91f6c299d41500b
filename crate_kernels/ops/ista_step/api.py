"""The public functions: check their arguments, choose a backend, run it."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from . import folding
from .op import operator


def ista_step(
    x: Tensor,
    weight: Tensor,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
    folded: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One proximal (ISTA) step of non-negative sparse coding against a complete dictionary.

    ``relu(x + step_size·(x W − x Wᵀ W) − step_size·lambd)`` (arXiv 2306.01129, equation 17; the rows of ``x`` are
    tokens). Equivalent to::

        torch.relu(x + step_size * (x @ weight - x @ weight.T @ weight) - step_size * lambd)

    Args:
        x: ``(..., d)``; float16, bfloat16, float32 or float64.
        weight: ``(d, d)``, the dictionary W, in the dtype of ``x``.
        step_size: 0 or more; upstream's ``step_size`` or ``eta``.
        lambd: weight of the l1 penalty, 0 or more; upstream's ``lambd``.
        folded: ``fold(weight)`` if the caller has it already. It is a cache, not a second parameter: the result and
            the gradient of ``weight`` are those without it, and it must be of the present ``weight``.
        backend: ``"reference"``, ``"eager"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for the automatic choice.

    Returns:
        ``(..., d)``, non-negative, in the dtype of ``x``, under autocast too.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`crate_kernels.ops.subspace_attention`.
    """
    rows = checks.rows("x", x)
    out = operator(_check, backend, (rows, weight, folded), (step_size, lambd))
    return out if rows is x else out.view(x.shape)


def _check(x, weight, folded, step_size, lambd) -> tuple[float, float]:
    check_dictionary(weight, folded, x)
    return check_step(step_size, lambd)


def fold(weight: Tensor) -> Tensor:
    """``M = W − Wᵀ W`` of a dictionary ``weight (d, d)``: what every ISTA step with it multiplies by.

    Computed once it saves d³ multiplications in each later call (``ista_step(..., folded=M)``). Not differentiable.
    """
    checks.tensor("weight", weight, ("d", "d"))
    if weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight: expected a square matrix (d, d), got {tuple(weight.shape)}")
    return folding.fold(weight.detach())


def check_dictionary(weight: Tensor, folded: Tensor | None, x: Tensor):
    """``weight`` and ``folded`` are ``(d, d)`` beside ``x (..., d)``, on one device, in one dtype."""
    width = x.shape[-1]
    checks.tensor("weight", weight, (width, width), like=x)
    if folded is not None:
        checks.tensor("folded", folded, (width, width), like=x)
    checks.same_dtype(x.dtype, weight=weight, folded=folded)


def check_step(step_size: float, lambd: float) -> tuple[float, float]:
    """The two scalars of an ISTA step as floats, or an error that names the wrong one."""
    return checks.number("step_size", step_size, minimum=0.0), checks.number("lambd", lambd, minimum=0.0)
