"""The public function: checks its arguments, chooses a backend, runs it."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from . import reference
from .op import operator


def subspace_attention(
    w: Tensor,
    value: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head subspace self-attention of projected tokens: query, key and value are one tensor.

    ``o = softmax(scale · w wᵀ) w`` in every head (MSSA, "White-Box Transformers via Sparse Rate Reduction",
    arXiv 2306.01129, equation 11). Equivalent to::

        q, v = w.transpose(1, 2), (w if value is None else value).transpose(1, 2)
        o = torch.nn.functional.scaled_dot_product_attention(q, q, v, scale=scale, is_causal=causal).transpose(1, 2)

    Args:
        w: ``(B, N, H, p)``; float16, bfloat16, float32 or float64; any strides. B may be 0.
        value: ``(B, N, H, p)``, the dtype and device of ``w``; replaces ``w`` as the value (rotary embeddings: pass
            ``rope(w), w``).
        scale: factor of the scores; ``p ** -0.5`` if None.
        causal: token i attends only to tokens j <= i.
        lengths: ``(B,)`` int32 or int64 in 1..N; the keys from ``lengths[b]`` on are masked. Masked tokens
            may hold anything, NaN too. They attend to the unmasked keys, but their outputs are rarely useful.
        backend: ``"reference"``, ``"eager"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or None for the automatic choice.

    Returns:
        ``(B, N, H, p)``, contiguous, in the dtype of ``w`` (autocast's dtype under autocast).

    Raises:
        TypeError: an argument is of a wrong type or dtype, or dtypes differ.
        ValueError: a shape, device or value does not fit. Values of ``lengths`` are checked on the CPU alone, because
            reading them would stall a GPU; in a compiled graph the error is a RuntimeError.
        RuntimeError: the requested backend cannot run these inputs; the message gives the reason.
    """
    return operator(_check, backend, (w, value, lengths), (scale, causal))


def attention_maps(w: Tensor, scale: float, causal: bool = False, lengths: Tensor | None = None) -> Tensor:
    """``softmax(scale · w wᵀ)`` written out in stock PyTorch: ``w (B, N, H, p)`` -> ``(B, H, N, N)``. Differentiable.

    Args:
        w, scale, causal, lengths: as for :func:`subspace_attention`.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`subspace_attention`.
    """
    _check(w, None, lengths, scale, causal)
    checks.length_values(lengths, w.shape[1])
    return reference.attention_maps(w, scale, causal, lengths)


def _check(w, value, lengths, scale, causal) -> tuple[float, bool]:
    checks.tensor("w", w, ("B", "N", "H", "p"))
    batch, tokens, heads, width = w.shape
    for name, size in (("N", tokens), ("H", heads), ("p", width)):
        if size < 1:
            raise ValueError(
                f"w: expected shape (B, N, H, p) with N, H and p at least 1, got {tuple(w.shape)} ({name} = 0)"
            )
    if value is not None:
        checks.tensor("value", value, tuple(w.shape), like=w)
        checks.same_dtype(w.dtype, value=value)
    checks.lengths(lengths, batch, w)
    scale = width**-0.5 if scale is None else checks.number("scale", scale)
    return scale, checks.flag("causal", causal)
