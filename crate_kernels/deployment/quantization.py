"""Eight-bit weights by torchao. The dictionaries are folded first, so that every product with a weight is a Linear
layer."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu

from ..extras import needs
from ..models import CrateModel
from ..nn import ISTA, MSSA, CrateBlock, CrateDecoderBlock, OvercompleteCrateBlock, OvercompleteISTA
from ..ops import standard
from .program import Deployable

SCHEMES = ("int8-weights", "int8-dynamic")
"""``int8-weights``: weights in int8 with one scale for each output; arithmetic in float32. ``int8-dynamic``: the inputs
of each product are int8 too, with one scale for each token, computed in each call."""


class _Norm(nn.Module):
    """``LN(z)``, ``(..., d)`` -> ``(..., d)``, with the weights of another LayerNorm."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.shape, self.eps = norm.normalized_shape, norm.eps

    def forward(self, z: Tensor) -> Tensor:
        return layer_norm(z, self.shape, self.weight, self.bias, self.eps)


class _Product(nn.Linear):
    """``x (..., in)`` -> ``(..., out)``, with a given weight ``(out, in)`` and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)


class LinearAttention(nn.Module):
    """``(1 − shrink)·z + step_size·MSSA(LN z)``, built from two Linear layers and torch's attention."""

    def __init__(self, norm: nn.LayerNorm, mssa: MSSA, step_size: float, shrink: float):
        super().__init__()
        if not mssa.one_operand:
            raise ValueError("qk_norm, rotary: attention with these options is not made of Linear layers alone")
        self.norm, self.projection = _Norm(norm), _Product(mssa.projection.weight)
        self.output: nn.Module = nn.Identity()
        if not isinstance(mssa.output, nn.Identity):
            bias = mssa.output.bias
            self.output = _Product(mssa.output.weight, bias if isinstance(bias, Tensor) else None)
        self.heads, self.scale, self.causal = mssa.heads, float(mssa.scale), mssa.causal
        self.step_size, self.shrink = float(step_size), float(shrink)

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``z (B, N, d)`` -> ``(B, N, d)``."""
        w = self.projection(self.norm(z)).unflatten(-1, (self.heads, -1))
        o = standard.subspace_attention(w, None, lengths, self.scale, self.causal).flatten(2)
        return (1 - self.shrink) * z + self.step_size * self.output(o)


class LinearISTA(nn.Module):
    """``ISTA(LN z)`` with the dictionary folded into one Linear layer of weight ``(W − WᵀW)ᵀ``."""

    def __init__(self, norm: nn.LayerNorm, ista: ISTA):
        super().__init__()
        if not isinstance(ista.step_size, float | int):
            raise ValueError("learnable: the step size of such a layer is not a number")
        self.norm, self.folded = _Norm(norm), _Product(standard.fold(ista.weight.detach()).T)
        self.step_size, self.threshold = float(ista.step_size), float(ista.step_size * ista.lambd)

    def forward(self, z: Tensor) -> Tensor:
        """``z (..., d)`` -> ``(..., d)``."""
        x = self.norm(z)
        return relu(x + self.step_size * self.folded(x) - self.threshold)


class LinearOvercompleteISTA(nn.Module):
    """The overcomplete half-step, built from three Linear layers with the weights ``Dᵀ``, ``D`` and the decoder."""

    def __init__(self, norm: nn.LayerNorm, ista: OvercompleteISTA, residual: bool):
        super().__init__()
        if not isinstance(ista.step_size, float | int):
            raise ValueError("learnable: the step size of such a layer is not a number")
        self.norm, self.encode, self.reconstruct = _Norm(norm), _Product(ista.D.T), _Product(ista.D)
        self.decode = self.reconstruct if ista.D1 is None else _Product(ista.D1)
        self.step_size, self.threshold = float(ista.step_size), float(ista.step_size * ista.lambd)
        self.residual = residual

    def forward(self, z: Tensor) -> Tensor:
        """``z (..., d)`` -> ``(..., d)``."""
        encoded = self.encode(self.norm(z))
        codes = relu(self.step_size * encoded - self.threshold)
        codes = relu(codes - self.step_size * (self.encode(self.reconstruct(codes)) - encoded) - self.threshold)
        decoded = self.decode(codes)
        return z + decoded if self.residual else decoded


class LinearBlock(nn.Module):
    """A layer of the encoder, built from Linear layers."""

    def __init__(self, block: CrateBlock):
        super().__init__()
        self.compress = LinearAttention(block.mssa_norm, block.mssa, block.mssa_step_size, block.shrink)
        if isinstance(block, OvercompleteCrateBlock):
            self.sparsify: nn.Module = LinearOvercompleteISTA(block.ista_norm, block.ista, block.residual)
        else:
            self.sparsify = LinearISTA(block.ista_norm, block.ista)

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``z (B, N, d)`` -> ``(B, N, d)``."""
        return self.sparsify(self.compress(z, lengths))


def linear_copy(model: CrateModel) -> Deployable:
    """A copy of ``model`` for inference in which every product with a weight is a Linear layer of torch.

    Tools that replace Linear layers, such as quantizers, therefore reach the whole model.

    Raises:
        TypeError: the model is a masked autoencoder.
        ValueError: a layer has options that are not made of Linear layers (``qk_norm``, ``rotary``, ``learnable``).
    """
    copied = Deployable(model)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CrateDecoderBlock):
                raise TypeError("a masked autoencoder cannot be quantized: fine-tune it and quantize the classifier")
            if isinstance(child, CrateBlock):
                setattr(parent, name, LinearBlock(child))
    return copied.eval()


def quantize(model: CrateModel, scheme: str = "int8-weights") -> Deployable:
    """A copy of ``model`` for inference with weights of eight bits. Dictionaries are folded first.

    The Linear layers get int8 weights; embeddings, positions and norms stay float32. ``torch.compile`` makes it fast.

    Args:
        scheme: one of :data:`SCHEMES`.

    Raises:
        ImportError: torchao is not installed.
        ValueError, TypeError: as :func:`linear_copy`, or the scheme is unknown.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    copied = linear_copy(model)
    if importlib.util.find_spec("torchao") is None:
        raise ImportError(needs("quantize", "torchao"))
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig if scheme == "int8-weights" else Int8DynamicActivationInt8WeightConfig
    # torchao would change settings of torch.compile for the whole process.
    quantize_(copied, config(set_inductor_config=False))
    return copied


def nbytes(model: nn.Module) -> int:
    """Bytes of all weights in memory."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return torch.Tensor.numel(tensor) * tensor.element_size()
