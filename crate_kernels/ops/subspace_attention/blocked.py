"""Subspace attention in bounded memory and stock PyTorch, on any device.

``blocked_forward`` and ``blocked_backward`` are the whole operator. ``eager.py`` runs them on devices for which torch
has no flash kernel. ``attend`` and ``attend_backward`` compute the attention between two groups of tokens. Ring
attention runs them between two shards. Their tensors are head-major, ``(B, H, rows, p)``, and their log-normalizers
``(B, H, rows)`` are float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import accumulation_dtype
from ..masks import forbidden

BLOCK_ELEMENTS = 1 << 26
"""Largest number of scores in memory at once (256 MiB in float32)."""

Mask = Callable[[slice], Tensor | None] | None
"""For a slice of queries: True for keys that they may not see, broadcastable to ``(B, H, rows, keys)``. None: all
visible."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Mask = None) -> tuple[Tensor, Tensor]:
    """``softmax(scale · q kᵀ) v`` and the log-normalizer of its rows: ``(B, H, M, p)``, ``(B, H, M)``."""
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=accumulation_dtype(q.dtype), device=q.device)
    for rows in row_blocks(q, k):
        scores = _scores(q[:, :, rows], k, scale, hidden and hidden(rows))
        lse[:, :, rows] = scores.logsumexp(-1)
        o[:, :, rows] = scores.softmax(-1).to(q.dtype) @ v
    return o, lse


def attend_backward(
    w: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    w_other: Tensor, v_other: Tensor, grad_other: Tensor, lse_other: Tensor, delta_other: Tensor,
    scale: float, hidden: Mask = None, hidden_other: Mask = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The contribution of pairs (our token, other token) to our gradients ``(dw, dv)``, both ``(B, H, M, p)``.

    Token i is a query to j and a key to j. Both roles use the same score ``w_i·w_j``::

        dw_i = Σ_j scale·(dS_ij + dS_ji) w_j,   dv_i = Σ_j P_ji g_j,   dS = P∘(g vᵀ − delta),   delta = rowsum(g∘o)

    Args:
        w, v, grad, lse, delta: our tokens, their values, output gradients, log-normalizers and deltas.
        w_other, v_other, grad_other, lse_other, delta_other: the same for the other tokens.
        hidden: other tokens that ours may not see as queries (rows: ours, columns: the others).
        hidden_other: other tokens that may not see ours as keys (rows: ours, columns: the others).
    """
    dw, dv = torch.empty_like(w, dtype=lse.dtype), torch.empty_like(v, dtype=lse.dtype)
    for rows in row_blocks(w, w_other):
        scores = _scores(w[:, :, rows], w_other, scale, None)
        p = probabilities(scores, lse[:, :, rows, None])
        if (mask := hidden and hidden(rows)) is not None:
            p = p.masked_fill(mask, 0)
        ds = p * ((grad[:, :, rows] @ v_other.mT).to(p.dtype) - delta[:, :, rows, None])
        p = probabilities(scores, lse_other[:, :, None, :])
        if (mask := hidden_other and hidden_other(rows)) is not None:
            p = p.masked_fill(mask, 0)
        ds += p * ((v[:, :, rows] @ grad_other.mT).to(p.dtype) - delta_other[:, :, None, :])
        dw[:, :, rows] = scale * (ds.to(w.dtype) @ w_other)
        dv[:, :, rows] = p.to(w.dtype) @ grad_other
    return dw, dv


def blocked_forward(
    w: Tensor, value: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Subspace attention by blocks of queries -> ``o (B, N, H, p)``, ``lse (B, H, N)``; ``value`` is always given."""
    hidden = _hidden(w, lengths, causal)
    query, value = w.transpose(1, 2), value.transpose(1, 2)
    o, lse = attend(query, query, value, scale, hidden)
    return o.transpose(1, 2).contiguous(), lse


def blocked_backward(
    grad: Tensor, w: Tensor, value: Tensor, lengths: Tensor | None, o: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the scores' operand and of the value, separately, both ``(B, N, H, p)``."""
    delta = (grad * o).sum(-1, dtype=lse.dtype).transpose(1, 2)
    query, value, grad = w.transpose(1, 2), value.transpose(1, 2), grad.transpose(1, 2)
    hidden, hidden_other = _hidden(w, lengths, causal), _hidden(w, lengths, causal, transposed=True)
    dw, dv = attend_backward(
        query, value, grad, lse, delta, query, value, grad, lse, delta,
        scale=scale, hidden=hidden, hidden_other=hidden_other,
    )  # fmt: skip
    return dw.transpose(1, 2).to(w.dtype).contiguous(), dv.transpose(1, 2).to(w.dtype).contiguous()


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores − lse)``, at most 1.

    Large scores differ from their log-normalizer by rounding, which must not become a power.
    """
    return (scores - lse).clamp_(max=0).exp_()


def row_blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Slices of the rows of ``q``, each with fewer than ``BLOCK_ELEMENTS`` scores with ``k``."""
    batch, heads, tokens, _ = q.shape
    size = max(1, BLOCK_ELEMENTS // max(1, batch * heads * k.shape[2]))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = (q @ k.mT).to(accumulation_dtype(q.dtype)) * scale
    return scores if mask is None else scores.masked_fill(mask, -torch.inf)


def _hidden(w: Tensor, lengths: Tensor | None, causal: bool, transposed: bool = False) -> Mask:
    mask = forbidden(w.shape[1], lengths, causal, w.device)
    if mask is None:
        return None
    mask = mask.mT if transposed else mask
    return lambda rows: mask[:, :, rows] if mask.shape[2] > 1 else mask
