"""The public function: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

from torch import Tensor

from .. import backends, checks
from ..ista_step.api import check_step
from . import reference
from .op import IMPLEMENTATIONS
from .op import overcomplete_ista as operator


def overcomplete_ista(
    x: Tensor,
    D: Tensor,
    D1: Tensor | None = None,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """Two ISTA steps of non-negative sparse coding against an overcomplete dictionary, decoded again.

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
        step_size: positive; upstream's ``eta``.
        lambd: non-negative weight of the l1 penalty; upstream's ``lmbda``.
        backend: ``"reference"``, ``"eager"``, ``"triton"``, ``"cuda"``, or None for the automatic choice.

    Returns:
        ``(..., d)`` in the dtype of ``x`` (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`crate_kernels.ops.subspace_attention`.
    """
    checks.tensor("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: expected shape (..., d) with d at least 1, got {tuple(x.shape)}")
    checks.tensor("D", D, (x.shape[-1], "m"), like=x)
    if D1 is not None:
        checks.tensor("D1", D1, tuple(D.shape), like=x)
    checks.same_dtype(x.dtype, D=D, D1=D1)
    step_size, lambd = check_step(step_size, lambd)
    rows, D, D1 = backends.cast(backends.autocast_dtype(x), x.reshape(-1, x.shape[-1]), D, D1)
    arguments = (rows, D, D1, step_size, lambd)
    name = backends.resolve(IMPLEMENTATIONS, backend, rows, D, D1, size=x.shape[-1])
    if name == "reference":
        out = backends.run(reference.overcomplete_ista, *arguments)
    else:
        out = operator(*arguments, name)[0]
    return out.reshape(x.shape)
