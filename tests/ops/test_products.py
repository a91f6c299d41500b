"""The eager backend's matrix products compared with float64, for both libraries and for operands of any layout."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from crate_kernels.ops import products

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SHAPES = [(0, 8, 8), (3, 5, 7), (64, 64, 64), (197, 384, 384), (1576, 192, 100), (255, 127, 333), (1, 2100, 2100)]
LAYOUTS = {
    "rows": lambda t: t,
    "columns": lambda t: t.T.contiguous().T,
    "strided": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
}


@pytest.fixture(params=["torch", "onednn"], autouse=True)
def library(request, monkeypatch):
    if request.param == "onednn" and not ONEDNN:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "FASTER_WITH_ONEDNN", request.param == "onednn")
    return request.param


def operands(m, k, n, dtype=torch.float32):
    generator = torch.Generator().manual_seed(m + k + n)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((m, k), (k, n), (m, n))]


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, first, second):
    a, b, start = operands(*shape)
    a, b = LAYOUTS[first](a), LAYOUTS[second](b)
    # The error of k rounded products that are summed one after another.
    bound = shape[1] * torch.finfo(torch.float32).eps * (a.abs().double() @ b.abs().double())
    kept = start.clone()
    for alpha in (1.0, -0.3):
        exact = alpha * (a.double() @ b.double())
        assert ((products.multiply(a, b, alpha=alpha) - exact).abs() <= bound).all()
        for layout in LAYOUTS.values():
            got = products.multiply(a, b, layout(start), alpha)
            rounding = 2 * torch.finfo(torch.float32).eps * (start + exact).abs()
            assert ((got - (start + exact)).abs() <= bound + rounding).all()
            assert got.dtype == torch.float32
    assert torch.equal(start, kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_torchs_own(dtype):
    a, b, start = operands(256, 192, 128, dtype)
    assert torch.equal(products.multiply(a, b, start, -0.5), torch.addmm(start, a, b, alpha=-0.5))


def test_start_may_be_an_operand():
    a, _, _ = operands(197, 197, 197)
    exact = a.double() - a.double() @ a.double().T
    torch.testing.assert_close(products.multiply(a, a.T, a, -1).double(), exact, rtol=1e-5, atol=1e-4)


def test_the_users_switch_is_obeyed(monkeypatch):
    a, b, start = operands(197, 384, 384)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.equal(products.multiply(a, b, start, 0.5), torch.addmm(start, a, b, alpha=0.5))


def test_onednn_runs_where_it_is_the_faster_one(library):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        products.multiply(*operands(512, 384, 384))
    called = {event.key for event in profiler.key_averages()}
    assert ("mkldnn::_linear_pointwise" in called) == (library == "onednn")
    assert ("aten::addmm" in called) == (library == "torch")


def test_long_sums_keep_their_digits(library):
    if library == "onednn" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("oneDNN's other kernels, which are not taken, add up in other chains")
    a, b, _ = operands(384, 3072, 384)
    exact = a.double() @ b.double()
    off, torchs = ((product - exact).norm().item() for product in (products.multiply(a, b), a @ b))
    assert off < 2 * torchs  # one chain of sums in oneDNN has 2.2 times the error
