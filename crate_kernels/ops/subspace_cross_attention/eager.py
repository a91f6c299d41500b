"""Subspace cross-attention in stock PyTorch, in bounded blocks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import accumulation_dtype
from ..masks import finite_where_hidden, forbidden
from ..subspace_attention.blocked import attend, probabilities, row_blocks


def why_not(w: Tensor, *_) -> None:
    return None


def forward(
    w: Tensor, context: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """-> ``o (B, N, H, p)`` contiguous, and ``lse (B, H, M + N)``: zeros, then the log-normalizers of the queries."""
    q, k, v, mask = _operands(w, context, value, lengths)
    o, lse = attend(q, k, v, scale, None if mask is None else lambda rows: mask)
    return o.transpose(1, 2).to(w.dtype).contiguous(), torch.nn.functional.pad(lse, (context.shape[1], 0))


def backward(
    grad: Tensor,
    w: Tensor,
    context: Tensor,
    value: Tensor | None,
    lengths: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> ``(dw, dcontext, dvalue)``. Without a separate value, ``dvalue`` is None and its part is in ``dcontext``.

    ``dw = scale·dS c``, ``dc = scale·dSᵀ w``, ``dvalue = Pᵀg`` with ``dS = P∘(g valueᵀ − rowsum(g∘o))``.
    """
    q, k, v, mask = _operands(w, context, value, lengths)
    lse, g = lse[:, :, context.shape[1] :], grad.transpose(1, 2).to(q.dtype)
    delta = (grad * o).sum(-1, dtype=lse.dtype).transpose(1, 2)
    dq, dk, dv = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (q, k, v))
    for rows in row_blocks(q, k):
        scores = (q[:, :, rows] @ k.mT).to(lse.dtype) * scale
        p = probabilities(scores, lse[:, :, rows, None])
        if mask is not None:
            p = p.masked_fill(mask, 0)
        ds = (p * ((g[:, :, rows] @ v.mT).to(p.dtype) - delta[:, :, rows, None])).to(q.dtype)
        dq[:, :, rows] = scale * (ds @ k)
        dk += scale * (ds.mT @ q[:, :, rows])
        dv += p.to(q.dtype).mT @ g[:, :, rows]
    if value is None:
        dk += dv
    dw, dcontext, dvalue = (t.transpose(1, 2).to(w.dtype).contiguous() for t in (dq, dk, dv))
    return dw, dcontext, None if value is None else dvalue


def _operands(
    w: Tensor, context: Tensor, value: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values with heads first, and a mask that is True for hidden keys. The CPU computes in
    float32."""
    value = finite_where_hidden(context if value is None else value, lengths)
    context = finite_where_hidden(context, lengths)
    mask = forbidden(context.shape[1], lengths, False, w.device)
    dtype = accumulation_dtype(w.dtype) if w.device.type == "cpu" else w.dtype
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (w, context, value))
    return q, k, v, mask
