"""The shared kernels alone. The backend's choice of a kernel, its error messages and its settings."""

import itertools
import os
import subprocess
import sys

import numpy
import pytest
import torch
import triton
from torch.library import opcheck
from torch.nn.functional import layer_norm

from crate_kernels import ops
from crate_kernels.agreement import judge, relative
from crate_kernels.nn import CrateBlock, prepare_for_inference
from crate_kernels.ops import backends
from crate_kernels.ops.ista_block import triton as ista_block
from crate_kernels.ops.subspace_attention import triton as attention
from crate_kernels.ops.triton_kernels import configurations, launch
from crate_kernels.ops.triton_kernels.layer_norm import layer_norm_backward
from crate_kernels.ops.triton_kernels.product import fold_norm, product

from ..ops.cases import CASES
from ..ops.oracle import DEVICE
from ..ops.test_registration import OPERATORS, schema_arguments


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def close(got, expected, eps=2e-6):
    torch.testing.assert_close(got.double(), expected, rtol=eps, atol=eps * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (33, 17, 5), (64, 32, 32), (70, 20, 40)])
def test_product_with_every_epilogue(rows, inner, columns):
    a, b = normal(rows, inner), normal(columns, inner).T
    bias, residual, gate = normal(columns), normal(rows, columns, seed=1), normal(rows, columns, seed=2)
    wide = [t.double() for t in (a, b, bias, residual, gate)]
    plain = wide[0] @ wide[1]
    close(product(a, b)[0], plain)
    close(product(a, b, bias=bias, alpha=0.5, residual=residual)[0], 0.5 * (plain + wide[2]) + wide[3])
    full = (-0.3 * plain + 2.0 * wide[3] - 0.1).relu()
    close(product(a, b, alpha=-0.3, residual=residual, beta=2.0, shift=0.1, relu=True)[0], full)
    close(product(a, b, gate=gate)[0], plain * (wide[4] > 0))


@pytest.fixture(params=[False, True], ids=["as on most devices", "as on Hopper"])
def flip(request, monkeypatch):
    monkeypatch.setattr(launch, "wgmma", lambda _: request.param)
    configurations.forget()
    yield
    configurations.forget()


@pytest.mark.usefixtures("flip")
def test_product_gates_its_rows():
    a, b, gate = normal(40, 24), normal(24, 24, seed=1), normal(40, 24, seed=2)
    result = product(a, b, alpha=0.1, residual=a, gate_rows=gate)
    expected = a * (gate > 0)
    assert torch.equal(result.gated, expected)
    close(result.out, expected.double() + 0.1 * expected.double() @ b.double())


def test_product_takes_strided_rows():
    a, b = normal(40, 48)[:, :20], normal(20, 12)
    close(product(a, b)[0], a.double() @ b.double())
    close(product(normal(20, 40).T, b)[0], normal(20, 40).T.double() @ b.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.usefixtures("flip")
def test_product_behind_a_norm(dtype, offset):
    z = normal(45, 37, dtype=dtype) + offset
    matrix, gamma, beta = normal(37, 21, dtype=dtype), 1 + 0.2 * normal(37), normal(37, seed=1)
    out, mean, rstd, *_ = product(z, fold_norm(matrix, gamma, beta, 1e-5))
    wide = z.double()
    close(mean, wide.mean(1))
    close(rstd, (wide.var(1, correction=0) + 1e-5).rsqrt(), eps=2e-5 if offset else 2e-6)
    x = layer_norm(wide, (37,), gamma.double(), beta.double(), 1e-5)
    exact = x @ matrix.double()
    reference = layer_norm(z, (37,), gamma.to(dtype), beta.to(dtype), 1e-5) @ matrix
    verdict = judge([out], [exact], [reference], dtype, kinks=False)
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize("columns", [3, 16, 37])
def test_a_product_measures_the_rows_that_it_writes_for_the_next_norm(columns):
    rows = product(normal(45, 20), normal(20, columns), residual=normal(45, columns) + 7, measure=True)
    norm = fold_norm(normal(columns, 21), 1 + 0.2 * normal(columns), normal(columns, seed=1), 1e-5)
    given = product(rows.out, norm, statistics=rows.statistics)
    taken = product(rows.out, norm)
    wide = rows.out.double()
    close(given.mean, wide.mean(1))
    close(given.rstd, (wide.var(1, correction=0) + 1e-5).rsqrt())
    close(given.out, taken.out.double())


def test_tf32_behind_a_norm_is_as_exact_as_tf32_of_normalized_rows(monkeypatch):
    """A row's mean must keep full precision, and one outlier must not change the value that centers a row."""
    z, matrix = normal(40, 768), normal(768, 24, seed=1)
    z[:, 0] += 20
    z += 5
    ones, zeros = torch.ones(768, device=DEVICE), torch.zeros(768, device=DEVICE)
    exact = layer_norm(z.double(), (768,), eps=1e-5) @ matrix.double()
    monkeypatch.setattr(launch, "dot_precision", lambda _: "tf32")
    plain = product(layer_norm(z, (768,), eps=1e-5), matrix).out
    folded = product(z, fold_norm(matrix, ones, zeros, 1e-5)).out
    assert relative(plain, exact) > 1e-4  # the products are those of tf32
    assert relative(folded, exact) < 1.2 * relative(plain, exact)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (50, 24), (600, 8)])
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_backward(rows, width, residual, monkeypatch):
    monkeypatch.setattr("crate_kernels.ops.triton_kernels.layer_norm.PROGRAMS", 4)  # several rows each
    z, grad, weight, bias = normal(rows, width), normal(rows, width, seed=1), 1 + normal(width), normal(width, seed=2)
    extra = normal(rows, width, seed=3) if residual else None
    wide = [t.double().requires_grad_() for t in (z, weight, bias)]
    x = layer_norm(wide[0], (width,), *wide[1:], 1e-5)
    dz, dweight, dbias = torch.autograd.grad(x, wide, grad.double())
    mean = z.double().mean(1)
    rstd = (z.double().var(1, correction=0) + 1e-5).rsqrt()
    got = layer_norm_backward(grad, z, weight, bias, mean.float(), rstd.float(), residual=extra)
    close(got[0], dz + extra.double() if residual else dz, eps=1e-5)
    close(got[1], dweight, eps=1e-5)
    close(got[2], dbias, eps=1e-5)
    close(got[3], x.detach(), eps=1e-5)
    if residual:
        close(got[4], extra.double().sum(0), eps=1e-5)
    else:
        assert got[4] is None


