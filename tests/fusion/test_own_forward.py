"""Cases in which a fused module runs its own ``forward``: dropout, hooks, changed attributes, checkpointing."""

import pytest
import torch
from torch import nn

from crate_kernels import fuse, unfuse

from .compare import VISION, check, double, outcome
from .twins import GPT, Transformer, Vision


@pytest.mark.parametrize("build", [lambda: Vision(dropout=0.3), lambda: GPT(dropout=0.3),
                                   lambda: GPT(dropout=0.3, flash=True)])  # fmt: skip
def test_dropout_in_training_is_the_models_own(build, calls):
    torch.manual_seed(0)
    model = double(build())
    x = torch.randn(2, 9, 12 if isinstance(model, Vision) else 16, dtype=torch.float64)
    torch.manual_seed(1)
    want = outcome(model, x)
    model.eval()
    evaluated = outcome(model, x)
    fuse(model)
    assert calls.of(model, x) == VISION
    check(outcome(model, x), evaluated)
    model.train()
    assert calls.of(model, x) == {"ista_block": 2}
    torch.manual_seed(1)
    check(outcome(model, x), want)


def test_attention_maps_are_the_models_own(calls):
    model = double(Vision())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    first = model.transformer.layers[0][0]
    want = first(x, return_attention=True)
    fuse(model)
    assert calls.of(lambda: first(x, return_attention=True)) == {}
    assert torch.equal(first(x, return_attention=True), want)


HOOKED_ATTENTION = {"crate_layer": 1, "subspace_attention": 1, "ista_block": 1}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        # A module with a hook is called. The module that contains it takes the route that calls it. The others stay
        # fused.
        ("0.0.fn.qkv", HOOKED_ATTENTION),
        ("0.0.fn.to_out.0", HOOKED_ATTENTION),
        ("0.0.fn", HOOKED_ATTENTION),
        ("0.0.norm", HOOKED_ATTENTION),
        ("0.0", HOOKED_ATTENTION),
        ("0.0.fn.attend", {"crate_layer": 1, "ista_block": 1}),
        ("0.1.fn", {"crate_layer": 1, "mssa_block": 1, "ista_step": 1}),
        ("0.1.norm", {"crate_layer": 1, "mssa_block": 1, "ista_step": 1}),
        ("0.1", {"crate_layer": 1, "mssa_block": 1, "ista_block": 1}),
    ],
)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_fire_and_see_the_same(path, expected, kind, calls):
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    seen = []
    register = {"forward": "register_forward_hook", "pre": "register_forward_pre_hook",
                "backward": "register_full_backward_hook"}[kind]  # fmt: skip
    handle = getattr(model.transformer.layers.get_submodule(path), register)(lambda m, *values: seen.append(values))
    want, seen_before = outcome(model, x), list(seen)
    assert len(seen_before) == 1
    fuse(model)
    seen.clear()
    check(outcome(model, x), want)
    assert len(seen) == 1
    torch.testing.assert_close(seen, seen_before, rtol=1e-10, atol=1e-10)
    assert calls.of(model, x) == expected
    handle.remove()
    assert calls.of(model, x) == VISION


def test_hooks_may_change_what_they_see():
    torch.manual_seed(0)
    model = double(GPT())
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for name in ("attn.c_attn", "ista"):
        model.h[1].get_submodule(name).register_forward_hook(lambda m, args, out: out * 0.5)
    want = outcome(model, x)
    fuse(model)
    check(outcome(model, x), want)


def test_hooks_for_all_modules_see_all_modules():
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    seen = []

    def count():
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(id(m)))
        seen.clear()
        model(x)
        handle.remove()
        return list(seen)

    want = count()
    fuse(model)
    assert count() == want


def test_fusing_calls_no_hooks_and_no_random_numbers():
    model = Vision(dropout=0.2)
    for module in model.modules():
        module.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    state = torch.get_rng_state()
    assert len(fuse(model).fused) == 9
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_is_the_models_own():
    class Checkpointed(Transformer):
        gradient_checkpointing = False

        def forward(self, x):
            self_called.append(1)
            return super().forward(x)

    self_called = []
    model = Checkpointed(16, 2, 2, 8)
    fuse(model)
    self_called.clear()
    model(torch.randn(1, 3, 16))
    assert not self_called
    model.gradient_checkpointing = True
    model(torch.randn(1, 3, 16))
    assert self_called


def test_changed_attributes_count(calls):
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    fuse(model)
    model.transformer.layers[0][0].fn.scale = 0.9
    model.transformer.layers[1][1].fn.step_size = 0.4
    model.transformer.layers[1][1].fn.lambd = 0.3
    model.transformer.layers[1][0].norm.eps = 0.1
    model.transformer.layers = model.transformer.layers[1:]
    got = outcome(model, x)
    assert calls.of(model, x) == {"crate_layer": 1}
    unfuse(model)
    check(got, outcome(model, x))


def test_parametrized_projection():
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(model.transformer.layers[0][0].fn.qkv)
    nn.utils.parametrizations.weight_norm(model.transformer.layers[0][1].fn)
    want = outcome(model, x)
    fuse(model)
    check(outcome(model, x), want)
