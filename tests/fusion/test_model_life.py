"""What people do with a fused model: copies, pickles, conversion, compilation, data parallelism, autocast."""

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
from torch import nn

from crate_kernels import fuse, ops, unfuse

from .compare import VISION, check, double, outcome
from .twins import GPT, MAE, AlphaTransformer, Vision


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


@pytest.mark.parametrize("build", [Vision, MAE, AlphaTransformer, GPT])
def test_compile(build):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = double(build())
    x = torch.randn(2, 9, 12 if build is Vision else 16, dtype=torch.float64)
    want = outcome(model, x)
    fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = outcome(compiled, x)
    check({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


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


def test_second_derivatives_are_those_of_the_model_before():
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)

    def second():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.sum(), x)[0]

    expected = second()
    fuse(model)
    torch.testing.assert_close(second(), expected)


def test_data_parallel(tmp_path):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch.distributed is not built in")
    store = dist.FileStore(os.fspath(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = double(Vision())
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        want = outcome(model, x)
        fuse(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = wrapped(x)
            weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            (out * weights).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-10, atol=1e-10)
    finally:
        dist.destroy_process_group()


def test_autocast():
    torch.manual_seed(0)
    model = Vision(depth=4)
    x = torch.randn(2, 9, 12)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        own = model(x)
        fuse(model)
        fused = model(x)
    # The operators compute in autocast's dtype throughout, the public code keeps its residual in float32: the budget
    # is one rounding of each half-step's output on top.
    rounding = 2 * 4 * 2.0**-9 * exact.abs().max()
    assert (fused - exact).abs().max() <= 2 * (own - exact).abs().max() + rounding