def test_a_column_of_one_value_has_the_norm_of_its_epsilon():
    z = torch.full((5, 8), 3.0, device=DEVICE)
    out, mean, rstd, *_ = product(
        z, fold_norm(normal(8, 4), torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE), 0.25)
    )
    assert torch.equal(mean, z[:, 0])
    assert torch.equal(rstd, torch.full_like(mean, 2.0))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("lengths", [[0, -5], [100, 2**40]])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_out_of_range_stay_in_bounds(lengths, causal):
    """Checking lengths on a GPU would wait for it, so they are not checked. No access may leave the tensors."""
    storage = torch.full((4, 21, 2, 8), float("nan"), device=DEVICE)
    w = storage[1:3]
    w.copy_(normal(2, 21, 2, 8))
    lengths = torch.tensor(lengths, device=DEVICE)
    o, lse = attention.forward(w, None, lengths, 0.3, causal)
    dw, _ = attention.backward(o, w, None, lengths, o, lse, 0.3, causal)
    if lengths[0] > 0:
        full = torch.full_like(lengths, 21)
        assert torch.equal(o, attention.forward(w, None, full, 0.3, causal)[0])
        assert dw.isfinite().all()


@pytest.mark.skipif(not launch.INTERPRETED, reason="takes memory that is only reserved on a CPU")
def test_offsets_within_a_tile_beyond_32_bits():
    """The rows are so far apart that offsets within a tile need more than 32 bits."""
    stride, rows = 1 << 27, 18
    try:
        storage = torch.from_numpy(numpy.zeros(rows * stride, numpy.float16))
    except MemoryError:
        pytest.skip("no 4.5 GiB of address space")
    far = storage.as_strided((rows, 8), (stride, 1))
    near = normal(rows, 8, dtype=torch.float16)
    far.copy_(near)
    forwards = [attention.forward(t.view(1, rows, 1, 8), None, None, 0.3, False) for t in (far, near)]
    assert torch.equal(*(o for o, _ in forwards))
    gamma, beta = normal(8), normal(8, seed=1)
    for one, other in zip(*(fold_norm(t.T, gamma, beta, 1e-5)[3:] for t in (far, near)), strict=True):
        assert torch.equal(one, other)


def test_reasons():
    w = torch.randn(1, 3, 1, 8, device=DEVICE)
    assert attention.why_not(w, None, None, 1.0, False) is None
    assert "not take float64" in attention.why_not(w.double(), None, None, 1.0, False)
    assert "width 8 to 256, not 7" in attention.why_not(w[..., :7], None, None, 1.0, False)
    assert "width 8 to 256, not 257" in attention.why_not(torch.randn(1, 3, 1, 257), None, None, 1.0, False)
    assert "on meta" in launch.why_not(w.to("meta"))
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run these inputs: .* 8192 channels, not 8193"):
        ops.ista_block(
            torch.zeros(1, 8193), torch.ones(8193), torch.ones(8193), torch.zeros(8193, 8193), backend="triton"
        )


