"""The block operators of the CUDA backend, put together on the CPU.

The project's kernels run in the emulator, behind the C interface that the library has; a plain loop stands in for
cuBLASLt, which is left for a GPU to show.
"""

import pytest
import torch

from crate_kernels import ops
from crate_kernels.agreement import judge, relative
from crate_kernels.ops.crate_layer import cuda as crate_layer
from crate_kernels.ops.ista_block import cuda as ista_block
from crate_kernels.ops.ista_step import cuda as ista_step
from crate_kernels.ops.mssa_block import cuda as mssa_block
from crate_kernels.ops.subspace_attention import cuda as attention

from . import budget

pytestmark = pytest.mark.usefixtures("emulated")


def normal(*shape, spread=1.0, seed=0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def by_torch(operator, tensors, grad, dtype, **options):
    """The reference's output and gradients in ``dtype``."""
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    out = operator(*leaves, **options, backend="reference")
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(dtype))]


def compare(got, operator, tensors, grad, **options):
    dtype = got[0].dtype
    exact = by_torch(operator, tensors, grad, torch.float64, **options)
    reference = by_torch(operator, tensors, grad, dtype, **options)
    assert len(got) == len(exact)
    for g, e, r in zip(got, exact, reference, strict=True):
        assert g.shape == e.shape
        assert g.dtype == dtype
        budget.check(g, e, r)


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@DTYPES
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 24, 77])
def test_ista_step(rows, folded, dtype):
    x, weight, grad = (
        t.to(dtype) for t in (normal(rows, 24), normal(24, 24, spread=0.2, seed=1), normal(rows, 24, seed=2))
    )
    known = ista_step.fold(weight) if folded else None
    out = ista_step.forward(x, weight, known, 0.1, 0.1)
    got = [out, *ista_step.backward(grad, x, weight, known, out, 0.1)]
    compare(got, ops.ista_step, (x, weight), grad, step_size=0.1, lambd=0.1)


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_ista_block(rows, dtype):
    z, weight, grad = (
        t.to(dtype) for t in (normal(rows, 40), normal(40, 40, spread=0.15, seed=1), normal(rows, 40, seed=2))
    )
    gamma, beta = (1 + normal(40, spread=0.1)).to(dtype), normal(40, spread=0.1, seed=3).to(dtype)
    out, mean, rstd = ista_block.forward(z, gamma, beta, weight, None, 0.1, 0.1, 1e-5)
    got = [out, *ista_block.backward(grad, z, gamma, beta, weight, None, out, mean, rstd, 0.1, 1e-5)]
    compare(got, ops.ista_block, (z, gamma, beta, weight), grad, step_size=0.1, lambd=0.1)


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["plain", "no-bias", "identity", "step", "lengths"])
def test_mssa_block(form, causal, dtype):
    heads, width = (1, 32) if form == "identity" else (2, 16)
    batch, tokens, d = 2, 37, 32 if form == "identity" else 48
    z, grad = normal(batch, tokens, d).to(dtype), normal(batch, tokens, d, seed=2).to(dtype)
    gamma, beta = (1 + normal(d, spread=0.1)).to(dtype), normal(d, spread=0.1, seed=3).to(dtype)
    u = normal(heads * width, d, spread=d**-0.5).to(dtype)
    out_weight = None if form == "identity" else normal(d, heads * width, spread=0.2, seed=5).to(dtype)
    out_bias = None if form in ("identity", "no-bias") else normal(d, spread=0.1, seed=6).to(dtype)
    lengths = torch.tensor([11, 37]) if form == "lengths" else None
    step = 0.5 if form == "step" else 1.0
    scale = width**-0.5
    tensors = (z, gamma, beta, u, out_weight, out_bias)
    out, *saved = mssa_block.forward(*tensors, lengths, heads, scale, causal, step, 1e-5)
    gradients = mssa_block.backward(grad, *tensors, lengths, *saved, scale, causal, step, 1e-5)
    got = [out, *(g for g in gradients if g is not None)]
    assert [g is None for g in gradients[4:]] == [t is None for t in tensors[4:]]
    compare(got, ops.mssa_block, tensors, grad, heads=heads, lengths=lengths, causal=causal, step_size=step)


