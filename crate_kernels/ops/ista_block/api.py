"""The public function: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..ista_step.api import check_dictionary, check_step
from .op import operator


def ista_block(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    *,
    step_size: float = 0.1,
    lambd: float = 0.1,
    eps: float = 1e-5,
    folded: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The sparsifying half of a CRATE layer: LayerNorm, then one ISTA step, with no residual around them.

    ``x = LN(z)``, ``z' = relu(x + step_size·(x W − x Wᵀ W) − step_size·lambd)`` (arXiv 2306.01129, equation 17).
    Equivalent to::

        x = torch.nn.functional.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, eps)
        out = torch.relu(x + step_size * (x @ weight - x @ weight.T @ weight) - step_size * lambd)

    Args:
        z: ``(..., d)``; float16, bfloat16, float32 or float64.
        norm_weight, norm_bias: ``(d,)``, in the dtype of ``z`` or float32.
        weight: ``(d, d)``, the dictionary W, in the dtype of ``z``.
        step_size, lambd, folded, backend: as for :func:`crate_kernels.ops.ista_step`.
        eps: added to the variance.

    Returns:
        ``(..., d)``, non-negative, in the dtype of ``z``, under autocast too.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`crate_kernels.ops.subspace_attention`.
    """
    rows = checks.rows("z", z)
    out = operator(_check, backend, (rows, norm_weight, norm_bias, weight, folded), (step_size, lambd, eps))
    return out if rows is z else out.view(z.shape)


def _check(z, norm_weight, norm_bias, weight, folded, step_size, lambd, eps) -> tuple[float, float, float]:
    checks.norm(z, norm_weight, norm_bias, eps)
    check_dictionary(weight, folded, z)
    return *check_step(step_size, lambd), float(eps)
