"""The path of a call: how many operators and allocations a layer costs, and that nothing else changes its result."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from crate_kernels import use_backend
from crate_kernels.nn import CrateBlock, prepare_for_inference
from tests.ops.oracle import skip_without

LAYERS = 3


def layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(CrateBlock(32, 2, 16) for _ in range(LAYERS)))


def events(call):
    """Name -> number of events in a call that is not the first of its kind."""
    for _ in range(2):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return Counter(event.name for event in recorded.events())


def inference(model, z):
    with torch.no_grad():
        return model(z)


def test_a_layer_without_gradients_makes_its_results_and_nothing_else():
    skip_without("cpu")
    model, z = layers(), torch.randn(2, 5, 32)
    assert events(lambda: inference(model, z)) == {"aten::empty": 3 * LAYERS}  # the output and two scratch tensors
    prepare_for_inference(model)
    assert events(lambda: inference(model, z)) == {"aten::empty": 3 * LAYERS}
    with torch.autocast("cpu", torch.bfloat16):  # prepared weights were cast by an earlier call
        assert events(lambda: inference(model, z)) == {"aten::empty": 3 * LAYERS}


def test_a_layer_with_gradients_is_one_node_of_the_graph():
    skip_without("cpu")
    model, z = layers(), torch.randn(2, 5, 32, requires_grad=True)
    parameters = sum(1 for _ in model.parameters())
    found = events(lambda: torch.autograd.grad(model(z).sum(), [z, *model.parameters()]))
    for name in ("CrateCrateLayer", "CrateCrateLayerBackward"):
        assert found[name] == LAYERS
    # A layer has nine results and, in the backward, a gradient for each of its parameters and for its tokens. The sum
    # has a result, too.
    assert found["aten::empty"] == 9 * LAYERS + parameters + LAYERS + 1
    others = {name for name in found if name.startswith("aten::")} - {"aten::empty"}
    assert others <= {"aten::sum", "aten::fill_", "aten::ones_like", "aten::empty_like", "aten::empty_strided",
                      "aten::expand", "aten::as_strided", "aten::_sum", "aten::squeeze"}, others  # fmt: skip


def test_an_eager_layer_calls_no_more_operators_than_before():
    model, z = layers(), torch.randn(2, 5, 32)
    with use_backend("eager"):
        found = events(lambda: inference(model, z))
    assert found["aten::native_layer_norm"] == 2 * LAYERS
    assert found["aten::mm"] + found["aten::addmm"] == 4 * LAYERS  # projection, output projection, two of the ISTA step
    assert sum(found.values()) <= 105 * LAYERS


def test_a_compiled_layer_is_one_operator():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = layers()
    torch.compile(model, fullgraph=True, backend=keep)(torch.randn(2, 5, 32))
    called = Counter(str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function")
    assert called["crate.crate_layer.default"] == LAYERS
    assert not [name for name in called if name.startswith("crate.") and name != "crate.crate_layer.default"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpoints_change_no_bit(reentrant, autocast):
    model = layers()

    def gradients(run):
        model.zero_grad()
        z = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(z)
        out.square().sum().backward()
        return [out, z.grad, *(p.grad for p in model.parameters())]

    plain = gradients(model)
    checkpointed = gradients(lambda z: checkpoint(model, z, use_reentrant=reentrant))
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


def test_a_hook_between_the_halves_sees_its_tokens():
    block, z = layers()[0], torch.randn(2, 5, 32, requires_grad=True)
    expected = block(z)
    grads = torch.autograd.grad(expected.sum(), z)
    seen = []
    handle = block.ista_norm.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    watched = block(z)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][0], block.compress(z))
    torch.testing.assert_close(watched, expected)
    torch.testing.assert_close(torch.autograd.grad(watched.sum(), z), grads)
