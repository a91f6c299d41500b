"""``torch.ops.crate_cuda`` on CPU tensors, without the compiled extension.

Its schemas, read from the binding's source, implemented by the emulator's kernels; the products, which are a library's
on the GPU, by torch in float32.
"""

from __future__ import annotations

import re

import torch

from .emulator import SOURCES, Kernels, words


def name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def schemas() -> list[str]:
    binding = (SOURCES / "cuda" / "binding.cu").read_text()
    definitions = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", binding)
    return ["".join(re.findall(r"\"([^\"]*)\"", definition)) for definition in definitions]


def register(simt: Kernels) -> torch.library.Library:
    """The operators live as long as the returned object."""
    library = torch.library.Library("crate_cuda", "FRAGMENT")
    if not hasattr(torch.ops.crate_cuda, "product"):  # the compiled extension may have defined them
        for schema in schemas():
            library.define(schema)
    module = simt.module

    def heads(t):
        assert t.stride(-1) == 1
        assert not any(s % 8 for s in t.stride()[:-1])
        return words(t)

    def attention_forward(w, o, lse, lengths, scale, causal):
        lengths = None if lengths is None else lengths.numpy()
        module.attention_forward(name(w), heads(w), words(o), lse.numpy(), lengths, scale, causal)

    def attention_backward(grad, w, o, lse, dw, lengths, scale, causal):
        lengths = None if lengths is None else lengths.numpy()
        module.attention_backward(
            name(w), heads(w), heads(grad), words(o), lse.numpy(), words(dw), lengths, scale, causal
        )

    def layer_norm_forward(z, weight, bias, x, mean, rstd, eps):
        module.layer_norm_forward(
            name(z),
            words(z),
            weight.numpy(),
            bias.numpy(),
            words(x),
            mean.numpy(),
            rstd.numpy(),
            None,
            None,
            None,
            eps,
            3,
        )

    def layer_norm_again(z, weight, bias, x, grad, out, gated, eps):
        grad, out, gated = (None if t is None else words(t) for t in (grad, out, gated))
        module.layer_norm_forward(
            name(z), words(z), weight.numpy(), bias.numpy(), words(x), None, None, grad, out, gated, eps, 3
        )

    def layer_norm_backward(dx, z, mean, rstd, weight, residual, dz, partial, sums):
        residual = None if residual is None else words(residual)
        module.layer_norm_backward(
            name(z),
            words(dx),
            words(z),
            mean.numpy(),
            rstd.numpy(),
            weight.numpy(),
            residual,
            words(dz),
            partial.numpy(),
        )
        module.reduce_rows(partial.view(partial.shape[0], -1).numpy(), sums.view(-1).numpy())

    def product(a, b, c, bias, out, workspace, alpha, beta, relu):
        assert a.dtype == b.dtype
        assert c is None or (c.dtype == out.dtype and c.is_contiguous())
        assert bias is None or (bias.dtype == out.dtype and bias.is_contiguous())
        result = alpha * (a.float() @ b.float())
        if c is not None:
            result += beta * c.float()
        if bias is not None:
            result += bias.float()
        out.copy_(result.relu() if relu else result)

    for operator in (
        attention_forward, attention_backward, layer_norm_forward, layer_norm_again, layer_norm_backward, product,
    ):  # fmt: skip
        library.impl(operator.__name__, operator, "CPU")
    return library