@DTYPES
@pytest.mark.parametrize("form", ["plain", "identity", "few rows", "lengths, causal"])
@pytest.mark.parametrize("operator", [ops.mssa_block, ops.ista_block, ops.ista_step, ops.crate_layer])
def test_under_autocast_the_stream_stays_in_float32(operator, form, dtype, monkeypatch):
    """The output, and the stream's gradient where no ReLU follows, err at most 1.3 times as much as the reference's."""
    for module in (attention, mssa_block, ista_block, ista_step, crate_layer):
        monkeypatch.setattr(module, "why_not", lambda *_: None)
    (batch, tokens), d = (1, 29) if form == "few rows" else (2, 65), 64
    z, grad = 2 * normal(batch, tokens, d), normal(batch, tokens, d, seed=2)
    norm = 1 + normal(d, spread=0.1), normal(d, spread=0.1, seed=3)
    u, out = normal(d, d, spread=d**-0.5), (normal(d, d, spread=0.2, seed=5), normal(d, spread=0.1, seed=6))
    attends = dict(heads=2)
    if form == "identity":
        attends, out = dict(heads=1), (None, None)
    elif form == "lengths, causal":
        attends |= dict(lengths=torch.tensor([11, 65]), causal=True)
    weight = normal(d, d, spread=d**-0.5, seed=7)
    tensors, options = {
        ops.mssa_block: ((z, *norm, u, *out), attends),
        ops.ista_block: ((z, *norm, weight), {}),
        ops.ista_step: ((z, weight), {}),
        ops.crate_layer: ((z, *norm, u, *out, *norm, weight), attends),
    }[operator]
    tensors = [None if t is None else t.float() for t in tensors]

    def run(backend, kind, autocast):
        leaves = [None if t is None else t.to(kind).requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype, enabled=autocast):
            result = operator(*leaves, **options, backend=backend)
        return [result, *torch.autograd.grad(result, [t for t in leaves if t is not None], grad.to(kind))]

    exact = run("reference", torch.float64, False)
    reference, got = run("reference", torch.float32, True), run("cuda", torch.float32, True)
    assert all(g.dtype == torch.float32 for g in got)
    verdict = judge(got, exact, reference, dtype, kinks=operator is not ops.mssa_block)
    assert verdict.passed, verdict.detail
    for index in (0, 1) if operator is ops.mssa_block else (0,):
        assert relative(got[index], exact[index]) <= 1.3 * relative(reference[index], exact[index])


def test_float32_norms_beside_bfloat16_rows():
    z, weight = normal(9, 16).bfloat16(), normal(16, 16, spread=0.2).bfloat16()
    gamma, beta = 1 + normal(16, spread=0.1).float(), normal(16, spread=0.1).float()
    out, mean, rstd = ista_block.forward(z, gamma, beta, weight, None, 0.1, 0.1, 1e-5)
    dz, dgamma, dbeta, dweight = ista_block.backward(out, z, gamma, beta, weight, None, out, mean, rstd, 0.1, 1e-5)
    assert (dz.dtype, dgamma.dtype, dbeta.dtype, dweight.dtype) == (z.dtype, torch.float32, torch.float32, z.dtype)
    # torch refuses operators whose outputs share memory.
    gradients = (dz, dgamma, dbeta, dweight)
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


def test_strided_heads():
    w = normal(2, 3, 19, 32).bfloat16().transpose(1, 2)  # (B, N, H, p), heads outside tokens
    for given in (w, w[..., 1:17]):  # the second is not aligned: copied
        o, lse = attention.forward(given, None, None, 0.2, False)
        expected, expected_lse = attention.forward(given.contiguous(), None, None, 0.2, False)
        assert torch.equal(o, expected)
        assert torch.equal(lse, expected_lse)
        dw, _ = attention.backward(
            o.transpose(1, 2).contiguous().transpose(1, 2), given, None, None, o, lse, 0.2, False
        )
        expected_dw, _ = attention.backward(o, given.contiguous(), None, None, o, lse, 0.2, False)
        assert torch.equal(dw, expected_dw)


def test_nothing_to_do():
    empty = torch.empty(0, 16, dtype=torch.bfloat16)
    weight, vector = torch.eye(16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    out = ista_step.forward(empty, weight, None, 0.1, 0.1)
    assert out.shape == (0, 16)
    dx, dweight = ista_step.backward(empty, empty, weight, None, out, 0.1)
    assert dx.shape == (0, 16)
    assert not dweight.any()
    parameters = (vector, vector, weight, weight, vector)
    out, *saved = mssa_block.forward(empty.view(0, 5, 16), *parameters, None, 1, 0.25, False, 1.0, 1e-5)
    assert out.shape == (0, 5, 16)
    dz, *gradients = mssa_block.backward(out, out, *parameters, None, *saved, 0.25, False, 1.0, 1e-5)
    assert dz.shape == out.shape
    assert not any(g.any() for g in gradients)


def test_saved_bytes_of_a_block():
    # Design, section 3.5: per block z, w, o and z' and scalars a row; nothing of size N x N. 9 bytes a channel in bf16.
    tokens, d, heads = 197, 64, 2
    z, u = normal(1, tokens, d).bfloat16(), normal(d, d, spread=d**-0.5).bfloat16()
    gamma = torch.ones(d, dtype=torch.bfloat16)
    out, *saved = mssa_block.forward(z, gamma, gamma, u, u, gamma, None, heads, 32**-0.5, False, 1.0, 1e-5)
    _, *saved2 = ista_block.forward(out.flatten(0, 1), gamma, gamma, u, None, 0.1, 0.1, 1e-5)
    kept = [z, *saved, out, *saved2]  # what ISTA returns is the next block's z
    assert sum(t.nbytes for t in kept) <= 9 * tokens * d
