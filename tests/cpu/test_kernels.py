"""The compiled CPU kernels: every operator against the reference, on every instruction set of this processor."""

import gc
import multiprocessing
import os
import resource
import subprocess
import sys

import pytest
import torch

from crate_kernels import ops, use_backend
from crate_kernels.nn import CrateBlock, prepare_for_inference
from crate_kernels.ops import cpu_kernels, kept
from tests.ops import oracle
from tests.ops.builders import attention, ista, mssa
from tests.ops.cases import CASES, SMALL

pytestmark = pytest.mark.skipif(cpu_kernels.MISSING is not None, reason=str(cpu_kernels.MISSING))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=cpu_kernels.RUNNABLE)
def instruction_set(request):
    """Run with every instruction set of this processor, and restore the fastest one afterwards."""
    cpu_kernels.use_instruction_set(request.param)
    yield request.param
    cpu_kernels.use_instruction_set(None)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].tensors[0].numel()])
def test_values_and_gradients_are_as_exact_as_the_reference(name, dtype, instruction_set):
    oracle.check(CASES[name], dtype, "cpu")


SHAPES = {
    "two blocks of tokens": attention(1, 197, 2, 64),
    "a block and one token": attention(2, 97, 1, 48),
    "the last block is full": attention(1, 192, 1, 24),
    "causal over blocks": attention(1, 257, 1, 32, causal=True),
    "hidden tokens over blocks": attention(2, 200, 2, 16, lengths=torch.tensor([96, 101])),
    "value, causal, hidden": attention(2, 130, 1, 33, value=True, causal=True, lengths=torch.tensor([1, 97])),
    "norms beyond the guard": attention(1, 110, 2, 16, spread=9.0),
    "norms beyond the guard, hidden": attention(2, 110, 1, 16, spread=9.0, lengths=torch.tensor([60, 110])),
    "keys in three turns": attention(1, 531, 1, 40, value=True, causal=True),
    "keys in two turns, hidden": attention(2, 290, 1, 24, lengths=torch.tensor([259, 40])),
    "wide head": attention(1, 20, 1, 256),
    "block of a vision model": mssa(2, 65, 96, 4, 24),
    "few rows of many columns": ista(1, 41, 128),
    "few rows, columns a power of two": mssa(1, 3, 1024, 2, 16),
    "few rows, attention": mssa(1, 33, 200, 5, 40),
    "decoder": mssa(1, 100, 40, 1, 40, step_size=-1.0),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_at_the_edges_of_the_blocks(name, dtype, instruction_set):
    oracle.check(SHAPES[name], dtype, "cpu")


@pytest.mark.parametrize("lengths", [None, torch.tensor([40, 17, 33])], ids=["all tokens", "lengths"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_gradient_of_huge_scores_stays_in_bounds(dtype, causal, lengths, instruction_set):
    oracle.check_huge_scores("cpu", dtype, causal, lengths, "cpu")


@pytest.mark.parametrize("name", SMALL)
def test_results_are_bitwise_the_same_for_any_number_of_threads(name, threads):
    case = CASES[name].to(torch.float32)
    expected = case.run(backend="cpu")
    for count in (1, 2, 3, 4):
        threads(count)
        for got, want in zip(case.run(backend="cpu"), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"])
def test_hidden_keys_of_any_value_reach_no_query(backend):
    w, context, value = (torch.randn(2, n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 9, 10))
    lengths, results = torch.tensor([4, 9]), []
    for bad in (0.0, float("nan"), float("inf")):
        context[0, 4:], value[0, 4:9] = bad, bad
        leaves = [t.clone().requires_grad_() for t in (w, context, value[:, :9])]
        out = ops.subspace_cross_attention(*leaves, lengths=lengths, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for clean, *poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert all(torch.equal(clean, other) for other in poisoned)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["attention-N2", "ista-50x8", "ista-7x8", "overcomplete-7x8", "mssa-plain", "layer-plain"]
)
def test_not_finite_values_reach_the_rows_that_they_reach_in_the_reference(name, bad):
    case = CASES[name].to(torch.float32)
    tensors = [None if t is None else t.clone() for t in case.tensors]
    tensors[0].flatten()[1] = bad
    reference, got = (case.operator(*tensors, **case.options, backend=b) for b in ("reference", "cpu"))
    rows = [~(out if out.dim() == 2 else out.flatten(2)).isfinite().all(-1) for out in (reference, got)]
    assert rows[0].any()
    assert torch.equal(*rows)


def test_packed_weights_change_no_bit():
    z, *weights = CASES["layer-plain"].to(torch.float32).tensors
    options = (None, 3, 8**-0.5, False, (1.0, 0.1, 0.1), (1e-5, 1e-5))
    folded = cpu_kernels.fold(weights[7])
    weights = (*weights, folded)
    expected = cpu_kernels.layer_forward(z, weights, *options, save=False)[0]
    packed = [cpu_kernels.pack(weights[2], True), cpu_kernels.pack(weights[3], True), cpu_kernels.pack(folded, False)]
    addresses = tuple(t.data_ptr() for t in packed)
    got = cpu_kernels.layer_forward(z, weights, *options, save=False, packed=addresses)[0]
    assert torch.equal(got, expected)


def test_fold_is_the_folded_matrix():
    for width in (1, 7, 96, 100, 161):
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(width)) / width**0.5
        exact = weight.double() - weight.double().T @ weight.double()
        torch.testing.assert_close(cpu_kernels.fold(weight).double(), exact, rtol=0, atol=2e-6)


def test_no_memory_is_lost():
    case = CASES["layer-odd"].to(torch.float32)
    for _ in range(300):
        case.run(backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1500):
        case.run(backend="cpu")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 8 << 10


def _forward() -> float:
    # No gradient: torch itself refuses a backward in a forked child whose parent ran one.
    case = CASES["attention-N65"].to(torch.float32)
    with torch.no_grad():
        return case.operator(*case.tensors, **case.options, backend="cpu").sum().item()


def _in_a_child(queue):
    torch.set_num_threads(1)  # torch's own pool of threads does not survive a fork
    queue.put(_forward())


def test_a_forked_child_computes():
    expected = _forward()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == pytest.approx(expected, rel=1e-6)
    child.join(60)
    assert child.exitcode == 0


def test_the_environment_variable_forces_a_lower_instruction_set():
    def opened(name):
        code = "from crate_kernels.ops import cpu_kernels as k; print(k.ISA, k.MISSING)"
        environment = os.environ | {"CRATE_KERNELS_CPU_ISA": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    lowest = cpu_kernels.RUNNABLE[0]
    assert opened(lowest).split() == [lowest, "None"]
    unknown = opened("mmx")
    assert "CRATE_KERNELS_CPU_ISA=mmx" in unknown
    assert lowest in unknown  # the sets that would run


def test_what_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="float64"):
        ops.ista_step(torch.ones(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), backend="cpu")
    with pytest.raises(RuntimeError, match="width 256"):
        ops.subspace_attention(torch.ones(1, 2, 1, 257), backend="cpu")


@pytest.mark.parametrize("autocast", [False, True])
def test_a_prepared_layer_packs_once_and_notices_changed_weights(autocast):
    torch.manual_seed(0)
    block = prepare_for_inference(CrateBlock(48, 3, 16))
    z = torch.randn(2, 30, 48)

    def addresses():
        return {key: made.data_ptr() for key, (_, _, made) in kept._made.items()}

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        before = len(addresses())
        first = block(z)
        made = addresses()
        # Projection, output projection and folded dictionary are packed. Autocast casts them, the bias and the
        # dictionary.
        assert len(made) == before + (8 if autocast else 3)
        assert torch.equal(block(z), first)
        assert addresses() == made
        for weight in (block.mssa.projection.weight, block.mssa.output.weight, block.ista.weight):
            weight.mul_(1.5)
            changed = block(z)
            with use_backend("reference"):
                tolerance = 3e-2 if autocast else 1e-5
                torch.testing.assert_close(changed, block(z), rtol=1e-4, atol=tolerance * changed.abs().max().item())
            assert not torch.equal(changed, first)
        block.mssa.projection.weight.data.mul_(1.5)  # no version counter shows this write
        prepare_for_inference(block)
        with use_backend("reference"):
            expected = block(z)
        torch.testing.assert_close(block(z), expected, rtol=1e-4, atol=tolerance * expected.abs().max().item())
    del block, weight
    gc.collect()
    assert len(addresses()) == before


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith("empty")])
def test_an_empty_batch_gives_zero_gradients_of_the_weights(name):
    out, *gradients = CASES[name].to(torch.float32).run(backend="cpu")
    assert out.numel() == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))
