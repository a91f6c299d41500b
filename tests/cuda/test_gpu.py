"""The CUDA backend on a GPU, as its users call it: outputs and all gradients against the float64 reference.

Where there is no GPU the same kernels run in the emulator (the other tests here); the products of cuBLASLt, the
streams and the graphs run here alone.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from crate_kernels import agreement, ops
from crate_kernels.models import CRATE
from crate_kernels.ops import cuda_kernels

from ..models.parity import assert_within_budget, logits_and_gradients
from ..ops.builders import attention, mssa, normal
from ..ops.cases import CASES, Case
from ..ops.oracle import check, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(cuda_kernels.MISSING is not None, reason=f"{cuda_kernels.MISSING}"),
]

HALF, BRAIN = torch.float16, torch.bfloat16

ATTENTION = {
    f"N{tokens} p{width}{' causal' if causal else ''}": attention(2, tokens, 3, width, causal=causal)
    for width in (16, 32, 48, 64, 80, 96, 128)
    for tokens in (1, 2, 63, 64, 65, 197, 240)
    for causal in (False, True)
} | {
    "N257": attention(2, 257, 2, 64),
    "N272": attention(1, 272, 2, 80),
    "many heads and samples": attention(40, 197, 12, 64),
    "lengths in every place of a tile": attention(6, 197, 2, 64, lengths=torch.tensor([1, 15, 16, 17, 64, 197])),
    "lengths, causal": attention(3, 70, 2, 48, causal=True, lengths=torch.tensor([1, 33, 70], dtype=torch.int32)),
    "negative scale": attention(2, 65, 2, 32, scale=-0.4),
    "no scale": attention(2, 65, 2, 32, scale=0.0),
    "large norms": attention(2, 100, 2, 64, spread=12.0),
    "equal tokens": attention(2, 33, 2, 16, spread=0.0),
    "no samples": attention(0, 33, 2, 16),
}


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, dtype):
    check(ATTENTION[name], dtype, "cuda")


def rows(count, width):
    return Case("", ops.ista_step, (normal(count, width), normal(width, width, spread=width**-0.5)))


def ista_block(batch, tokens, width, spread=1.0, offset=0.0):
    z = spread * normal(batch, tokens, width) + offset
    norm = 1 + normal(width, spread=0.2), normal(width, spread=0.2, seed=1)
    return Case("", ops.ista_block, (z, *norm, normal(width, width, spread=width**-0.5, seed=2)))


BLOCKS = {
    "ista, few rows": rows(5, 64),
    "ista, many rows": rows(1000, 96),
    "ista, CRATE-B": rows(394, 768),
    "ista, no rows": rows(0, 64),
    "ista block": ista_block(3, 197, 384),
    "ista block, one row": ista_block(1, 1, 64),
    "ista block, rows off zero": ista_block(2, 65, 768, offset=30.0),
    "ista block, widest": ista_block(1, 33, 2048),
    "ista block, no samples": ista_block(0, 3, 64),
    "mssa, CRATE-T": mssa(2, 197, 384, 6, 64),
    "mssa, CRATE-S": mssa(2, 197, 576, 12, 48),
    "mssa, one token": mssa(2, 1, 64, 2, 32),
    "mssa, wide heads": mssa(2, 65, 64, 2, 128),
    "mssa, identity output": mssa(2, 65, 64, 1, 64, output=False),
    "mssa, no bias": mssa(2, 65, 96, 3, 32, bias=False),
    "mssa, decoder": mssa(2, 65, 96, 3, 32, step_size=-1.0),
    "mssa, half step": mssa(2, 65, 96, 3, 32, step_size=0.5, scale=0.2),
    "mssa, causal, lengths": mssa(2, 65, 96, 3, 32, causal=True, lengths=torch.tensor([5, 65]), eps=1e-3),
    "mssa, no samples": mssa(0, 9, 64, 2, 32),
}


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    """By the benchmarks' gate: among so many units a few lie within rounding of their threshold, on either side."""
    case = BLOCKS[name].to(dtype)
    exact, reference, got = (
        run(case, backend, kind)
        for backend, kind in (("reference", torch.float64), ("reference", dtype), ("cuda", dtype))
    )
    score = case.to(torch.float64).largest_score() if case.tensors[0].numel() else 0.0
    verdict = agreement.judge(got, exact, reference, dtype, kinks=case.operator is not ops.mssa_block, score=score)
    assert verdict.passed, verdict.detail


