"""Weights of eight bits, by torchao: of the folded model, whose every product is one Linear layer."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu

from ..models import CrateModel
from ..nn import CrateBlock, CrateDecoderBlock, OvercompleteCrateBlock
from ..ops import standard
from .program import Deployable

SCHEMES = ("int8-weights", "int8-dynamic")
"""``int8-weights``: weights in int8, one scale for each output; arithmetic in float32. ``int8-dynamic``: the inputs of
each product in int8 as well, one scale for each token, found as they come."""


class _Half(nn.Module):
    """A LayerNorm of a layer, without its module: what a half-step reads."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm

    def read(self, z: Tensor) -> Tensor:
        return layer_norm(z, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)


class LinearAttention(_Half):
    """``z + step_size·MSSA(LN z)`` in modules: two Linear layers and torch's attention."""

    def __init__(self, norm: nn.LayerNorm, mssa: nn.Module, step_size: float, shrink: float = 0.0):
        super().__init__(norm)
        if not mssa.one_operand:
            raise ValueError("qk_norm, rotary: such attention is not made of Linear layers alone")
        self.projection, self.output = mssa.projection, mssa.output
        self.heads, self.scale, self.causal = mssa.heads, mssa.scale, mssa.causal
        self.step_size, self.shrink = step_size, shrink

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        w = self.projection(self.read(z)).unflatten(-1, (self.heads, -1))
        o = standard.subspace_attention(w, None, lengths, self.scale, self.causal).flatten(2)
        return (1 - self.shrink) * z + self.step_size * self.output(o)


class LinearISTA(_Half):
    """``ISTA(LN z)`` with the dictionary folded into one Linear layer of weight ``(W − WᵀW)ᵀ``."""

    def __init__(self, norm: nn.LayerNorm, ista: nn.Module):
        super().__init__(norm)
        if ista.learns_step:
            raise ValueError("learnable: the step size of such a layer is no number")
        self.folded = _linear((ista.folded() if ista.folded() is not None else standard.fold(ista.weight.detach())).T)
        self.step_size, self.threshold = ista.step_size, ista.step_size * ista.lambd

    def forward(self, z: Tensor) -> Tensor:
        x = self.read(z)
        return relu(x + self.step_size * self.folded(x) - self.threshold)


class LinearOvercompleteISTA(_Half):
    """The overcomplete half-step: three Linear layers, of the weights ``Dᵀ``, ``D`` and the decoder."""

    def __init__(self, norm: nn.LayerNorm, ista: nn.Module, residual: bool):
        super().__init__(norm)
        if isinstance(ista.step_size, Tensor):
            raise ValueError("learnable: the step size of such a layer is no number")
        D = ista.D.detach()
        self.encode, self.reconstruct = _linear(D.T), _linear(D)
        self.decode = self.reconstruct if ista.D1 is None else _linear(ista.D1.detach())
        self.step_size, self.threshold, self.residual = ista.step_size, ista.step_size * ista.lambd, residual

    def forward(self, z: Tensor) -> Tensor:
        encoded = self.encode(self.read(z))
        codes = relu(self.step_size * encoded - self.threshold)
        codes = relu(codes - self.step_size * (self.encode(self.reconstruct(codes)) - encoded) - self.threshold)
        decoded = self.decode(codes)
        return z + decoded if self.residual else decoded


class LinearBlock(nn.Module):
    """A layer of the encoder, ``z (B, N, d)`` -> ``(B, N, d)``."""

    def __init__(self, block: CrateBlock):
        super().__init__()
        self.compress = LinearAttention(block.mssa_norm, block.mssa, block.mssa_step_size, block.shrink)
        if isinstance(block, OvercompleteCrateBlock):
            self.sparsify = LinearOvercompleteISTA(block.ista_norm, block.ista, block.residual)
        else:
            self.sparsify = LinearISTA(block.ista_norm, block.ista)

    def forward(self, z: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.sparsify(self.compress(z, lengths))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear


def linear_copy(model: CrateModel) -> Deployable:
    """A copy of ``model`` for inference, of torch's own modules: every product but attention's is a Linear layer.

    Tools that replace Linear layers, as quantizers do, see all of the model in it.
    """
    copied = Deployable(model)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CrateDecoderBlock):
                raise TypeError("a masked autoencoder is quantized without its decoder: give its encoder's features")
            if isinstance(child, CrateBlock):
                setattr(parent, name, LinearBlock(child))
    return copied.eval()


def quantize(model: CrateModel, scheme: str = "int8-weights") -> Deployable:
    """A copy of ``model`` for inference with weights of eight bits, dictionaries folded before.

    Linear layers are narrowed, embeddings and norms are not. Run it through ``torch.compile`` for speed.

    Args:
        scheme: one of :data:`SCHEMES`.

    Raises:
        ImportError: torchao is not installed.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("quantize needs the package torchao: pip install torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    config = Int8WeightOnlyConfig if scheme == "int8-weights" else Int8DynamicActivationInt8WeightConfig
    copied = linear_copy(model)
    # Not torchao's settings for torch.compile, which would hold for the whole process.
    quantize_(copied, config(set_inductor_config=False))
    return copied


def nbytes(model: nn.Module) -> int:
    """Bytes of all weights as they are kept."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return torch.Tensor.numel(tensor) * tensor.element_size()
