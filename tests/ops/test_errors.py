"""Wrong inputs: the message names the argument, its value and the accepted values."""

import math

import pytest
import torch

from crate_kernels import ops

W = torch.randn(2, 5, 3, 4)
Z, NORM, U, OUT = torch.randn(2, 5, 12), torch.ones(12), torch.randn(12, 12), torch.randn(12, 12)
X, DICTIONARY = torch.randn(5, 6), torch.randn(6, 6)
NESTED = torch.nested.nested_tensor([X, X], layout=torch.jagged)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0],), {}, TypeError, r"w: expected a torch\.Tensor, got list"),
        ((W[0],), {}, ValueError, r"w: expected shape \(B, N, H, p\), got \(5, 3, 4\)"),
        ((W[:, :0],), {}, ValueError, r"N, H and p at least 1"),
        ((W.long(),), {}, TypeError, r"w: dtype torch\.int64 is not supported; accepted are float16"),
        ((W, W[:, :3]), {}, ValueError, r"value: expected shape \(2, 5, 3, 4\), got \(2, 3, 3, 4\)"),
        ((W, W.double()), {}, TypeError, r"value: has dtype torch\.float64, but the first argument has torch\.float32"),
        ((W, W.to("meta")), {}, ValueError, r"value: is on meta, but the first argument is on cpu"),
        ((W,), dict(scale="1"), TypeError, r"scale: expected a number, got str"),
        ((W,), dict(scale=math.nan), ValueError, r"scale: expected a finite number, got nan"),
        ((W,), dict(causal="no"), TypeError, r"causal: expected True or False, got 'no'"),
        ((W,), dict(lengths=[1, 2]), TypeError, r"lengths: expected a torch\.Tensor"),
        ((W,), dict(lengths=torch.tensor([1, 2, 3])), ValueError, r"lengths: expected shape \(2,\), got \(3,\)"),
        ((W,), dict(lengths=torch.tensor([1.0, 2.0])), TypeError, r"lengths: dtype .* accepted are int32, int64"),
        ((W,), dict(lengths=torch.tensor([0, 5])), ValueError, r"lengths: values must lie in 1\.\.5 .* got 0\.\.5"),
        ((W,), dict(lengths=torch.tensor([1, 6])), ValueError, r"got 1\.\.6"),
        ((W,), dict(backend="fastest"), ValueError, r"unknown backend 'fastest'; accepted are cuda, triton"),
        ((W,), dict(backend=["eager"]), TypeError, r"backend: unknown backend \['eager'\]; accepted are cuda"),
    ],
)
def test_subspace_attention(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.subspace_attention(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, DICTIONARY[:5]), {}, ValueError, r"weight: expected shape \(6, 6\), got \(5, 6\)"),
        ((X, DICTIONARY.double()), {}, TypeError, r"weight: has dtype torch\.float64"),
        ((torch.tensor(1.0), DICTIONARY), {}, ValueError, r"x: expected shape \(\.\.\., d\)"),
        ((X, DICTIONARY), dict(step_size=-0.1), ValueError, r"step_size: expected at least 0\.0, got -0\.1"),
        ((X, DICTIONARY), dict(step_size=math.inf), ValueError, r"step_size: expected a finite number, got inf"),
        ((X, DICTIONARY), dict(lambd=-math.inf), ValueError, r"lambd: expected a finite number, got -inf"),
        ((X, DICTIONARY), dict(lambd=torch.tensor(0.1)), TypeError, r"lambd: expected a number, got Tensor"),
        ((X.to_sparse(), DICTIONARY), {}, TypeError, r"x: expected a dense tensor, got a sparse_coo one"),
        ((NESTED, DICTIONARY), {}, TypeError, r"x: expected a dense tensor, got a nested"),
        ((X, DICTIONARY), dict(folded=DICTIONARY[0]), ValueError, r"folded: expected shape \(6, 6\)"),
    ],
)
def test_ista_step(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.ista_step(*arguments, **options)


def test_overcomplete_ista():
    with pytest.raises(ValueError, match=r"D: expected shape \(6, m\), got \(5, 24\)"):
        ops.overcomplete_ista(X, torch.randn(5, 24))
    with pytest.raises(ValueError, match=r"D: expected shape \(d, m\) with m at least 1, got \(6, 0\)"):
        ops.overcomplete_ista(X, torch.randn(6, 0))
    with pytest.raises(RuntimeError, match="overcomplete_ista has no cuda kernel yet"):
        ops.overcomplete_ista(X, torch.randn(6, 24), backend="cuda")
    with pytest.raises(ValueError, match=r"D1: expected shape \(6, 24\), got \(6, 12\)"):
        ops.overcomplete_ista(X, torch.randn(6, 24), torch.randn(6, 12))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z, NORM, NORM, U, OUT, NORM), dict(heads=5), ValueError, r"heads: 5 does not divide the 12 rows"),
        ((Z, NORM, NORM, U, OUT, NORM), dict(heads=0), ValueError, r"heads: expected at least 1, got 0"),
        ((Z, NORM, NORM, U, OUT, NORM), dict(heads=2.0), TypeError, r"heads: expected an integer, got float"),
        ((Z[0], NORM, NORM, U, OUT, NORM), dict(heads=3), ValueError, r"z: expected shape \(B, N, d\), got \(5, 12\)"),
        ((Z, NORM[:3], NORM, U, OUT, NORM), dict(heads=3), ValueError, r"norm_weight: expected shape \(12,\), got"),
        ((Z, NORM, NORM, U[:6], None, None), dict(heads=3), ValueError, r"out_weight: may be None only where"),
        ((Z, NORM, NORM, U, None, NORM), dict(heads=3), ValueError, r"out_bias: given without out_weight"),
        ((Z, NORM, NORM, U, OUT[:, :6], NORM), dict(heads=3), ValueError, r"out_weight: expected shape \(12, 12\)"),
        ((Z, NORM, NORM, U, OUT, NORM), dict(heads=3, eps="x"), TypeError, r"eps: expected a number, got str"),
        ((Z, NORM, NORM, U, OUT, NORM), dict(heads=3, eps=math.nan), ValueError, r"eps: expected a finite number"),
        ((Z, NORM.half(), NORM, U, OUT, NORM), dict(heads=3), TypeError, r"norm_weight: has dtype torch\.float16"),
    ],
)
def test_mssa_block(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.mssa_block(*arguments, **options)


def test_norm_parameters_may_stay_in_float32():
    z, u, out = Z.bfloat16(), U.bfloat16(), OUT.bfloat16()
    narrow = ops.mssa_block(z, NORM.bfloat16(), NORM.bfloat16(), u, out, None, heads=3)
    torch.testing.assert_close(ops.mssa_block(z, NORM, NORM, u, out, None, heads=3), narrow)


@pytest.mark.parametrize("option", [{"causal": 1}, {"scale": True}])
def test_an_argument_is_checked_whatever_the_call_before_it_had(option):
    w = torch.randn(1, 3, 1, 4)
    ops.subspace_attention(w, causal=True, scale=1.0)  # 1 == True == 1.0
    with pytest.raises(TypeError, match=f"{next(iter(option))}: expected"):
        ops.subspace_attention(w, **{"causal": True, "scale": 1.0, **option})


def test_fold_takes_a_square_matrix():
    for shape, message in (((3, 4), r"a square matrix \(d, d\), got \(3, 4\)"), ((3,), r"shape \(d, d\), got \(3,\)")):
        with pytest.raises(ValueError, match=f"^weight: expected {message}$"):
            ops.fold(torch.zeros(shape))