def test_a_given_folded_matrix_changes_neither_values_nor_gradients():
    x, weight = normal(300, 64).to("cuda", BRAIN), normal(64, 64, spread=0.1).to("cuda", BRAIN)
    results = []
    for folded in (None, ops.fold(weight)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = ops.ista_step(*leaves, folded=folded, backend="cuda")
        results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


STRIDED = {
    "heads first": lambda: normal(2, 3, 33, 32).transpose(1, 2),
    "every second token": lambda: normal(2, 66, 3, 32)[:, ::2],
    "last axis strided": lambda: normal(2, 33, 3, 64)[..., ::2],
    "one sequence for all": lambda: normal(1, 33, 3, 32).expand(2, 33, 3, 32),
    "not at a multiple of 16 bytes": lambda: normal(2 * 33 * 3 * 32 + 1)[1:].view(2, 33, 3, 32),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strides(layout):
    check(Case("", ops.subspace_attention, (STRIDED[layout](), None)), BRAIN, "cuda")


@pytest.mark.parametrize("case", [ATTENTION["N197 p64"], BLOCKS["mssa, CRATE-T"], BLOCKS["ista block"]])
def test_gradients_are_bitwise_repeatable(case):
    case = case.to(BRAIN)
    for first, second in zip(run(case, "cuda", BRAIN), run(case, "cuda", BRAIN), strict=True):
        assert torch.equal(first, second)


def test_the_stream_that_is_current_is_used():
    case = BLOCKS["mssa, CRATE-T"].to(BRAIN)
    expected = run(case, "cuda", BRAIN)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what ran on another stream would overtake this
        got = run(case, "cuda", BRAIN)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_threads_with_heads_of_different_sizes():
    """The limit of shared memory belongs to the kernel, not to the call."""
    sizes = [normal(1, tokens, 2, 128).to("cuda", BRAIN) for tokens in (16, 200) * 4]
    expected = [ops.subspace_attention(w, backend="reference") for w in sizes]

    def attend(w):
        return [ops.subspace_attention(w, backend="cuda") for _ in range(200)][-1]

    with ThreadPoolExecutor(len(sizes)) as pool:
        for got, want in zip(pool.map(attend, sizes), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


def test_hidden_tokens_may_hold_anything():
    w = normal(1, 40, 2, 32).to("cuda", BRAIN)
    expected = ops.subspace_attention(w[:, :21], backend="cuda")
    w[:, 21:] = float("nan")
    got = ops.subspace_attention(w, lengths=torch.tensor([21], device="cuda"), backend="cuda")[:, :21]
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = CRATE(image_size=64, patch_size=8, num_classes=10, dim=128, depth=3, heads=4, dim_head=32).cuda()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return built


IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_a_model_under_autocast(model):
    images = IMAGES.cuda()
    exact = logits_and_gradients(copy.deepcopy(model).double(), images.double(), "reference")
    with torch.autocast("cuda", BRAIN):
        reference, got = (logits_and_gradients(model, images, backend) for backend in ("reference", "cuda"))
    assert_within_budget(got, reference, exact, BRAIN)


def test_compiled_without_a_graph_break(model):
    images = IMAGES.cuda()
    with torch.autocast("cuda", BRAIN):
        expected = logits_and_gradients(model, images, "cuda")
        torch.compiler.reset()
        got = logits_and_gradients(torch.compile(model, fullgraph=True), images, "cuda")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-5, atol=2**-6 * b.abs().max().item())


def test_cuda_graph(model):
    images = IMAGES.cuda()
    frozen = copy.deepcopy(model).to(BRAIN).eval()
    with torch.inference_mode(), ops.use_backend("cuda"):
        still = images.to(BRAIN)
        expected = frozen(still)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = frozen(still)
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("backend", ["cuda", "eager"])
def test_prepared_with_graphs(model, backend):
    prepared = copy.deepcopy(model).to(BRAIN).prepare_for_inference(cuda_graph=True)
    plain = copy.deepcopy(model).to(BRAIN).prepare_for_inference()
    with torch.inference_mode(), ops.use_backend(backend):
        for batch in (4, 1, 4, 2):  # the third replays the first
            images = IMAGES[:batch].to("cuda", BRAIN) * batch
            assert torch.equal(prepared(images), plain(images))
        assert len(prepared.forward.captured) == 3
        before = prepared(images)
        for changed in (prepared, plain):
            for parameter in changed.parameters():
                parameter.mul_(1.25)
        after = prepared(images)
        assert torch.equal(after, plain(images))
        assert not torch.equal(after, before)
        assert len(prepared.forward.captured) == 1


def test_what_it_does_not_compute_is_refused_by_name():
    with pytest.raises(RuntimeError, match="overcomplete_ista has no cuda kernel"):
        run(CASES["overcomplete-7x8"], "cuda", BRAIN)
