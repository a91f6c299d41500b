"""LayerNorm and its backward, thread for thread on the CPU, against float64."""

import pytest
import torch
from torch.nn.functional import layer_norm

from . import budget
from .emulator import words

SHAPES = [(1, 8), (3, 192), (4, 200), (9, 256), (13, 576), (5, 1280), (2, 2048)]


def inputs(dtype, rows, columns, count):
    generator = torch.Generator().manual_seed(rows + columns)
    tensors = torch.randn(count, rows, columns, generator=generator).to(dtype)
    weight, bias = torch.randn(2, columns, generator=generator) * 0.1
    return *tensors, 1 + weight, bias


def name(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_forward(simt, rows, columns, dtype):
    z, grad, out, weight, bias = inputs(dtype, rows, columns, 3)
    z = z + 3  # a mean to take away
    x, gated = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
    mean, rstd = torch.full((2, rows), torch.nan).unbind()
    counters = simt.module.layer_norm_forward(
        name(dtype), words(z), weight.numpy(), bias.numpy(), words(x), mean.numpy(), rstd.numpy(),
        words(grad), words(out), words(gated), 1e-5, 2,
    )  # fmt: skip
    exact = layer_norm(z.double(), (columns,), weight.double(), bias.double(), 1e-5)
    budget.check(x, exact, layer_norm(z.float(), (columns,), weight, bias, 1e-5).to(dtype))
    torch.testing.assert_close(mean.double(), z.double().mean(1), rtol=1e-5, atol=1e-5)
    variance = z.double().var(1, correction=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=1e-5)
    assert torch.equal(gated, torch.where(out > 0, grad, 0))
    # z, grad and out once, the parameters once a block that has rows.
    blocks = 2
    assert counters.global_bytes_read == 3 * z.nbytes + blocks * 2 * weight.nbytes
    assert counters.global_bytes_written == 2 * z.nbytes + 2 * mean.nbytes


def test_gate_lets_the_gradient_of_nan_pass(simt):
    z, grad, out, weight, bias = inputs(torch.bfloat16, 1, 8, 3)
    out[0, :3] = torch.tensor([torch.nan, 0.0, -0.0])
    x, gated = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan)
    simt.module.layer_norm_forward(
        "bfloat16", words(z), weight.numpy(), bias.numpy(), words(x), None, None, words(grad), words(out), words(gated),
        1e-5, 1,
    )  # fmt: skip
    assert torch.equal(gated, torch.ops.aten.threshold_backward(grad, out, 0))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_backward(simt, rows, columns, dtype, residual):
    z, dx, upper, weight, bias = inputs(dtype, rows, columns, 3)
    mean = z.double().mean(1).float()
    rstd = (z.double().var(1, correction=0) + 1e-5).rsqrt().float()
    sums = 3 if residual else 2
    dz, partial = torch.full_like(z, torch.nan), torch.full((3, sums, columns), torch.nan)
    total = torch.full((sums, columns), torch.nan)
    counters = simt.module.layer_norm_backward(
        name(dtype), words(dx), words(z), mean.numpy(), rstd.numpy(), weight.numpy(),
        words(upper) if residual else None, words(dz), partial.numpy(),
    )  # fmt: skip
    simt.module.reduce_rows(partial.view(3, -1).numpy(), total.view(-1).numpy())

    def gradients(to):
        leaves = [t.to(to).requires_grad_() for t in (z, weight, bias)]
        out = layer_norm(leaves[0], (columns,), *leaves[1:], 1e-5)
        dz, dweight, dbias = torch.autograd.grad(out, leaves, dx.to(to))
        return dz + upper.to(to) if residual else dz, dweight, dbias

    exact, reference = gradients(torch.float64), gradients(torch.float32)
    budget.check(dz, exact[0], reference[0].to(dtype))
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
