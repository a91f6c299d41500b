"""Every operator on difficult shapes and values: output and all gradients compared with the float64 reference."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from crate_kernels import ops
from crate_kernels.agreement import relative
from crate_kernels.ops.subspace_attention import triton as kernels
from crate_kernels.ops.triton_kernels import configurations, launch

from ..ops import oracle
from ..ops.builders import attention, mssa, normal
from ..ops.cases import CASES, Case
from ..ops.oracle import DEVICE, run

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


check = partial(oracle.check, backend="triton")


# What Triton accepts of the cases that all backends share: heads at least 8 wide, no cross-attention.
SHARED = [
    name
    for name, case in CASES.items()
    if case.operator is not ops.subspace_cross_attention
    and not (case.operator is ops.subspace_attention and case.tensors[0].shape[-1] < 8)
    and not (
        case.operator in (ops.mssa_block, ops.crate_layer) and case.tensors[3].shape[0] < 8 * case.options["heads"]
    )
]


# The small tiles of the interpreter make of 65 tokens what 197 tokens are to a GPU, so one type has both numbers there.
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in SHARED
        for dtype in (SINGLE, BRAIN, HALF)
        if DEVICE == "cuda" or dtype == SINGLE or "N197" not in name
    ],
    ids=str,
)
def test_shared_cases(name, dtype):
    check(CASES[name], dtype)


ATTENTION = {
    "odd width": attention(2, 33, 3, 9),
    "width 48": attention(1, 37, 2, 48),
    "width 80": attention(1, 20, 1, 80),
    "width 256": attention(1, 18, 1, 256),
    "many tokens": attention(1, 257, 1, 8),
    "negative scale": attention(1, 50, 2, 8, scale=-0.4),
    "no scale": attention(1, 50, 2, 8, scale=0.0),
    "value": attention(2, 65, 2, 8, value=True),
    "value, causal": attention(1, 65, 2, 8, value=True, causal=True),
    "scale 0, causal lengths": attention(2, 40, 1, 8, scale=0.0, causal=True, lengths=torch.tensor([3, 40])),
    "lengths in every place of a tile": attention(5, 70, 1, 8, lengths=torch.tensor([1, 16, 31, 33, 70])),
    "lengths, causal": attention(5, 70, 1, 8, causal=True, lengths=torch.tensor([1, 16, 31, 33, 70])),
    "lengths, negative scale": attention(2, 40, 1, 8, scale=-0.4, lengths=torch.tensor([3, 40], dtype=torch.int32)),
    "no head has one size": attention(1, 40, 1, 12, causal=True),
}


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, dtype):
    check(ATTENTION[name], dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 40.0])
def test_both_backward_paths_on_both_sides_of_the_guard(spread, causal):
    """Log-normalizers outside the range of float32 exponents need two exponentials for a pair. Others need one."""
    case = attention(1, 70, 1, 16, spread=1.0, causal=causal)
    w = case.tensors[0]
    w *= spread * torch.linspace(0.1, 1, 70, dtype=torch.float64)[:, None, None]
    check(case, SINGLE)


@pytest.mark.parametrize("lengths", [None, torch.tensor([40, 17, 33])], ids=["all tokens", "lengths"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, BRAIN, HALF], ids=str)
def test_the_gradient_of_huge_scores_stays_in_bounds(dtype, causal, lengths):
    oracle.check_huge_scores("triton", dtype, causal, lengths)


def test_one_long_token_among_short_ones():
    case = attention(1, 40, 1, 16, spread=0.5)
    case.tensors[0][0, 21] *= 200
    check(case, SINGLE)


@pytest.mark.skipif(not launch.INTERPRETED, reason="scores beyond 2^31: docs/triton.md, limits")
@pytest.mark.parametrize(("dtype", "amplitude"), [(SINGLE, 1e5), (BRAIN, 3e4)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_large_equal_norms(dtype, amplitude, causal):
    w = amplitude * normal(64, spread=1.0).to(dtype).expand(1, 33, 1, 64)
    out = ops.subspace_attention(w.to(DEVICE), causal=causal, backend="triton")
    torch.testing.assert_close(out.cpu(), w, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("cut", [16, 32])
def test_the_tile_of_the_last_tokens_is_cut_or_whole(cut):
    """17 keys in tiles of 32: the cut tile holds one of them, one more than the whole one, or all but one."""
    with (
        configurations.override("attention_forward", BLOCK_N=32, CUT=cut),
        configurations.override("attention_backward", BLOCK_N=32, CUT=cut),
    ):
        for tokens in (33, 48, 49, 63):
            check(attention(1, tokens, 1, 8), SINGLE)


@pytest.mark.parametrize("visible", [15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 70])
def test_causal_with_lengths_where_the_cut_tile_lies_before_the_diagonal(visible):
    check(attention(1, 70, 1, 8, causal=True, lengths=torch.tensor([visible])), SINGLE)


@pytest.mark.parametrize("scale", [0.45, -0.9])
def test_backward_scales_scores_by_the_very_number_of_the_forward(scale, monkeypatch):
    """Rounded twice on the device it would move large scores off their log-normalizer; the interpreter rounds once."""
    last, launched = {}, launch.launch

    def record(kernel, *arguments, **options):
        last[kernel] = arguments[-1]
        return launched(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "launch", record)
    w = normal(5, 1, 1, 16, spread=300).float().to(DEVICE)
    value, grad = (normal(5, 1, 1, 16, seed=i).float().to(DEVICE) for i in range(2))
    out = ops.subspace_attention(w, value.requires_grad_(), scale=scale, backend="triton")
    got = torch.autograd.grad(out, value, grad)[0]
    assert abs(last[kernels._backward]) == last[kernels._forward]
    if launch.INTERPRETED:  # hardware contracts the product and the difference
        assert torch.equal(got, grad)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tensor_memory", [True, False])
def test_two_chained_products_have_an_accumulator_each_in_tensor_memory(tensor_memory, causal, monkeypatch):
    separate, launched = [], launch.launch

    def record(*arguments, **options):
        separate.append(options.get("SEPARATE"))
        return launched(*arguments, **options)

    monkeypatch.setattr(launch, "launch", record)
    monkeypatch.setattr(launch, "tensor_memory", lambda _: tensor_memory)
    check(attention(2, 50, 2, 8, causal=causal), SINGLE)
    assert [s for s in separate if s is not None] == [tensor_memory]


STRIDED = {
    "heads first": lambda: normal(2, 3, 33, 8).float().transpose(1, 2),
    "every second token": lambda: normal(2, 66, 3, 8).float()[:, ::2],
    "last axis strided": lambda: normal(2, 33, 3, 16).float()[..., ::2],
    "one sequence for all": lambda: normal(1, 33, 3, 8).float().expand(2, 33, 3, 8),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout):
    w, value, grad = (STRIDED[layout]().to(DEVICE) for _ in range(3))
    value = value + 1 if layout == "last axis strided" else value
    leaves = w.requires_grad_(), value.detach().requires_grad_()
    out = ops.subspace_attention(*leaves, backend="triton")
    gradients = torch.autograd.grad(out, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = ops.subspace_attention(*wide, backend="reference")
    for got, want in zip(
        (out, *gradients), (expected, *torch.autograd.grad(expected, wide, grad.double())), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


VECTORS = {
    "every second": lambda t: t.repeat_interleave(2)[::2],
    "a column": lambda t: torch.stack([t, torch.full_like(t, 7)], 1)[:, 0],
    "one value for all": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", VECTORS)
def test_vectors_with_any_stride(layout):
    """The kernels need contiguous vectors, so parameters and lengths that are views must be copied first."""
    strided = VECTORS[layout]
    z, u, out = normal(2, 33, 16), normal(16, 16, spread=0.25), normal(16, 16, spread=0.25, seed=1)
    gamma, beta, bias = 1 + normal(16, spread=0.2), normal(16, spread=0.2, seed=1), normal(16, seed=2)
    lengths = strided(torch.tensor([17, 33]))
    cases = [
        (partial(ops.mssa_block, heads=2, lengths=lengths), (z, gamma, beta, u, out, bias)),
        (ops.ista_block, (z, gamma, beta, u)),
        (lambda w, **options: ops.subspace_attention(w, lengths=lengths, **options), (z.view(2, 33, 2, 8),)),
    ]
    for operator, tensors in cases:
        results = []
        for backend, dtype in (("triton", SINGLE), ("reference", torch.float64)):
            leaves = [t.to(dtype) for t in tensors]
            leaves = [(strided(t) if t.dim() == 1 else t).detach().requires_grad_() for t in leaves]
            got = operator(*leaves, backend=backend)
            weights = normal(*got.shape, seed=5).to(dtype)
            results.append((got, *torch.autograd.grad(got, leaves, weights)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


BLOCKS = {
    "mssa": mssa(2, 33, 40, 3, 8),
    "mssa wide heads": mssa(1, 40, 24, 2, 20),
    "mssa narrow rows": mssa(1, 9, 5, 1, 8),
    "mssa identity output": mssa(2, 20, 16, 2, 8, output=False),
    "mssa one head identity": mssa(1, 20, 16, 1, 16, output=False, step_size=-0.5),
    "mssa no bias": mssa(2, 20, 17, 2, 8, bias=False),
    "mssa decoder": mssa(2, 20, 17, 2, 8, step_size=-1.0),
    "mssa half step": mssa(2, 20, 17, 2, 8, step_size=0.5, scale=0.2),
    "mssa causal lengths": mssa(2, 40, 16, 2, 8, causal=True, lengths=torch.tensor([17, 40]), eps=1e-3),
    "mssa empty": mssa(0, 9, 16, 2, 8),
}


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    check(BLOCKS[name], dtype)


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN], ids=str)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_rows_far_from_zero(offset, dtype):
    """LayerNorm folded into the product must keep a token's small deviations from a large mean."""
    z = normal(50, 24) + offset * normal(50, 1, seed=3)
    case = Case("", ops.ista_block, (z, 1 + normal(24, spread=0.2), normal(24, spread=0.2), normal(24, 24, spread=0.2)))
    check(case, dtype)
    case = mssa(2, 30, 24, 2, 8)
    check(Case("", case.operator, (case.tensors[0] + offset, *case.tensors[1:]), case.options), dtype)


