"""Changes after ``fuse``: the fused model gives the result of the unfused model with the same change."""

import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from crate_kernels import fuse, unfuse

from .compare import VISION, check, double, outcome
from .twins import CODE_BASES, GPT, MLP, Attention, CausalSelfAttention, FeedForward, GPTBlock, Transformer, Vision

F = nn.functional

OF_EVERY_MODULE = nn.Module().__dict__.keys()


# -- everything that a model holds ---------------------------------------------------------------------------------


class Doubled(nn.Module):
    """Twice the result of the inner module, or twice its input without an inner module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return 2 * (args[0] if self.module is None else self.module(*args, **kwargs))


def other_value(value):
    """Another value of the same type; None for other types."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 1.5 * value + 0.1
    return None


def set_attribute(name, value, module):
    setattr(module, name, value)


def set_forward(module):
    own = module.forward
    module.forward = lambda *args, **kwargs: 0.5 * own(*args, **kwargs)


def set_parameter(module, name):
    setattr(module, name, nn.Parameter(1.5 * getattr(module, name).detach()))


def write_parameter(module, name):
    with torch.no_grad():
        getattr(module, name).mul_(1.5)


def write_parameter_data(module, name):
    getattr(module, name).data.mul_(1.5)


def set_buffer(module, name):
    setattr(module, name, 1 - getattr(module, name).flip(-1))


def write_buffer(module, name):
    getattr(module, name)[..., 0] = 0


