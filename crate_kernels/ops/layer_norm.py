"""LayerNorm with its row statistics, forward and backward, in stock PyTorch. Both block operators use it."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import accumulation_dtype


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize the last axis: ``z (..., d)`` -> ``(LN(z) (..., d), mean (...), rstd (...))``, statistics in float32
    (float64 for float64). ``LN(z) = torch.nn.functional.layer_norm(z, (d,), weight, bias, eps)``."""
    weight, bias = _norm_parameters(z, weight, bias)
    x, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], weight, bias, eps)
    statistics = accumulation_dtype(z.dtype)
    return x, mean.squeeze(-1).to(statistics), rstd.squeeze(-1).to(statistics)


def layer_norm_backward(grad: Tensor, z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor):
    """Gradients ``(dz, dweight, dbias)`` of :func:`layer_norm` for ``grad (..., d)``."""
    cast_weight, cast_bias = _norm_parameters(z, weight, bias)
    dz, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, z, z.shape[-1:], mean.unsqueeze(-1), rstd.unsqueeze(-1), cast_weight, cast_bias, [True, True, True]
    )
    return dz, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _norm_parameters(z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    # torch's CPU kernel gives float32 statistics for half-precision rows only if the parameters are float32. Its CUDA
    # kernel always does, and needs parameters in the dtype of the rows.
    half = z.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half and z.device.type == "cpu" else z.dtype
    return weight.to(dtype), bias.to(dtype)