def layer(batch, tokens, width, heads, p, **options):
    attention = mssa(batch, tokens, width, heads, p)
    # Biases of 5 keep all ReLU units active. A unit that switches would hide the error that this case looks for.
    norm = 1 + normal(width, spread=0.2, seed=5), 5 + normal(width, spread=0.2, seed=6)
    dictionary = normal(width, width, spread=width**-0.5, seed=7)
    return Case("", ops.crate_layer, (*attention.tensors, *norm, dictionary), dict(heads=heads, **options))


STREAM = {
    "mssa": mssa(2, 40, 48, 3, 16),
    "mssa identity output": mssa(2, 40, 48, 3, 16, output=False),
    "mssa half step": mssa(2, 40, 48, 3, 16, step_size=0.5),
    "ista step": Case("", ops.ista_step, (5 + normal(90, 48), normal(48, 48, spread=48**-0.5))),
    "ista step, few rows": Case("", ops.ista_step, (5 + normal(30, 48), normal(48, 48, spread=48**-0.5))),
    "ista block": Case("", ops.ista_block, (normal(90, 48), *layer(2, 40, 48, 3, 16).tensors[6:])),
    "ista block, few rows": Case("", ops.ista_block, (normal(30, 48), *layer(2, 40, 48, 3, 16).tensors[6:])),
    "layer": layer(2, 40, 48, 3, 16),
    "layer far from zero": replace(
        layer(2, 40, 48, 3, 16), tensors=(3 + normal(2, 40, 48), *layer(2, 40, 48, 3, 16).tensors[1:])
    ),
}


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize("name", STREAM)
def test_the_stream_stays_float32_under_autocast(name, dtype):
    """The error is at most 1.3 times that of the reference under the same autocast, for output and all gradients."""
    case = STREAM[name].to(SINGLE)
    exact = run(case, "reference", torch.float64)
    with torch.autocast(DEVICE, dtype):
        reference, got = (run(case, backend, SINGLE) for backend in ("reference", "triton"))
    assert all(t.dtype == SINGLE for t in got)
    errors = [[relative(a, b) for a, b in zip(result, exact, strict=True)] for result in (got, reference)]
    assert errors[0][0] <= 1.3 * errors[1][0]
    assert math.hypot(*errors[0][1:]) <= 1.3 * math.hypot(*errors[1][1:])


