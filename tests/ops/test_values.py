"""Values and gradients of every operator: eager compared with the reference, and both with finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from crate_kernels import ops
from crate_kernels.ops.subspace_attention import blocked
from crate_kernels.ops.subspace_attention import eager as eager_attention

from . import oracle
from .cases import CASES, SMALL


@pytest.mark.parametrize("name", CASES)
def test_eager_equals_reference_in_float64(name):
    case = CASES[name]
    for got, expected in zip(case.run(backend="eager"), case.run(backend="reference"), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].tensors[0].numel()])
def test_eager_is_as_exact_as_the_reference_in_each_dtype(name, dtype):
    oracle.check(CASES[name], dtype, "eager")


@pytest.mark.parametrize("lengths", [None, torch.tensor([40, 17, 33])], ids=["all tokens", "lengths"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_huge_scores_stays_in_bounds(dtype, causal, lengths):
    oracle.check_huge_scores("eager", dtype, causal, lengths)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name, backend):
    case = CASES[name]
    leaves = [None if t is None else t.clone().requires_grad_() for t in case.tensors]
    # Random directions are enough here: the test above compares every element with the reference.
    assert gradcheck(lambda *tensors: case.operator(*tensors, **case.options, backend=backend), leaves, fast_mode=True)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_bitwise_repeatable(name):
    case = CASES[name].to(torch.float32)
    for first, second in zip(case.run(backend="eager"), case.run(backend="eager"), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, [3, 11]])
def test_blocked_attention_for_other_devices(causal, lengths, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 2 * 2 * 11 * 4)  # blocks of 4 of the 11 queries
    w, value, grad = torch.randn(3, 2, 11, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lengths = None if lengths is None else torch.tensor(lengths)
    leaves = w.clone().requires_grad_(), value.clone().requires_grad_()
    expected = ops.subspace_attention(*leaves, causal=causal, lengths=lengths, scale=0.4, backend="reference")
    gradients = torch.autograd.grad(expected, leaves, grad)
    o, lse = blocked.blocked_forward(w, value, lengths, 0.4, causal)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    _, flash_lse = eager_attention.forward(w, value, lengths, 0.4, causal)
    torch.testing.assert_close(lse, flash_lse, rtol=1e-10, atol=1e-10)
    for got, want in zip(
        blocked.blocked_backward(grad, w, value, lengths, o, lse, 0.4, causal), gradients, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["attention-N2", "ista-50x8", "ista-7x8", "overcomplete-7x8", "mssa-plain"])
def test_not_finite_values_reach_the_same_outputs(name, bad):
    case = CASES[name]
    tensors = list(case.tensors)
    tensors[0] = tensors[0].clone()
    tensors[0].flatten()[1] = bad
    outputs = [case.operator(*tensors, **case.options, backend=b) for b in ("reference", "eager")]
    reference, eager = (o.flatten(1) if o.dim() > 2 else o for o in outputs)
    # Folding may move an inf or NaN within its row. The set of rows with such values stays the same.
    assert torch.equal(~reference.isfinite().all(dim=-1), ~eager.isfinite().all(dim=-1))


def test_a_given_folded_matrix_changes_neither_values_nor_gradients():
    for name in ("ista-7x8", "ista-50x8", "ista_block-1x3x12"):
        case = CASES[name]
        folded = ops.fold(case.tensors[-1])
        for got, expected in zip(case.run(backend="eager", folded=folded), case.run(backend="reference"), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
