"""The public function: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..ista_step.api import check_step
from .op import operator


def overcomplete_ista(
    x: Tensor,
    D: Tensor,
    D1: Tensor | None = None,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """Two ISTA steps of non-negative sparse coding with an overcomplete dictionary, then decoding.

    The sparse-coding block of CRATE-alpha (arXiv 2405.20299) and of the overcomplete CRATE language model, tied where
    ``D1`` is None. Equivalent to::

        a = x @ D
        z1 = torch.relu(step_size * a - step_size * lambd)
        z2 = torch.relu(z1 - step_size * (z1 @ D.T @ D - a) - step_size * lambd)
        out = z2 @ (D if D1 is None else D1).T

    Args:
        x: ``(..., d)``; float16, bfloat16, float32 or float64.
        D: ``(d, m)``, the dictionary, usually m = 4d.
        D1: ``(d, m)``, the dictionary that decodes; ``D`` if None.
        step_size: 0 or more; upstream's ``eta``.
        lambd: weight of the l1 penalty, 0 or more; upstream's ``lmbda``.
        backend: ``"reference"``, ``"eager"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for the automatic choice.

    Returns:
        ``(..., d)`` in the dtype of ``x`` (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`crate_kernels.ops.subspace_attention`.
    """
    rows = checks.rows("x", x)
    out = operator(_check, backend, (rows, D, D1), (step_size, lambd))
    return out if rows is x else out.view(x.shape)


def _check(x, D, D1, step_size, lambd) -> tuple[float, float]:
    checks.tensor("D", D, (x.shape[-1], "m"), like=x)
    if D.shape[1] < 1:
        raise ValueError(f"D: expected shape (d, m) with m at least 1, got {tuple(D.shape)}")
    if D1 is not None:
        checks.tensor("D1", D1, tuple(D.shape), like=x)
    checks.same_dtype(x.dtype, D=D, D1=D1)
    return check_step(step_size, lambd)