def test_norm_parameters_in_float32_beside_bfloat16_rows():
    z, weight = normal(40, 16).bfloat16(), normal(16, 16, spread=0.2).bfloat16()
    gamma, beta = (1 + normal(16, spread=0.2)).float(), normal(16, spread=0.2).float()
    leaves = [t.requires_grad_() for t in (z, gamma, beta, weight)]
    out = ops.ista_block(*leaves, backend="triton")
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = ops.ista_block(*wide, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8)


def test_a_given_folded_matrix_changes_neither_values_nor_gradients():
    for rows in (3, 40):
        x, weight = normal(rows, 12).float(), normal(12, 12, spread=0.3).float()
        case = Case("", partial(ops.ista_step, folded=ops.fold(weight)), (x.double(), weight.double()))
        plain = Case("", ops.ista_step, case.tensors)
        exact = run(plain, "reference", torch.float64)
        for got, expected in zip(run(case, "triton", SINGLE), exact, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["attention-N65", "ista-50x8", "ista-7x8", "overcomplete-7x8", "mssa-plain"])
def test_not_finite_values_reach_the_same_rows(name, bad):
    case = CASES[name].to(SINGLE)
    tensors = list(case.tensors)
    tensors[0] = tensors[0].clone()
    tensors[0].flatten()[1] = bad
    reference, triton = (case.operator(*tensors, **case.options, backend=b) for b in ("reference", "triton"))
    finite = [~o.flatten(1).isfinite().all(dim=-1) for o in (reference, triton)]
    assert torch.equal(*finite)
    assert finite[0].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), -float("inf")])
