"""Typical uses of a fused model: copies, pickles, conversion, compilation, activation checkpointing."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from crate_kernels import fuse, ops, unfuse

from .compare import VISION, check, double, outcome
from .twins import CODE_BASES, GPT, Vision


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("build", [Vision, GPT])
def test_copies_are_fused_models_of_their_own(build, duplicate, calls):
    torch.manual_seed(0)
    model = double(build())
    x = torch.randn(2, 9, 12 if build is Vision else 16, dtype=torch.float64)
    want = outcome(model, x)
    fuse(model)
    other = duplicate(model)
    assert calls.of(other, x) == VISION
    check(outcome(other, x), want)
    if duplicate is not copy.copy:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        check(outcome(other, x), want)
    unfuse(other)
    assert calls.of(other, x) == {}
    check(outcome(other, x), want)


def test_conversion_and_loading(calls):
    torch.manual_seed(0)
    model, source = Vision(), double(Vision())
    fuse(model)
    model.double()
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    check(outcome(model, x), outcome(source, x))
    assert calls.of(model, x) == VISION
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_built_on_the_meta_device():
    with torch.device("meta"):
        model = Vision()
        assert len(fuse(model).fused) == 9
    model.to_empty(device="cpu")
    model.load_state_dict((source := Vision()).state_dict())
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(model(x), source(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_fused_in_any_mode(mode):
    model = Vision()
    with mode():
        assert len(fuse(model).fused) == 9
    model(torch.randn(2, 9, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_backend_request_does_not_disturb_recognition():
    with ops.use_backend("reference"):
        assert len(fuse(Vision()).fused) == 9


@pytest.mark.parametrize("name", CODE_BASES)
def test_compile(name):
    torch._dynamo.reset()
    build, width = CODE_BASES[name]
    torch.manual_seed(0)
    model = double(build(depth=1))
    x = torch.randn(2, 9, width, dtype=torch.float64)
    want = outcome(model, x)
    fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = outcome(compiled, x)
    check({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", CODE_BASES)
def test_activation_checkpointing(name, reentrant, calls):
    build, width = CODE_BASES[name]
    torch.manual_seed(0)
    model = double(build())
    x = torch.randn(2, 9, width, dtype=torch.float64)
    want = outcome(model, x)
    fuse(model)
    leaf = x.clone().requires_grad_()
    once = dict(calls.of(model, x))
    out = checkpoint(model, leaf, use_reentrant=reentrant)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    calls.counts = {}
    (out * weights).sum().backward()
    assert calls.counts == once  # the backward runs the same operators again
    got = {name: p.grad for name, p in model.named_parameters()}
    check({"out": out.detach(), "x": leaf.grad, **got}, want)


def test_compile_with_hooks():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    model.transformer.layers[0][0].fn.qkv.register_forward_hook(lambda m, args, out: out * 0.5)
    model.transformer.layers[1][1].fn.register_forward_hook(lambda m, args, out: out * 0.5)
    want = model(x)
    fuse(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
