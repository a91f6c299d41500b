"""The five code bases in float32, under bfloat16 autocast, and in pure bfloat16: dtypes and errors do not change."""

import copy

import pytest
import torch
from torch import nn

from crate_kernels import fuse
from crate_kernels.agreement import judge, relative

from .twins import CODE_BASES, GPT, AlphaTransformer, Transformer

WIDE = {
    "vision": dict(dim=96, heads=4, dim_head=24),
    "mae": dict(dim=96, heads=4),
    "alpha": dict(dim=96, heads=4),
    "language": dict(n_embd=96, n_head=4, block_size=64),
    "overcomplete-language": dict(n_embd=96, n_head=4),
}
"""Sizes at which an error is an average over many roundings."""


def outcome(model, x, autocast):
    """The output, the gradient of the input, and all gradients of parameters that there are."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def three(name, precision, seed, depth=4):
    """The exact result of the model, its result in a precision, and the result of the fused model in that precision."""
    build, width = CODE_BASES[name]
    sizes = WIDE[name]
    torch.manual_seed(seed)
    own, x = build(depth=depth, **sizes), torch.randn(2, 33, width if name == "vision" else 96)
    if precision == "bfloat16":
        own, x = own.bfloat16(), x.bfloat16()
    exact = outcome(copy.deepcopy(own).double(), x.double(), False)
    before = outcome(own, x, precision == "autocast")
    fuse(own)
    got = outcome(own, x, precision == "autocast")
    assert [t.dtype for t in got] == [t.dtype for t in before]
    return exact, before, got


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CODE_BASES)
def test_same_dtypes_within_the_budget(name, precision):
    for seed in range(2):
        exact, before, got = three(name, precision, seed, depth=2)
        verdict = judge(got, exact, before, getattr(torch, precision), kinks=True, together=True)
        assert verdict.passed, verdict.detail


@pytest.mark.parametrize("name", CODE_BASES)
def test_under_autocast_errors_are_those_of_the_model_before(name):
    ratios = []
    # The vision model has few outputs. One ReLU unit that flips makes the error of a seed three times as large.
    for seed in range(24 if name == "vision" else 6):
        exact, before, got = three(name, "autocast", seed)
        errors = [[relative(t, e) for t, e in zip(tensors, exact, strict=True)] for tensors in (got, before)]
        ratios.append([a / b if b else 1.0 for a, b in zip(*errors, strict=True)])
    # The geometric mean over the seeds: of the output, of the gradient of the input, of all tensors.
    mean = torch.tensor(ratios).log().mean(0).exp()
    assert mean[0] < 1.3
    assert mean[1] < 1.3
    assert mean.mean() < 1.3


# -- a narrower residual stream ------------------------------------------------------------------------------------


def saved_bytes(model, x):
    """Bytes that the graph of ``model(x)`` holds under autocast, without the parameters; and the output."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    return sum(storages.values()), out


@pytest.mark.parametrize(
    ("build", "width"),
    [
        (lambda: Transformer(96, 4, 4, 24), 96),
        (lambda: nn.Sequential(*GPT(n_embd=96, n_head=4, depth=4, block_size=64).h), 96),
        (lambda: AlphaTransformer(dim=96, heads=4, depth=4), 96),
    ],
    ids=["stack", "layers", "residual"],
)
def test_narrow_residual_stream(build, width):
    torch.manual_seed(0)
    own, x = build(), torch.randn(2, 33, width, requires_grad=True)
    exact = copy.deepcopy(own).double()(x.double())
    fuse(own)
    wide, out = saved_bytes(own, x)
    assert out.dtype == torch.float32
    error = relative(out, exact)
    fuse(own, residual_dtype=torch.bfloat16)
    narrow, out = saved_bytes(own, x)
    assert out.dtype == torch.bfloat16
    assert narrow < 0.9 * wide
    assert relative(out, exact) < 0.02
    assert relative(out, exact) > error
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in own.parameters() if p.grad is not None)
    assert own(x).dtype == torch.float32  # without autocast the option changes nothing
    assert saved_bytes(copy.deepcopy(own), x)[1].dtype == torch.bfloat16
    fuse(own)
    assert saved_bytes(own, x)[1].dtype == torch.float32


@pytest.mark.parametrize("bad", ["bfloat16", 16, torch.int8, True])
def test_residual_dtype_is_a_floating_dtype(bad):
    with pytest.raises(TypeError, match="residual_dtype: expected None or a floating dtype"):
        fuse(Transformer(16, 1, 2, 8), residual_dtype=bad)