def changes(model):
    """(description, path of a module, a function that changes that module): every attribute, child, tensor and hook."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in OF_EVERY_MODULE and other_value(value) is not None:
                yield f"attribute {name}", path, functools.partial(set_attribute, name, other_value(value))
        yield "training", path, lambda m: m.train(not m.training)
        for name in module._modules:
            yield f"child {name} doubled", path, lambda m, n=name: setattr(m, n, Doubled(m._modules[n]))
            yield f"child {name} replaced", path, lambda m, n=name: setattr(m, n, nn.GELU())
            yield f"child {name} removed", path, lambda m, n=name: setattr(m, n, None)
        for name, value in module._parameters.items():
            if value is not None:
                for change in (set_parameter, write_parameter, write_parameter_data):
                    yield f"{change.__name__} {name}", path, lambda m, n=name, c=change: c(m, n)
        for name in module._buffers:
            for change in (set_buffer, write_buffer):
                yield f"{change.__name__} {name}", path, lambda m, n=name, c=change: c(m, n)
        if type(module) is not nn.ModuleList:
            yield "forward hook", path, lambda m: m.register_forward_hook(lambda m, args, out: 0.5 * out)
            yield "pre-hook", path, lambda m: m.register_forward_pre_hook(lambda m, args: (0.5 * args[0],))
            yield "backward hook", path, lambda m: m.register_full_backward_hook(lambda m, got, _: (0.5 * got[0],))
            yield "forward of the instance", path, set_forward


def result(model, x):
    """Output and gradient of ``x``, or the type of the raised error."""
    x = x.clone().requires_grad_()
    try:
        out = model(x)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", CODE_BASES)
def test_every_change_counts(name):
    build, width = CODE_BASES[name]
    torch.manual_seed(0)
    own = double(build(depth=1)).eval()
    x = torch.randn(2, 5, width, dtype=torch.float64)
    unchanged = result(own, x)
    fused = copy.deepcopy(own)
    fuse(fused)
    visible, wrong, tried = 0, [], set()
    for what, path, change in changes(own):
        kind = what, type(own.get_submodule(path)), path.rpartition(".")[2]
        if kind in tried:  # the same part of another layer
            continue
        tried.add(kind)
        ours, theirs = copy.deepcopy(fused), copy.deepcopy(own)
        result(ours, x)  # decides, and keeps the decision
        change(ours.get_submodule(path))
        change(theirs.get_submodule(path))
        got, want = result(ours, x), result(theirs, x)
        if isinstance(want, type) or isinstance(got, type):
            same = isinstance(want, type) and isinstance(got, type)
        else:
            pairs = zip(got, want, strict=True)  # a row whose mask hides everything is NaN
            same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True) for a, b in pairs)
            visible += want[0].shape != unchanged[0].shape or not torch.allclose(want[0], unchanged[0])
        if not same:
            wrong.append(f"{path or 'model'}: {what}")
    assert not wrong
    assert len(tried) > 100
    assert visible > 40


# -- changes of other kinds ----------------------------------------------------------------------------------------


def check_change(build, width, change, undo=None, calls=None, expected=None):
    """Fuse a model, use it once, change it, and compare it with the unfused model after the same change."""
    torch.manual_seed(0)
    own = double(build())
    x = torch.randn(2, 9, width, dtype=torch.float64)
    fused = copy.deepcopy(own)
    fuse(fused)
    check(outcome(fused, x), outcome(own, x))
    change(own)
    change(fused)
    want = outcome(own, x)
    check(outcome(fused, x), want)
    if expected is not None:
        assert calls.of(fused, x) == expected
    if undo is not None:
        undo(own)
        undo(fused)
        check(outcome(fused, x), outcome(own, x))
        assert calls.of(fused, x) == VISION
    return fused


def test_softmax_replaced(calls):
    def change(model):
        model.transformer.layers[0][0].fn.attend = nn.Identity()

    def undo(model):
        model.transformer.layers[0][0].fn.attend = nn.Softmax(dim=-1)

    check_change(Vision, 12, change, undo, calls, {"crate_layer": 1, "ista_block": 1})


def test_activation_replaced_or_hooked(calls):
    def replace(model):
        model.h[0].ista.relu = nn.GELU()

    def restore(model):
        model.h[0].ista.relu = nn.ReLU()

    check_change(GPT, 16, replace, restore, calls, {"crate_layer": 1, "mssa_block": 1})
    handles = []

    def hook(model):
        handles.append(model.h[1].ista.relu.register_forward_hook(lambda m, args, out: out * (out > 0.3)))

    def unhook(model):
        handles.pop(0).remove()

    check_change(GPT, 16, hook, unhook, calls, {"crate_layer": 1, "mssa_block": 1})


def test_hook_on_the_codes_of_an_overcomplete_step():
    seen = []
    torch.manual_seed(0)
    model = double(GPT(expansion=4))
    fuse(model)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = model(x)
    model.h[0].ista.relu.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(model(x), want)
    assert [tuple(s.shape) for s in seen] == [(2, 9, 64)]


def test_hook_point_replaced(calls):
    def replace(model):
        model.h[0].attn.y_hook = nn.Tanh()

    def restore(model):
        model.h[0].attn.y_hook = nn.Identity()

    check_change(GPT, 16, replace, restore, calls, {"crate_layer": 1, "ista_block": 1})


class ScaledBlock(GPTBlock):
    residual = 1.0

    def forward(self, x):
        x = self.residual * x + self.attn(self.prenorm_1(x))
        return self.ista(self.prenorm_2(x))


class ScaledStack(Transformer):
    def __init__(self, *args):
        super().__init__(*args)
        self.residual = 1.0

    def forward(self, x):
        for attn, ff in self.layers:
            x = ff(attn(x) + self.residual * x)
        return x


@pytest.mark.parametrize("build", [ScaledBlock, lambda: ScaledStack(16, 2, 2, 8)])
def test_residual_factor(build, calls):
    def change(model):
        model.residual = 0.25

    fused = check_change(build, 16, change)
    assert not {"crate_layer", "mssa_block"} & calls.of(fused, torch.randn(1, 3, 16).double()).keys()


def test_attribute_of_the_class(monkeypatch, calls):
    monkeypatch.setattr(ScaledBlock, "residual", 1.0)
    check_change(ScaledBlock, 16, lambda _: monkeypatch.setattr(ScaledBlock, "residual", 0.25))


@pytest.mark.parametrize("patched", [FeedForward, Attention, Transformer, nn.LayerNorm, nn.Softmax])
def test_forward_of_the_class(patched, monkeypatch):
    own = patched.forward
    change = lambda _: monkeypatch.setattr(patched, "forward", lambda self, x: 0.5 * own(self, x))  # noqa: E731
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    fuse(model)
    before = outcome(model, x)
    change(model)
    changed = outcome(model, x)
    unfuse(model)
    check(changed, outcome(model, x))
    assert not torch.allclose(changed["out"], before["out"])


def test_norm_replaced_by_another_kind(calls):
    def change(model):
        model.transformer.layers[0][0].norm = nn.RMSNorm(16).double()
        model.transformer.layers[1][1].norm = nn.RMSNorm(16).double()

    check_change(
        Vision, 12, change, None, calls, {"mssa_block": 1, "subspace_attention": 1, "ista_block": 1, "ista_step": 1}
    )


class Configured(FeedForward):
    def __init__(self, dim):
        super().__init__(dim)
        self.config = SimpleNamespace(gain=1.0, more={"power": [1.0]})

    def forward(self, x):
        return (self.config.gain * super().forward(x)) ** self.config.more["power"][0]


@pytest.mark.parametrize(
    "change", [lambda m: setattr(m.config, "gain", 2.0), lambda m: m.config.more["power"].__setitem__(0, 2.0)]
)
def test_objects_and_containers_that_a_module_holds(change, calls):
    fused = check_change(lambda: Configured(16), 16, change)
    assert calls.of(fused, torch.randn(1, 3, 16).double()) == {}


def test_mask_written_to_and_loaded(calls):
    torch.manual_seed(0)
    model = double(GPT())
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 9, 16, dtype=torch.float64)
    fuse(model)
    want = outcome(model, x)
    model.load_state_dict(state)  # writes the same mask again
    assert calls.of(model, x) == VISION
    model.h[0].attn.bias[..., 5, 2] = 0
    changed = outcome(model, x)
    assert calls.of(model, x) == {"crate_layer": 1, "ista_block": 1}
    assert not torch.allclose(changed["out"], want["out"])
    model.load_state_dict(state)
    check(outcome(model, x), want)
    assert calls.of(model, x) == VISION


def test_changed_again_and_fused_again(calls):
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    fuse(model)
    attention = model.transformer.layers[0][0].fn
    attention.note = "changed in a way that does not matter"
    attention.heads = 3
    assert calls.of(model, x) == {"crate_layer": 1, "ista_block": 1}
    report = fuse(model)
    assert calls.of(model, x) == VISION
    assert "transformer.layers.0.0.fn" in report.fused
    got = outcome(model, x)
    unfuse(model)
    check(got, outcome(model, x))
    fuse(model)
    attention.attend = nn.Identity()
    report = fuse(model)
    assert "does not compute subspace attention" in report.left["transformer.layers.0.0.fn"]
    assert "transformer.layers.0.0" not in report.fused
    assert "transformer" in report.fused
    got = outcome(model, x)
    unfuse(model)
    check(got, outcome(model, x))


# -- parametrizations ----------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("path", ["transformer.layers.0.1.fn", "transformer.layers.0.0.fn.qkv"])
def test_parametrized_after_fusing(path, calls):
    torch.manual_seed(0)
    own = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    fused = copy.deepcopy(own)
    fuse(fused)
    fused(x)
    for model in (own, fused):
        parametrize.register_parametrization(model.get_submodule(path), "weight", Doubling())
    want = outcome(own, x)
    check(outcome(fused, x), want)
    unfuse(fused)
    assert calls.of(fused, x) == {}
    check(outcome(fused, x), want)
    for model in (own, fused):
        parametrize.remove_parametrizations(model.get_submodule(path), "weight")
    assert [type(m) for m in fused.modules()] == [type(m) for m in own.modules()]
    check(outcome(fused, x), outcome(own, x))


def test_parametrized_before_fusing(calls):
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    module = model.transformer.layers[0][1].fn
    parametrizations.weight_norm(module)
    want = outcome(model, x)
    fuse(model)
    check(outcome(model, x), want)
    parametrize.remove_parametrizations(module, "weight")
    got = outcome(model, x)
    torch.testing.assert_close(got["out"], want["out"])
    unfuse(model)
    assert type(module) is FeedForward
    check(outcome(model, x), got)


# -- forwards that depend on the length or on more -----------------------------------------------------------------


class Windowed(Attention):
    def forward(self, x):
        if x.shape[1] <= 64:
            return super().forward(x)
        return torch.cat([super(Windowed, self).forward(part) for part in x.split(64, dim=1)], dim=1)


class LongFeedForward(FeedForward):
    def forward(self, x):
        return super().forward(x) * (0.5 if x.shape[1] > 200 else 1)


class LongStack(Transformer):
    def forward(self, x):
        return super().forward(x) if x.shape[1] < 17 else x


class AlwaysDropping(CausalSelfAttention):
    def forward(self, x):
        return F.dropout(super().forward(x), self.dropout)


class WithoutGradients(FeedForward):
    def forward(self, x):
        return super().forward(x) if torch.is_grad_enabled() else x


@pytest.mark.parametrize(
    "build",
    [
        lambda: Windowed(16, 2, 8),
        lambda: LongFeedForward(16),
        lambda: LongStack(16, 1, 2, 8),
        lambda: AlwaysDropping(16, 2, 32, 0.1, True, True),
        lambda: WithoutGradients(16),
    ],
)
def test_forwards_that_differ_by_length_or_mode_are_left(build):
    torch.manual_seed(0)
    module = double(build())
    report = fuse(module)
    assert "" not in report.fused
    assert report.left[""]


@pytest.mark.parametrize("size", [32, 400])
def test_masks_speak_for_their_own_size(size):
    torch.manual_seed(0)
    module = double(CausalSelfAttention(16, 2, size, 0.0, True, False)).eval()
    if size == 400:
        module.bias[..., 300:, :50] = 0  # a window that shows in long sequences alone
    own = copy.deepcopy(module)
    text = fuse(module).fused[""]
    assert text.endswith("up to 32 tokens" if size == 32 else "up to 257 tokens")
    for tokens in (32, 257, 258, 399) if size == 400 else (32,):
        x = torch.randn(1, tokens, 16, dtype=torch.float64)
        torch.testing.assert_close(module(x), own(x))
    with pytest.raises(RuntimeError):
        module(torch.randn(1, size + 1, 16, dtype=torch.float64))


def test_masks_of_other_layers_are_not_confused():
    torch.manual_seed(0)
    model = double(GPT()).eval()
    model.h[1].attn.bias[..., 8:, :2] = 0
    own, x = copy.deepcopy(model), torch.randn(2, 12, 16, dtype=torch.float64)
    report = fuse(model)
    assert "h.0.attn" in report.fused
    assert "does not compute subspace attention" in report.left["h.1.attn"]
    torch.testing.assert_close(model(x), own(x))


# -- the decision itself -------------------------------------------------------------------------------------------


def test_a_decision_is_kept_while_nothing_changes(monkeypatch):
    from crate_kernels.fusion import modules

    decided = []
    decide = modules.Fusion.decide
    monkeypatch.setattr(modules.Fusion, "decide", lambda self, m: decided.append(type(m)) or decide(self, m))
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuse(model)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    # One decision for the whole stack, so its layers decide nothing.
    assert [kind.__name__ for kind in decided] == ["FusedTransformer"]
    model.eval()
    model(x)
    model(x)
    assert len(decided) == 2


def test_a_deleted_model_leaves_memory_at_once():
    model = Vision()
    fuse(model)
    model(torch.randn(2, 9, 12))
    weights = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(w() is not None for w in weights)
    finally:
        gc.enable()


def test_replicas_for_data_parallel_run(calls):
    torch.manual_seed(0)
    module = double(FeedForward(8))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    fuse(module)
    want = module(x)
    replica = module._replicate_for_data_parallel()
    replica.weight = module.weight.detach() * 1
    torch.testing.assert_close(replica(x), want)
    torch.testing.assert_close(module(x), want)


def test_mlp_is_watched_by_itself():
    check_change(lambda: MLP(16, 1), 16, lambda m: setattr(m, "relu", nn.Tanh()))


@pytest.mark.parametrize("bad", [None, 3, "model", {}, [], nn.Linear, nn.Linear(2, 2).state_dict()])
@pytest.mark.parametrize("function", [fuse, unfuse])
def test_bad_input_is_named(function, bad):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        function(bad)
