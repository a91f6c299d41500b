"""The operators as standard ATen operators, which every runtime knows. An exported model consists of these.

The values are those of the reference equations, with fewer products: attention is torch's
``scaled_dot_product_attention``, and a folded dictionary replaces the three products of an ISTA step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from .masks import finite_where_hidden, forbidden


def exporting() -> bool:
    """Whether torch records a program that must run without this package: torch.export, ONNX, torch.jit.trace."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def subspace_attention(w: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    """``softmax(scale · w wᵀ) value`` per head; ``w, value (B, N, H, p)`` -> ``(B, N, H, p)``."""
    w = finite_where_hidden(w, lengths)
    return _attention(w, w, w if value is None else finite_where_hidden(value, lengths), lengths, scale, causal)


def subspace_cross_attention(
    w: Tensor, context: Tensor, value: Tensor | None, lengths: Tensor | None, scale: float
) -> Tensor:
    """``softmax(scale · w cᵀ) value`` per head; ``w (B, N, H, p)``, ``context, value (B, M, H, p)`` -> as ``w``."""
    context = finite_where_hidden(context, lengths)
    value = context if value is None else finite_where_hidden(value, lengths)
    return _attention(w, context, value, lengths, scale, False)


def _attention(w: Tensor, keys: Tensor, value: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    hidden = None if lengths is None else forbidden(keys.shape[1], lengths, causal, w.device)
    mask = None if hidden is None else ~hidden
    o = scaled_dot_product_attention(
        w.transpose(1, 2), keys.transpose(1, 2), value.transpose(1, 2), mask, is_causal=causal and mask is None,
        scale=scale,
    )  # fmt: skip
    return o.transpose(1, 2)


def fold(weight: Tensor) -> Tensor:
    """``W − WᵀW``, so that ``x W − x Wᵀ W = x (W − WᵀW)``; ``(d, d)``."""
    return weight - weight.T @ weight


def ista_step(x: Tensor, weight: Tensor, folded: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """``relu(x + step_size·(x W − x Wᵀ W) − step_size·lambd)``; ``x (…, d)`` -> ``(…, d)``."""
    change = x @ weight - x @ weight.T @ weight if folded is None else x @ folded
    return torch.relu(x + step_size * change - step_size * lambd)


def overcomplete_ista(x: Tensor, D: Tensor, D1: Tensor | None, step_size: float, lambd: float) -> Tensor:
    """Two steps against ``D (d, m)``, decoded by ``D1``; ``x (…, d)`` -> ``(…, d)``."""
    a = x @ D
    codes = torch.relu(step_size * a - step_size * lambd)
    codes = torch.relu(codes - step_size * (codes @ D.T @ D - a) - step_size * lambd)
    return codes @ (D if D1 is None else D1).T


def mssa_block(
    z: Tensor, norm_weight: Tensor, norm_bias: Tensor, u_weight: Tensor, out_weight: Tensor | None,
    out_bias: Tensor | None, lengths: Tensor | None, heads: int, scale: float, causal: bool, step_size: float,
    eps: float,
) -> Tensor:  # fmt: skip
    """``z + step_size·MSSA(LN(z))``; ``z (B, N, d)`` -> ``(B, N, d)``."""
    w = linear(_norm(z, norm_weight, norm_bias, eps), u_weight).unflatten(-1, (heads, -1))
    o = subspace_attention(w, None, lengths, scale, causal).flatten(2)
    o = o if out_weight is None else linear(o, out_weight, out_bias)
    return z + step_size * o if step_size != 1 else z + o


def ista_block(
    z: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, folded: Tensor | None, step_size: float,
    lambd: float, eps: float,
) -> Tensor:  # fmt: skip
    """``ISTA(LN(z))``; ``z (…, d)`` -> ``(…, d)``."""
    return ista_step(_norm(z, norm_weight, norm_bias, eps), weight, folded, step_size, lambd)


def crate_layer(
    z: Tensor, mssa_norm_weight: Tensor, mssa_norm_bias: Tensor, u_weight: Tensor, out_weight: Tensor | None,
    out_bias: Tensor | None, ista_norm_weight: Tensor, ista_norm_bias: Tensor, weight: Tensor, folded: Tensor | None,
    lengths: Tensor | None, heads: int, scale: float, causal: bool, mssa_step_size: float, step_size: float,
    lambd: float, mssa_eps: float, ista_eps: float,
) -> Tensor:  # fmt: skip
    """``ISTA(LN(z + mssa_step_size·MSSA(LN(z))))``; ``z (B, N, d)`` -> ``(B, N, d)``."""
    between = mssa_block(
        z, mssa_norm_weight, mssa_norm_bias, u_weight, out_weight, out_bias, lengths,
        heads, scale, causal, mssa_step_size, mssa_eps,
    )  # fmt: skip
    return ista_block(between, ista_norm_weight, ista_norm_bias, weight, folded, step_size, lambd, ista_eps)


def _norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm(z, z.shape[-1:], weight.to(z.dtype), bias.to(z.dtype), eps)
