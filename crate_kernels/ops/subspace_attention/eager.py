"""Subspace attention in stock PyTorch, with one gradient for the one operand.

On the CPU, torch's flash kernels compute both directions, and the three gradients are added. Elsewhere the softmax is
recomputed from its log-normalizer in blocks of queries of bounded size, so that memory does not grow with N².
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import accumulation_dtype
from ..masks import finite_where_hidden, forbidden
from .blocked import blocked_backward, blocked_forward

SHORT_SEQUENCE = 256
"""Largest N for which the CPU backward computes bfloat16 and float16 in float32. torch's flash kernel in bfloat16 takes
six times as long at 17 tokens and 1.3 times as long at 197. From 785 tokens on, bfloat16 is faster."""


def why_not(w: Tensor, *_) -> None:
    return None


def forward(
    w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """-> ``o (B, N, H, p)`` contiguous, and the log-normalizer ``lse (B, H, N)`` of the softmax rows in float32."""
    w, value = _operands(w, value, lengths)
    batch, tokens, heads, _ = w.shape
    if batch == 0:
        return torch.empty_like(w, memory_format=torch.contiguous_format), w.new_empty(
            (batch, heads, tokens), dtype=accumulation_dtype(w.dtype)
        )
    q, v = w.transpose(1, 2), value.transpose(1, 2)
    if _has_flash(w):
        # torch's kernel takes either its causal flag or a mask, so both together become one mask.
        mask = _additive_mask(w, lengths, causal) if lengths is not None else None
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, q, v, 0.0, causal and mask is None, attn_mask=mask, scale=scale
        )
        return o.transpose(1, 2).contiguous(), lse.contiguous()
    return blocked_forward(w, value, lengths, scale, causal)


def backward(
    grad: Tensor,
    w: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """-> ``(dw, dvalue)``. Without a separate value, ``dvalue`` is None and its part is included in ``dw``.

    ``dS = P∘(g valueᵀ − rowsum(g∘o))``, ``dw = scale·(dS + dSᵀ) w + Pᵀg``.
    """
    shared = value is None
    w, value = _operands(w, value, lengths)
    if w.shape[0] == 0:
        return torch.zeros_like(w, memory_format=torch.contiguous_format), None if shared else torch.zeros_like(
            value, memory_format=torch.contiguous_format
        )
    q, v, g = w.transpose(1, 2), value.transpose(1, 2), grad.transpose(1, 2)
    dtype_of_w, on_cpu = w.dtype, _has_flash(w)
    # torch's kernel does not bound probabilities: the rounding of large scores would become a power.
    if on_cpu and bool(lse.abs().amax() * torch.finfo(lse.dtype).eps <= 0.5):
        dtype = lse.dtype if w.shape[1] <= SHORT_SEQUENCE else w.dtype
        g, q, v, attended = (t.to(dtype) for t in (g, q, v, o.transpose(1, 2)))
        mask = _additive_mask(w, lengths, causal).to(dtype) if lengths is not None else None
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, q, v, attended, lse, 0.0, causal and mask is None, attn_mask=mask, scale=scale
        )
        dw = dq.add_(dk)
        if shared:
            dw.add_(dv)
        dw, dv = (t.transpose(1, 2).to(w.dtype).contiguous() for t in (dw, dv))
        return dw, None if shared else dv
    if on_cpu:  # where 16-bit products are slow
        grad, w, value, o = (t.to(lse.dtype) for t in (grad, w, value, o))
    dw, dv = blocked_backward(grad, w, value, lengths, o, lse, scale, causal)
    return ((dw + dv).to(dtype_of_w), None) if shared else (dw.to(dtype_of_w), dv.to(dtype_of_w))


def _has_flash(w: Tensor) -> bool:
    """Whether torch has a flash kernel that also gives the log-normalizer."""
    return w.device.type == "cpu"


def _operands(w: Tensor, value: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    w = finite_where_hidden(w, lengths)
    return w, w if value is None else finite_where_hidden(value, lengths)


def _additive_mask(w: Tensor, lengths: Tensor | None, causal: bool) -> Tensor:
    tokens = w.shape[1]
    mask = forbidden(tokens, lengths, causal, w.device)
    assert mask is not None
    mask = mask.expand(w.shape[0], 1, tokens, tokens)
    return torch.zeros(mask.shape, dtype=w.dtype).masked_fill_(mask, -torch.inf)
