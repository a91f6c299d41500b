"""The operators as torch sees them: schema, fake, gradient, compilation, autocast."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from crate_kernels import ops
from crate_kernels.agreement import judge

from .cases import CASES, SMALL
from .oracle import skip_without

OPERATORS = {
    ops.subspace_attention: torch.ops.crate.subspace_attention,
    ops.subspace_cross_attention: torch.ops.crate.subspace_cross_attention,
    ops.ista_step: torch.ops.crate.ista_step,
    ops.overcomplete_ista: torch.ops.crate.overcomplete_ista,
    ops.mssa_block: torch.ops.crate.mssa_block,
    ops.ista_block: torch.ops.crate.ista_block,
    ops.crate_layer: torch.ops.crate.crate_layer,
}


def schema_arguments(case):
    """The arguments of the registered operator for a call of the public function."""
    scalars = dict(causal=False, step_size=0.1, lambd=0.1, eps=1e-5, scale=0.5, lengths=None, folded=None)
    scalars |= dict(mssa_step_size=1.0, mssa_eps=1e-5, ista_eps=1e-5)
    if case.operator is ops.mssa_block:
        scalars["step_size"] = 1.0
    given = scalars | case.options | dict(backend="eager")
    tensors = list(case.tensors)
    arguments = []
    for argument in OPERATORS[case.operator].default._schema.arguments:
        if argument.name in given:
            arguments.append(given[argument.name])
        else:
            tensor = tensors.pop(0)
            if argument.name in ("x", "z") and case.operator not in (ops.mssa_block, ops.crate_layer):
                tensor = tensor.flatten(0, -2)
            arguments.append(tensor)
    return arguments


@pytest.mark.parametrize(
    ("dtype", "gradients"),
    [(torch.float64, True), (torch.bfloat16, True), (torch.float32, False)],
    ids=["float64-grad", "bfloat16-grad", "float32-no-grad"],
)
@pytest.mark.parametrize("name", SMALL)
def test_opcheck(name, dtype, gradients):
    case = CASES[name].to(dtype)
    arguments = [
        a.clone().requires_grad_(gradients) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in schema_arguments(case)
    ]
    opcheck(OPERATORS[case.operator], tuple(arguments))


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("name", ["attention-value-causal-lengths", "ista-50x8", "overcomplete-7x8", "mssa-decoder"])
def test_compiles_without_a_graph_break_and_with_any_number_of_tokens(name, backend):
    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(case.operator, fullgraph=True, dynamic=True, backend="aot_eager")
    count = torch._dynamo.utils.counters
    count.clear()
    rows = 0 if case.tensors[0].dim() == 2 else 1
    for tokens in (case.tensors[0].shape[rows], 5, 6, 7):
        # The first tensor and the attention's value hold tokens. All other tensors are parameters.
        varying = 2 if case.operator is ops.subspace_attention else 1
        tensors = [t.narrow(rows, 0, tokens) for t in case.tensors[:varying]] + list(case.tensors[varying:])
        options = dict(case.options)
        if "lengths" in options:
            options["lengths"] = options["lengths"].clamp(max=tokens)
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        out = compiled(*leaves, **options, backend=backend)
        expected = case.operator(*leaves, **options, backend=backend)
        torch.testing.assert_close(out, expected)
        wanted = [leaf for leaf in leaves if leaf is not None]
        for got, want in zip(
            torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True
        ):
            torch.testing.assert_close(got, want)
    assert count["stats"]["unique_graphs"] <= 2  # the first call may be specialized


STREAMS = (ops.mssa_block, ops.ista_block, ops.ista_step, ops.crate_layer)
"""Operators whose first argument is the stream of a layer, which keeps its dtype under autocast."""


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", SMALL)
def test_under_autocast_errors_are_the_references_and_the_stream_keeps_its_dtype(name, backend):
    skip_without(backend)
    case = CASES[name].to(torch.float32)
    exact = case.to(torch.float64).run(backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        reference = case.run(backend="reference")
        out, *gradients = case.run(backend=backend)
    assert out.dtype == (torch.float32 if case.operator in STREAMS else torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in gradients)
    verdict = judge(
        (out, *gradients), exact, reference, torch.bfloat16, kinks=case.has_kinks(), score=case.largest_score()
    )
    assert verdict.passed, verdict.detail


def test_shapes_without_data_on_the_meta_device():
    with torch.device("meta"):
        w = torch.empty(2, 5, 3, 4, requires_grad=True)
    out = ops.subspace_attention(w)
    assert out.shape == w.shape
    out.sum().backward()
    assert w.grad.shape == w.shape
    assert ops.ista_step(w.flatten(2), torch.empty(12, 12, device="meta")).shape == (2, 5, 12)


@pytest.mark.parametrize("name", SMALL)
def test_functional_transforms_take_the_reference_equations(name):
    case = CASES[name].to(torch.float32)
    first, *others = case.tensors
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))

    def f(x, **options):
        return case.operator(x, *others, **case.options, **options).square().sum()

    leaf = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf)
    tolerance = dict(rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    torch.testing.assert_close(torch.func.grad(f)(first), gradient, **tolerance)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(first[None])[0], gradient, **tolerance)
    wanted = (gradient * direction).sum()
    scale = (gradient * direction).abs().sum().item()
    assert abs(torch.func.jvp(f, (first,), (direction,))[1] - wanted) < 1e-4 * scale
    with forward_ad.dual_level():
        out = f(forward_ad.make_dual(first, direction))
        assert abs(forward_ad.unpack_dual(out).tangent - wanted) < 1e-4 * scale
    with pytest.raises(RuntimeError, match=r"backend 'eager' cannot run these inputs: torch\.func and"):
        torch.func.grad(lambda x: f(x, backend="eager"))(first)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", SMALL)
def test_second_derivatives_are_the_references(name, backend, autocast):
    skip_without(backend)
    case = CASES[name].to(torch.float32)

    def second(backend):
        leaves = [None if t is None else t.clone().requires_grad_() for t in case.tensors]
        wanted = [t for t in leaves if t is not None]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = case.operator(*leaves, **case.options, backend=backend)
        first = torch.autograd.grad(out.float().square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    # Under autocast the first derivatives agree up to the rounding of bfloat16.
    tolerance = 5e-2 if autocast else 1e-4
    for got, want in zip(second(backend), second("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
