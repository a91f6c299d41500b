"""Fused models under torch's transforms: functorch, forward-mode derivatives, second derivatives, symbolic tracing."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from crate_kernels import fuse

from .compare import double
from .twins import CODE_BASES, Transformer, Vision


@pytest.fixture(autouse=True)
def _differentiable_attention():
    """Replace torch's flash attention, which has neither forward-mode nor second derivatives, by torch's plain
    attention."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def pair(name):
    """A twin, its fused copy, and tokens for both."""
    build, width = CODE_BASES[name]
    torch.manual_seed(0)
    own = double(build(depth=1))
    fused = copy.deepcopy(own)
    fuse(fused)
    return own, fused, torch.randn(3, 5, width, dtype=torch.float64)


def loss(model):
    return lambda parameters, x: torch.func.functional_call(model, parameters, (x,)).square().sum()


@pytest.mark.parametrize("name", CODE_BASES)
def test_functional_transforms(name):
    own, fused, x = pair(name)
    fused(x)
    parameters = {n: p.detach() for n, p in own.named_parameters()}
    transforms = (
        lambda m: torch.func.vmap(lambda t: m(t[None])[0])(x),
        lambda m: torch.func.grad(loss(m))(parameters, x),
        lambda m: torch.func.vmap(torch.func.grad(loss(m)), (None, 0))(parameters, x[:, None]),
        lambda m: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
        lambda m: torch.func.jacrev(m)(x[:1, :2]),
        lambda m: torch.func.functional_call(m, {n: 1.5 * p for n, p in parameters.items()}, (x,)),
    )
    for transform in transforms:
        torch.testing.assert_close(transform(fused), transform(own), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CODE_BASES)
def test_derivatives_of_other_kinds(name):
    def forward_mode(model):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    def second(model):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [leaf, *model.parameters()], allow_unused=True)

    own, fused, x = pair(name)
    for derivative in (forward_mode, second):
        for got, want in zip(derivative(fused), derivative(own), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_symbolic_tracing_sees_the_own_forward():
    torch.manual_seed(0)
    model = double(nn.Sequential(Transformer(16, 2, 2, 8)))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    want = model(x)
    fuse(model)
    model(x)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), want)


def test_functional_calls_use_the_given_weights(calls):
    own, fused, x = pair("vision")
    parameters = {n: 1.5 * p.detach() for n, p in own.named_parameters()}
    got = calls.of(lambda: torch.testing.assert_close(
        torch.func.functional_call(fused, parameters, (x,)), torch.func.functional_call(own, parameters, (x,))
    ))  # fmt: skip
    assert got == {"crate_layer": 1}


def test_other_layouts_and_shapes_are_the_models_own():
    torch.manual_seed(0)
    model = double(Vision()).transformer
    own = copy.deepcopy(model)
    fuse(model)
    for x in (torch.randn(0, 5, 16), torch.randn(2, 0, 16), torch.randn(5, 2, 16).transpose(0, 1)):
        torch.testing.assert_close(model(x.double()), own(x.double()))
    for bad in (torch.randn(5, 16).double(), torch.randn(2, 5, 15).double(), torch.randn(2, 5, 16)):
        with pytest.raises(Exception) as theirs:
            own(bad)
        with pytest.raises(type(theirs.value)):
            model(bad)
