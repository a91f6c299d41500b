"""The public function: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .op import operator


def mssa_block(
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    u_weight: Tensor,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    *,
    heads: int,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    step_size: float = 1.0,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The compressing half of a CRATE layer: LayerNorm, multi-head subspace self-attention, and the residual.

    ``z' = z + step_size·MSSA(LN(z))`` (arXiv 2306.01129, equations 11 and 16). Equivalent to::

        x = torch.nn.functional.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, eps)
        w = (x @ u_weight.T).unflatten(-1, (heads, -1))
        o = subspace_attention(w, scale=scale, causal=causal, lengths=lengths).flatten(2)
        out = z + step_size * (o if out_weight is None else torch.nn.functional.linear(o, out_weight, out_bias))

    Args:
        z: ``(B, N, d)``; float16, bfloat16, float32 or float64. B may be 0.
        norm_weight, norm_bias: ``(d,)``, in the dtype of ``z`` or float32.
        u_weight: ``(H·p, d)``, the subspace bases Uᵀ of all heads, in the dtype of ``z``; upstream's ``qkv.weight``.
        out_weight: ``(d, H·p)``, or None for the identity (then H·p = d).
        out_bias: ``(d,)`` or None; needs ``out_weight``.
        heads: H; divides the rows of ``u_weight``.
        scale: factor of the scores; ``p ** -0.5`` if None.
        causal, lengths, backend: as for :func:`crate_kernels.ops.subspace_attention`.
        step_size: factor of the attention's output; 1 in CRATE's encoders, -1 in CRATE-MAE's decoder blocks.
        eps: added to the variance.

    Returns:
        ``(B, N, d)`` in the dtype of ``z``, under autocast too.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`crate_kernels.ops.subspace_attention`.
    """
    tensors = (z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths)
    return operator(_check, backend, tensors, (heads, scale, causal, step_size, eps))


def _check(
    z, norm_weight, norm_bias, u_weight, out_weight, out_bias, lengths, heads, scale, causal, step_size, eps
) -> tuple[int, float, bool, float, float]:
    checks.norm(z, norm_weight, norm_bias, eps)
    check_attention(z, u_weight, out_weight, out_bias, lengths, heads)
    scale = (u_weight.shape[0] // heads) ** -0.5 if scale is None else checks.number("scale", scale)
    return heads, scale, checks.flag("causal", causal), checks.number("step_size", step_size), float(eps)


def check_attention(z, u_weight, out_weight, out_bias, lengths, heads) -> None:
    """The tensors of the compressing half fit ``z (B, N, d)`` and each other."""
    checks.tensor("z", z, ("B", "N", "d"))
    batch, tokens, width = z.shape
    if tokens < 1:
        raise ValueError(f"z: expected shape (B, N, d) with N at least 1, got {tuple(z.shape)}")
    checks.positive_int("heads", heads)
    checks.tensor("u_weight", u_weight, ("H*p", width), like=z)
    inner = u_weight.shape[0]
    if inner < heads or inner % heads:
        raise ValueError(f"heads: {heads} does not divide the {inner} rows of u_weight (H*p, d)")
    if out_weight is None:
        if inner != width:
            raise ValueError(f"out_weight: may be None only where H*p = d; got H*p = {inner} and d = {width}")
        if out_bias is not None:
            raise ValueError("out_bias: given without out_weight")
    else:
        checks.tensor("out_weight", out_weight, (width, inner), like=z)
        if out_bias is not None:
            checks.tensor("out_bias", out_bias, (width,), like=z)
    checks.same_dtype(z.dtype, u_weight=u_weight, out_weight=out_weight, out_bias=out_bias)
    checks.lengths(lengths, batch, z)
