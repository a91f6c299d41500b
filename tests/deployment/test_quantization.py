"""Folded models made of Linear layers, and eight-bit weights."""

import importlib.util

import pytest
import torch

from crate_kernels.deployment import linear_copy, quantize
from crate_kernels.deployment.quantization import SCHEMES, LinearISTA, nbytes
from crate_kernels.models import CrateMAE
from crate_kernels.nn import CrateBlock

from .cases import MODELS, build, expected, inputs_of, visible

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mae"])
def test_every_product_is_a_linear_layer(name):
    model = build(name)
    linear = linear_copy(model)
    assert not any(isinstance(module, CrateBlock) for module in linear.modules())
    inputs = inputs_of(linear, 3)
    got, wanted = linear(*inputs), expected(model, inputs)
    torch.testing.assert_close(visible(model, inputs, got), visible(model, inputs, wanted), rtol=1e-4, atol=1e-4)
    # Per layer: projection, output, and the folded dictionary or the two or three matrices of the overcomplete step.
    layer = linear.model.blocks[0]
    linears = sum(isinstance(module, torch.nn.Linear) for module in layer.modules())
    assert linears == {"alpha": 5, "lm": 4}.get(name, 3)


def test_dictionaries_are_folded_before():
    model = build("crate")
    for block, linear in zip(model.blocks, linear_copy(model).model.blocks, strict=True):
        weight = block.ista.weight.detach()
        torch.testing.assert_close(linear.sparsify.folded.weight.T, weight - weight.T @ weight)


def test_what_is_not_made_of_linear_layers_is_refused():
    torch.manual_seed(0)
    with pytest.raises(TypeError, match="cannot be quantized"):
        linear_copy(CrateMAE(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, decoder_depth=1))
    block = CrateBlock(8, 2, 4, learnable="scalar")
    with pytest.raises(ValueError, match="learnable"):
        LinearISTA(block.ista_norm, block.ista)
    with pytest.raises(ValueError, match="scheme: expected one of int8-weights, int8-dynamic, got 'int4'"):
        quantize(build("crate"), "int4")


@needs_torchao
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["crate", "alpha", "gpt", "bert"])
@pytest.mark.filterwarnings("ignore")
def test_quantized_models(name, scheme):
    model = build(name)
    narrow, whole = quantize(model, scheme), linear_copy(model)
    inputs = inputs_of(whole, 3)
    with torch.no_grad():
        got = narrow(*inputs)
    wanted = expected(model, inputs)
    error = (visible(model, inputs, got - wanted)).norm() / visible(model, inputs, wanted).norm()
    assert 1e-5 < error < (0.1 if scheme == "int8-dynamic" else 0.05)
    weights = sum(m.weight.numel() for m in whole.modules() if isinstance(m, torch.nn.Linear))
    assert nbytes(whole) - nbytes(narrow) > 2.5 * weights  # three of four bytes, less the scales