def test_without_interpreter_and_gpu_the_reason_says_so():
    code = """
import torch
from crate_kernels.ops.triton_kernels import launch
print(launch.why_not(torch.zeros(1)))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == (
        "Triton kernels need a CUDA or ROCm device, or TRITON_INTERPRET=1; the tensors are on cpu"
    )


def test_interpreted_kernels_are_never_the_automatic_choice_for_cpu_tensors():
    assert "triton" not in backends.AUTOMATIC["cpu"]


def test_float32_is_multiplied_in_full_unless_torch_allows_tf32():
    assert launch.dot_precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert launch.dot_precision(torch.float32) == ("tf32" if torch.version.hip is None else "ieee")
        assert launch.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_configurations_are_overridden_and_restored():
    kind = (torch.device("cpu"), torch.bfloat16, 300, 64)
    with configurations.override("attention_delta", BLOCK_M=128):
        with configurations.override("attention_delta", num_warps=2):
            assert configurations.configuration("attention_delta", *kind) == {"BLOCK_M": 128, "num_warps": 2}
        assert configurations.configuration("attention_delta", *kind)["num_warps"] == 4
    with pytest.raises(ValueError, match="unknown kernel 'attention'"), configurations.override("attention"):
        pass


def test_chained_products_have_no_short_side_where_wgmma_takes_them(monkeypatch):
    """wgmma multiplies at least 64 rows, so every side of its tiles is at least 64."""
    monkeypatch.setattr(launch, "shared_memory", lambda _: configurations.HOPPER)
    shapes = itertools.product(
        launch.DTYPES, ("attention_forward", "attention_backward"), (1, 64, 65, 512, 100_000), range(8, 257)
    )
    with monkeypatch.context() as patch:  # ends before the small tiles do
        patch.setattr(configurations, "_overrides", {})
        for dtype, kernel, rows, width in shapes:
            options = configurations.configuration(kernel, torch.device("cpu"), dtype, rows, width)
            sides = options["BLOCK_M"], options["BLOCK_N"], triton.next_power_of_2(width)
            assert options["BLOCK_M"] < 64 or min(sides) >= 64, (kernel, dtype, rows, width)


def test_every_accepted_shape_has_a_configuration():
    for dtype in launch.DTYPES:
        for kernel in ("attention_forward", "attention_delta", "attention_backward"):
            for rows in (1, 64, 65, 512, 100_000):
                for width in range(8, 257):
                    assert configurations.configuration(kernel, torch.device("cpu"), dtype, rows, width)


def test_a_call_of_a_known_kind_looks_nothing_up(monkeypatch):
    case = CASES["layer-plain"].to(torch.float32)
    tensors = [t.to(DEVICE).requires_grad_() for t in case.tensors]

    def step(factor=1.0):
        out = ops.crate_layer(*(factor * t for t in tensors), **case.options, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    first = step()

    def fail(*_):
        raise AssertionError("looked up again")

    monkeypatch.setattr(configurations, "configuration", fail)
    for module in (attention, sys.modules[product.__module__]):
        monkeypatch.setattr(module, "configuration", fail)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    for one, other in zip(first, step(), strict=True):
        assert torch.equal(one, other)


def test_a_prepared_layer_folds_its_norms_once_and_notices_changed_weights(monkeypatch):
    torch.manual_seed(0)
    block = prepare_for_inference(CrateBlock(24, 3, 8)).to(DEVICE)
    z, folds = normal(2, 20, 24), []
    monkeypatch.setattr(ista_block, "fold", lambda *a, fold=ista_block.fold: folds.append(1) or fold(*a))
    with ops.use_backend("triton"), torch.no_grad():
        first = block(z)
        assert torch.equal(block(z), first)
        assert len(folds) == 1
        for parameter in (
            block.mssa.projection.weight,
            block.mssa_norm.bias,
            block.ista_norm.weight,
            block.ista.weight,
        ):
            parameter.mul_(1.5).add_(0.1)
            got = block(z)
            assert not torch.equal(got, first)
            with ops.use_backend("eager"):
                torch.testing.assert_close(got, block(z), rtol=1e-4, atol=1e-4)
            first = got
        assert len(folds) == 5
        block.mssa.projection.weight.data.mul_(1.5)  # torch does not count this write
        prepare_for_inference(block)
        with ops.use_backend("eager"):
            expected = block(z)
        torch.testing.assert_close(block(z), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["attention-N2", "ista-50x8", "overcomplete-decoupled", "ista_block-2x33x12", "mssa-plain"]
)
def test_opcheck(name):
    case = CASES[name].to(torch.float32)
    *arguments, _ = schema_arguments(case)
    arguments = [a.to(DEVICE).requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    opcheck(OPERATORS[case.operator], (*arguments, "triton"))
