"""The public function: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..ista_step.api import check_dictionary, check_step
from ..mssa_block.api import check_attention
from .op import operator


def crate_layer(
    z: Tensor,
    mssa_norm_weight: Tensor,
    mssa_norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    ista_norm_weight: Tensor,
    ista_norm_bias: Tensor,
    weight: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    mssa_step_size: float = 1.0,
    step_size: float = 0.1,
    lambd: float = 0.1,
    mssa_eps: float = 1e-5,
    ista_eps: float = 1e-5,
    folded: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A whole CRATE layer: :func:`crate_kernels.ops.mssa_block`, then :func:`crate_kernels.ops.ista_block`.

    ``z' = z + mssa_step_size·MSSA(LN(z))`` and ``z" = ISTA(LN(z'))`` (arXiv 2306.01129, equations 11, 16 and 17) in one
    operator: one call, one entry in the autograd graph. Equivalent to::

        between = mssa_block(
            z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias,
            heads=heads, scale=scale, causal=causal, lengths=lengths, step_size=mssa_step_size, eps=mssa_eps,
        )
        out = ista_block(
            between, ista_norm_weight, ista_norm_bias, weight, step_size=step_size, lambd=lambd, eps=ista_eps
        )

    Args:
        z: ``(B, N, d)``; float16, bfloat16, float32 or float64. B may be 0.
        mssa_norm_weight, mssa_norm_bias, ista_norm_weight, ista_norm_bias: ``(d,)``, in the dtype of ``z`` or float32.
        u_weight, out_weight, out_bias, heads, scale, causal, lengths: as for :func:`crate_kernels.ops.mssa_block`.
        weight, step_size, lambd, folded: as for :func:`crate_kernels.ops.ista_block`.
        mssa_step_size: factor of the attention's output.
        mssa_eps, ista_eps: added to the variances.
        backend: ``"reference"``, ``"eager"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for the automatic choice.

    Returns:
        ``(B, N, d)``, non-negative, in the dtype of ``z``, under autocast too.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`crate_kernels.ops.subspace_attention`.
    """
    tensors = (
        z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, ista_norm_weight, ista_norm_bias, weight,
        folded, lengths,
    )  # fmt: skip
    options = (heads, scale, causal, mssa_step_size, step_size, lambd, mssa_eps, ista_eps)
    return operator(_check, backend, tensors, options)


def _check(
    z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, ista_norm_weight, ista_norm_bias, weight,
    folded, lengths, heads, scale, causal, mssa_step_size, step_size, lambd, mssa_eps, ista_eps,
) -> tuple:  # fmt: skip
    checks.norm(z, mssa_norm_weight, mssa_norm_bias, mssa_eps, prefix="mssa_")
    checks.norm(z, ista_norm_weight, ista_norm_bias, ista_eps, prefix="ista_")
    check_attention(z, u_weight, out_weight, out_bias, lengths, heads)
    check_dictionary(weight, folded, z)
    scale = (u_weight.shape[0] // heads) ** -0.5 if scale is None else checks.number("scale", scale)
    mssa_step_size = checks.number("mssa_step_size", mssa_step_size)
    steps = check_step(step_size, lambd)
    return heads, scale, checks.flag("causal", causal), mssa_step_size, *steps, float(mssa_eps), float(ista_eps)
