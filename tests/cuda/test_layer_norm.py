"""LayerNorm and its backward, thread for thread on the CPU, against float64."""

import pytest
import torch
from torch.nn.functional import layer_norm

from . import budget
from .emulator import elements, words

SHAPES = [(1, 8), (3, 192), (4, 200), (9, 256), (13, 576), (5, 1280), (2, 2048)]


def inputs(dtype, rows, columns, count):
    generator = torch.Generator().manual_seed(rows + columns)
    tensors = torch.randn(count, rows, columns, generator=generator).to(dtype)
    weight, bias = torch.randn(2, columns, generator=generator) * 0.1
    return *tensors, 1 + weight, bias


def name(dtype):
    return str(dtype).removeprefix("torch.")


FORMATS = pytest.mark.parametrize(
    ("dtype", "stream"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=["bf16", "fp16", "bf16, float32 stream", "fp16, float32 stream"],
)
"""The dtype of the products' operands, and that of the residual stream."""


@FORMATS
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_forward(simt, rows, columns, dtype, stream):
    z, grad, out, weight, bias = inputs(stream, rows, columns, 3)
    z = z + 3  # a mean to take away
    x, gated = torch.full((2, rows, columns), torch.nan, dtype=dtype).unbind()
    wide = torch.full((2, rows, columns), torch.nan) if stream != dtype else (None, None)
    mean, rstd = torch.full((2, rows), torch.nan).unbind()

    def run(known):
        return simt.module.layer_norm_forward(
            name(dtype), elements(z), weight.numpy(), bias.numpy(), words(x), elements(wide[0]), mean.numpy(),
            rstd.numpy(), elements(grad), elements(out), words(gated), elements(wide[1]), 1e-5, 2, known,
        )  # fmt: skip

    def check():
        exact = layer_norm(z.double(), (columns,), weight.double(), bias.double(), 1e-5)
        reference = layer_norm(z.float(), (columns,), weight, bias, 1e-5)
        budget.check(x, exact, reference.to(dtype))
        expected = torch.where(out > 0, grad, 0)
        assert torch.equal(gated, expected.to(dtype))
        if stream != dtype:
            budget.check(wide[0], exact, reference)
            assert torch.equal(wide[1], expected)

    counters = run(known=False)
    check()
    torch.testing.assert_close(mean.double(), z.double().mean(1), rtol=1e-5, atol=1e-5)
    variance = z.double().var(1, correction=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=1e-5)
    # z, grad and out once, the parameters once a block that has rows.
    blocks = 2
    written = 2 * x.nbytes + sum(t.nbytes for t in wide if t is not None)
    assert counters.global_bytes_read == 3 * z.nbytes + blocks * 2 * weight.nbytes
    assert counters.global_bytes_written == written + 2 * mean.nbytes

    x.fill_(torch.nan), gated.fill_(torch.nan)
    counters = run(known=True)
    check()
    assert counters.global_bytes_written == written
    assert counters.barriers == 0  # nothing is summed


def test_gate_lets_the_gradient_of_nan_pass(simt):
    z, grad, out, weight, bias = inputs(torch.bfloat16, 1, 8, 3)
    out[0, :3] = torch.tensor([torch.nan, 0.0, -0.0])
    x, gated = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
    simt.module.layer_norm_forward(
        "bfloat16", words(z), weight.numpy(), bias.numpy(), words(x), None, *torch.zeros(2, 1).numpy(), words(grad),
        words(out), words(gated), None, 1e-5, 1,
    )  # fmt: skip
    assert torch.equal(gated, torch.ops.aten.threshold_backward(grad, out, 0))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "float32"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_backward(simt, rows, columns, stream, residual):
    z, dx, upper, weight, bias = inputs(stream, rows, columns, 3)
    mean = z.double().mean(1).float()
    rstd = (z.double().var(1, correction=0) + 1e-5).rsqrt().float()
    sums = 3 if residual else 2
    dz, partial = torch.full_like(z, torch.nan), torch.full((3, sums, columns), torch.nan)
    total = torch.full((sums, columns), torch.nan)
    counters = simt.module.layer_norm_backward(
        "float16" if stream == torch.float16 else "bfloat16", elements(dx), elements(z), mean.numpy(), rstd.numpy(),
        weight.numpy(), elements(upper) if residual else None, elements(dz), partial.numpy(),
    )  # fmt: skip
    for got, part in zip(total, partial.unbind(1), strict=True):
        simt.module.reduce_rows(part.contiguous().numpy(), got.numpy())

    def gradients(to):
        leaves = [t.to(to).requires_grad_() for t in (z, weight, bias)]
        out = layer_norm(leaves[0], (columns,), *leaves[1:], 1e-5)
        dz, dweight, dbias = torch.autograd.grad(out, leaves, dx.to(to))
        return dz + upper.to(to) if residual else dz, dweight, dbias

    exact, reference = gradients(torch.float64), gradients(torch.float32)
    if stream == torch.float32:
        torch.testing.assert_close(dz.double(), exact[0], rtol=1e-4, atol=1e-5)
    else:
        budget.check(dz, exact[0], reference[0].to(stream))
    # The sums are float32 throughout; with the row statistics rounded once, by a few units in the last place.
    for got, expected in zip(total, (exact[1], exact[2], upper.double().sum(0)), strict=False):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5)
    read = 3 if residual else 2
    blocks_with_rows = 3
    assert counters.global_bytes_read <= read * z.nbytes + blocks_with_rows * weight.nbytes + 2 * 4 * rows * (
        columns // 8
    )
    assert counters.global_bytes_written == dz.nbytes + partial.nbytes


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (100, 64), (513, 40)])
def test_reduce_rows(simt, rows, columns):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    out = torch.full((columns,), torch.nan)
    simt.module.reduce_rows(values.numpy(), out.numpy())
    torch.testing.assert_close(out.double(), values.double().sum(0), rtol=1e-5, atol=1e-5)
