"""The public function: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from .op import operator


def subspace_cross_attention(
    w: Tensor,
    context: Tensor,
    value: Tensor | None = None,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head subspace cross-attention: the tokens are queries only, the context is key and value.

    ``o = softmax(scale · w cᵀ) c`` in every head: the MSSA of "White-Box Transformers via Sparse Rate Reduction" (arXiv
    2306.01129, equation 11) with the subspaces' tokens ``c`` of another sequence. Equivalent to::

        q, k, v = (t.transpose(1, 2) for t in (w, context, context if value is None else value))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    Args:
        w: ``(B, N, H, p)``; float16, bfloat16, float32 or float64; any strides. B may be 0.
        context: ``(B, M, H, p)``, the dtype and device of ``w``.
        value: ``(B, M, H, p)``, likewise; replaces ``context`` as the value.
        scale: factor of the scores; ``p ** -0.5`` if None.
        lengths: ``(B,)`` int32 or int64 in 1..M; keys at ``lengths[b]`` and beyond are hidden from every query.
        backend: ``"reference"``, ``"eager"``, ``"cpu"``, or None for the automatic choice.

    Returns:
        ``(B, N, H, p)``, contiguous, in the dtype of ``w`` (autocast's dtype under autocast).

    Raises:
        TypeError: an argument is of a wrong type or dtype, or dtypes differ.
        ValueError: a shape, device or value does not fit.
        RuntimeError: the requested backend cannot run these inputs; the message gives the reason.
    """
    return operator(_check, backend, (w, context, value, lengths), (scale,))


def _check(w, context, value, lengths, scale) -> tuple[float]:
    checks.tensor("w", w, ("B", "N", "H", "p"))
    batch, _, heads, width = w.shape
    checks.tensor("context", context, (batch, "M", heads, width), like=w)
    checks.same_dtype(w.dtype, context=context)
    for name, tensor in (("w", w), ("context", context)):
        if min(tensor.shape[1:]) < 1:
            raise ValueError(f"{name}: expected every size but the batch to be at least 1, got {tuple(tensor.shape)}")
    if value is not None:
        checks.tensor("value", value, tuple(context.shape), like=w)
        checks.same_dtype(w.dtype, value=value)
    checks.lengths(lengths, batch, w)
    return (width**-0.5 if scale is None else checks.number("scale", scale),)
