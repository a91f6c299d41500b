"""The terms of sparse rate reduction, ``max R(Z) − R^c(Z; U) − lam·‖Z‖₀`` (arXiv 2306.01129, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def coding_rate(z: Tensor, eps: float = 0.5) -> Tensor:
    """The lossy coding rate ``R(Z) = ½ logdet(I + d/(N·eps²) Z Zᵀ)``, in nats.

    Args:
        z: ``(..., N, d)``: N tokens of width d; any floating dtype. Computed in float64, differentiable.
        eps: the allowed distortion, positive.

    Returns:
        ``(...)``, in the dtype of ``z`` (float32 for half precision).
    """
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() < 2:
        raise ValueError(f"z: expected a floating tensor (..., N, d), got {_description(z)}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    tokens, width = z.shape[-2:]
    return _half_logdet(z, width / (tokens * eps**2))


def subspace_coding_rate(w: Tensor, eps: float = 0.1) -> Tensor:
    """The rate ``R^c`` of tokens coded in their heads' subspaces, one value per sample, in nats.

    Each token's vector in each head is scaled to length one, then
    ``R^c = Σ_h ½ logdet(I + p/(N·eps²) w_h w_hᵀ)``: the convention of the published measurements (eps² = 0.01).

    Args:
        w: ``(B, H, N, p)``, the projected tokens of every head; any floating dtype. Computed in float64.
        eps: the allowed distortion, positive.

    Returns:
        ``(B,)``, in the dtype of ``w`` (float32 for half precision).
    """
    if not isinstance(w, Tensor) or not w.is_floating_point() or w.dim() != 4:
        raise ValueError(f"w: expected a floating tensor (B, H, N, p), got {_description(w)}")
    wide = w.to(_measuring_dtype(w))
    return coding_rate(torch.nn.functional.normalize(wide, dim=-1), eps).sum(dim=-1).to(_result_dtype(w))


def sparsity(z: Tensor) -> Tensor:
    """The fraction of non-zero entries of every sample: ``z (B, ...)`` -> ``(B,)`` in float32. Lower is sparser."""
    if not isinstance(z, Tensor) or z.dim() < 2:
        raise ValueError(f"z: expected a tensor (B, ...), got {_description(z)}")
    return (z != 0).flatten(1).float().mean(dim=1)


def effective_rank(z: Tensor) -> Tensor:
    """The effective number of directions of the tokens: ``exp(−Σ pᵢ ln pᵢ)`` with ``pᵢ = σᵢ / Σσ`` over singular
    values.

    The rank lies between 1 (all tokens are multiples of one) and min(N, d) (all singular values are equal). It is 1 if
    all tokens are zero.
    Defined in "The effective rank: a measure of effective dimensionality" (Roy and Vetterli, EUSIPCO 2007).

    Args:
        z: ``(..., N, d)``; any floating dtype. Computed in float64.

    Returns:
        ``(...)``, in the dtype of ``z`` (float32 for half precision).
    """
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() < 2:
        raise ValueError(f"z: expected a floating tensor (..., N, d), got {_description(z)}")
    gram = _smaller_gram(z.to(_measuring_dtype(z)))
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.special.entr(share).sum(dim=-1).exp().to(_result_dtype(z))


def subspace_coherence(weight: Tensor, heads: int) -> Tensor:
    """The overlap of the subspaces of every two heads: ``‖Q_jᵀ Q_k‖²_F / p``, with an orthonormal basis ``Q_k`` of
    each head.

    This is the mean squared cosine of the principal angles. Orthogonal subspaces, which sparse rate reduction assumes,
    have 0. Equal subspaces have 1. Random subspaces have about p/d.

    Args:
        weight: ``(H·p, d)``, the projection's weight, with p <= d; any floating dtype. Computed in float64.
        heads: H.

    Returns:
        ``(H, H)``, symmetric with unit diagonal, in the dtype of ``weight`` (float32 for half precision).
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(f"weight: expected a floating tensor (H·p, d), got {_description(weight)}")
    if heads < 1 or weight.shape[0] % heads or weight.shape[0] // heads > weight.shape[1]:
        raise ValueError(f"heads: {heads} heads do not split weight {tuple(weight.shape)} into subspaces of width d")
    bases = torch.linalg.qr(weight.to(_measuring_dtype(weight)).unflatten(0, (heads, -1)).mT).Q  # (H, d, p)
    cosines = torch.einsum("jdp,kdq->jkpq", bases, bases)
    return (cosines.square().sum(dim=(-2, -1)) / bases.shape[-1]).to(_result_dtype(weight))


def _half_logdet(z: Tensor, alpha: float) -> Tensor:
    # I + alpha·Z Zᵀ and I + alpha·Zᵀ Z have the same determinant, so the smaller matrix is enough. Its eigenvalues
    # reach from 1 to alpha·‖Z‖². Float32 does not cover this range if eps is small, so the matrix is float64.
    wide = z.to(_measuring_dtype(z))
    gram = _smaller_gram(wide)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(identity + alpha * gram).L
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1).to(_result_dtype(z))


def _smaller_gram(z: Tensor) -> Tensor:
    return z @ z.mT if z.shape[-2] <= z.shape[-1] else z.mT @ z


def _measuring_dtype(z: Tensor) -> torch.dtype:
    return torch.float32 if z.device.type == "mps" else torch.float64


def _result_dtype(z: Tensor) -> torch.dtype:
    return torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype


def _description(value) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
