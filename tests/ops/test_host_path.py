"""The host path of a call: how many operators and allocations a layer needs, and that nothing else changes its
result."""

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
    """Name -> number of events in a call. Earlier calls of the same kind have run."""
    for _ in range(2):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return Counter(event.name for event in recorded.events())


def inference(model, z):
    with torch.no_grad():
        return model(z)


def test_a_layer_without_gradients_makes_its_output_and_nothing_else():
    skip_without("cpu")
    model, z = layers(), torch.randn(2, 5, 32)
    assert events(lambda: inference(model, z)) == {"aten::empty": LAYERS}
    prepare_for_inference(model)
    assert events(lambda: inference(model, z)) == {"aten::empty": LAYERS}
    with torch.autocast("cpu", torch.bfloat16):  # prepared weights were cast by an earlier call
        assert events(lambda: inference(model, z)) == {"aten::empty": LAYERS}


def test_a_layer_with_gradients_is_one_node_of_the_graph():
    skip_without("cpu")
    model, z = layers(), torch.randn(2, 5, 32, requires_grad=True)
    parameters = sum(1 for _ in model.parameters())
    found = events(lambda: torch.autograd.grad(model(z).sum(), [z, *model.parameters()]))
    for name in ("CrateCrateLayer", "CrateCrateLayerBackward"):
        assert found[name] == LAYERS, found
    # A layer has nine results and, in the backward, a gradient for each of its parameters and for its tokens. The sum
    # has a result, too.
    assert found["aten::empty"] == 9 * LAYERS + parameters + LAYERS + 1
    # What the sum and its gradient cost, which does not grow with the layers.
    others = sum(count for name, count in found.items() if name.startswith("aten::")) - found["aten::empty"]
    assert others <= 15, found


def test_an_eager_layer_calls_no_more_operators_than_before():
    model, z = layers(), torch.randn(2, 5, 32)
    with use_backend("eager"):
        found = events(lambda: inference(model, z))
    assert found["aten::native_layer_norm"] == 2 * LAYERS
    assert found["aten::mm"] + found["aten::addmm"] == 4 * LAYERS  # projection, output projection, two of the ISTA step
    assert sum(found.values()) <= 106 * LAYERS


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


MODULES = ("mssa_norm", "mssa", "mssa.projection", "mssa.output", "ista_norm", "ista")


@pytest.mark.parametrize("name", MODULES)
def test_a_hook_inside_a_layer_is_called(name):
    block, z = layers()[0], torch.randn(2, 5, 32, requires_grad=True)
    expected = block(z)
    gradient = torch.autograd.grad(expected.sum(), z)
    module, seen = block.get_submodule(name), []
    for register in ("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"):
        handle = getattr(module, register)(lambda *given: seen.append(given[-1]))
        watched = block(z)
        torch.testing.assert_close(torch.autograd.grad(watched.sum(), z), gradient)
        handle.remove()
        torch.testing.assert_close(watched, expected)
    assert len(seen) == 3
    doubled = module.register_forward_hook(lambda module, given, out: 2 * out)
    assert not torch.allclose(block(z), expected)
    doubled.remove()
    assert torch.equal(block(z), expected)


@pytest.mark.parametrize("name", ["mssa.projection", "mssa.output"])
def test_a_module_in_the_place_of_a_linear_is_called(name):
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    block, z = layers()[0], torch.randn(2, 5, 32)
    linear = block.get_submodule(name)
    adapter = Adapter(linear.in_features, linear.out_features, linear.bias is not None)
    adapter.load_state_dict(linear.state_dict())
    expected = block(z)
    block.set_submodule(name, adapter)
    assert not torch.allclose(block(z), expected)
