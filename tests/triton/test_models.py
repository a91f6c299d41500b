"""A two-layer CRATE on the Triton kernels, and the wrappers that training uses."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from crate_kernels import ops
from crate_kernels.models import CRATE

from ..models.parity import assert_within_budget, logits_and_gradients
from ..ops.oracle import DEVICE


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(image_size=8, patch_size=2, num_classes=5, dim=16, depth=2, heads=2, dim_head=8)
    model = CRATE(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and norms away from 0 and 1
    return model.to(DEVICE)


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def test_logits_and_all_gradients_in_float32(model):
    exact = logits_and_gradients(copy.deepcopy(model).double(), IMAGES.double(), "reference")
    reference = logits_and_gradients(model, IMAGES, "reference")
    got = logits_and_gradients(model, IMAGES, "triton")
    assert_within_budget(got, reference, exact, torch.float32)


def test_logits_and_all_gradients_under_bfloat16_autocast(model):
    exact = logits_and_gradients(copy.deepcopy(model).double(), IMAGES.double(), "reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        reference = logits_and_gradients(model, IMAGES, "reference")
        got = logits_and_gradients(model, IMAGES, "triton")
    assert_within_budget(got, reference, exact, torch.bfloat16)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_without_a_graph_break(model):
    expected = logits_and_gradients(model, IMAGES, "triton")
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_same(logits_and_gradients(compiled, IMAGES, "triton"), expected)


def test_activation_checkpointing(model):
    expected = logits_and_gradients(model, IMAGES, "triton")
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda z, *a, forward=forward, **k: checkpoint(forward, z, *a, use_reentrant=False, **k)
    # The backward pass recomputes the blocks, so it must request the same backend.
    assert_same(logits_and_gradients(model, IMAGES, "triton"), expected)


def test_distributed_data_parallel(model):
    expected = logits_and_gradients(model, IMAGES, "triton")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        with ops.use_backend("triton"):
            logits = parallel(IMAGES)
            torch.nn.functional.cross_entropy(logits, torch.arange(3, device=DEVICE)).backward()
        assert_same([logits, *(p.grad for p in model.parameters())], expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.gpu
def test_cuda_graph(model):
    expected = logits_and_gradients(model, IMAGES, "triton")
    graph, images = torch.cuda.CUDAGraph(), IMAGES.clone()
    with torch.cuda.graph(graph):
        captured = logits_and_gradients(model, images, "triton")
    graph.replay()
    assert_same(captured, expected)


def test_a_training_run_follows_the_reference(model):
    losses = {}
    for backend in ("reference", "triton"):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        curve = []
        for _ in range(4):
            with ops.use_backend(backend):
                loss = torch.nn.functional.cross_entropy(trained(IMAGES), torch.arange(3, device=DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses[backend] = curve
    assert losses["reference"][-1] < losses["reference"][0]
    torch.testing.assert_close(losses["triton"], losses["reference"], rtol=1e-4, atol=1e-5)