def test_hidden_tokens_may_hold_anything(hidden, causal):
    w, grad = normal(1, 40, 1, 8).float(), normal(1, 40, 1, 8).float()
    w[:, 21:], grad[:, 21:] = hidden, 0

    def outcome(w, grad, **options):
        w = w.clone().requires_grad_()
        o = ops.subspace_attention(w, causal=causal, backend="triton", **options)
        return o.detach(), *torch.autograd.grad(o, w, grad)

    expected = outcome(w[:, :21], grad[:, :21])
    for got, want in zip(outcome(w, grad, lengths=torch.tensor([21])), expected, strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got[:, :21], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["attention-value-causal-lengths", "ista-50x8", "mssa-plain"])
def test_second_derivatives_are_the_references(name):
    case = CASES[name].to(SINGLE)

    def second(backend):
        leaves = [None if t is None else t.to(DEVICE).requires_grad_() for t in case.tensors]
        wanted = [t for t in leaves if t is not None]
        out = case.operator(*leaves, **case.options, backend=backend)
        first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    for got, want in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize(
    "name",
    ["attention-N197" if DEVICE == "cuda" else "attention-N65", "attention-N65-causal", "ista-50x8", "mssa-plain"],
)
def test_gradients_are_bitwise_repeatable(name):
    case = CASES[name].to(BRAIN)
    for first, second in zip(run(case, "triton", BRAIN), run(case, "triton", BRAIN), strict=True):
        assert torch.equal(first, second)
