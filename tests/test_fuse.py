"""``fuse`` on stand-ins for the public code: classes written here, with the attribute names that that code uses."""

import copy
import io
import math
import os
import pickle
import warnings

import pytest
import torch
from torch import nn

from crate_kernels import ops
from crate_kernels.fuse import fuse, unfuse
from crate_kernels.nn import CrateBlock, prepare_for_inference

F = nn.functional


# -- vision --------------------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    def __init__(self, dim, fn, eps=1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fn = fn

    def forward(self, x, **kwargs):
        return self.fn(self.norm(x), **kwargs)


class Attention(nn.Module):
    def __init__(self, dim, heads=8, dim_head=64, dropout=0.0, bias=True):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.scale = dim_head**-0.5
        self.attend = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(dim, inner, bias=False)
        identity = heads == 1 and dim_head == dim
        self.to_out = nn.Identity() if identity else nn.Sequential(nn.Linear(inner, dim, bias), nn.Dropout(dropout))

    def forward(self, x, return_attention=False):
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attention = self.dropout(self.attend(torch.matmul(w, w.transpose(-1, -2)) * self.scale))
        if return_attention:
            return attention
        return self.to_out(torch.matmul(attention, w).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, step_size=0.1, lambd=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size = step_size
        self.lambd = lambd

    def forward(self, x):
        reconstruction = F.linear(F.linear(x, self.weight), self.weight.t())
        gradient = self.step_size * (F.linear(x, self.weight.t()) - reconstruction) - self.step_size * self.lambd
        return F.relu(x + gradient)


class Transformer(nn.Module):
    def __init__(self, dim, depth, heads, dim_head, dropout=0.0, ista=0.1, lambd=0.1):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, heads, dim_head, dropout)),
                    PreNorm(dim, FeedForward(dim, ista, lambd)),
                ]
            )
            for _ in range(depth)
        )

    def forward(self, x):
        for attn, ff in self.layers:
            x = ff(attn(x) + x)
        return x


class Vision(nn.Module):
    def __init__(self, dim=16, depth=2, heads=2, dim_head=6, patch_dim=12, classes=5, **options):
        super().__init__()
        self.embedding = nn.Sequential(nn.LayerNorm(patch_dim), nn.Linear(patch_dim, dim), nn.LayerNorm(dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = Transformer(dim, depth, heads, dim_head, **options)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, patches):
        x = self.embedding(patches)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.mlp_head(self.transformer(x)[:, 0])


# -- MAE -----------------------------------------------------------------------------------------------------------


class Dictionary(nn.Module):
    def __init__(self, dim, step_size=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)
        self.step_size = step_size

    def forward(self, x):
        return F.linear(x, self.weight)


class DecoderTransformer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        first, second = PreNorm(dim, Dictionary(dim)), PreNorm(dim, Attention(dim, heads, dim // heads))
        self.layers = nn.ModuleList([nn.ModuleList([first, second])])

    def forward(self, x):
        for ff, attn in self.layers:
            y = ff(x)
            x = y - attn(y)
        return x


class MAE(nn.Module):
    def __init__(self, dim=16, depth=2, heads=2):
        super().__init__()
        self.blocks = nn.ModuleList(Transformer(dim, 1, heads, dim // heads, lambd=0.5) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(DecoderTransformer(dim, heads) for _ in range(depth))
        self.decoder_pred = nn.Linear(dim, 12)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(x)


# -- alpha ---------------------------------------------------------------------------------------------------------


class OvercompleteISTABlock(nn.Module):
    def __init__(self, d, expansion=4, eta=0.1, lmbda=0.1, decoupled=True):
        super().__init__()
        self.eta = eta
        self.lmbda = lmbda
        self.D = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d, expansion * d)))
        if decoupled:
            self.D1 = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d, expansion * d)))

    def forward(self, x):
        a = torch.einsum("pd,nlp->nld", self.D, x)
        z = F.relu(self.eta * a - self.eta * self.lmbda)
        r = torch.einsum("pd,nlp->nld", self.D, torch.einsum("dp,nlp->nld", self.D, z))
        z = F.relu(z - self.eta * (r - a) - self.eta * self.lmbda)
        return torch.einsum("dp,nlp->nld", self.D1 if hasattr(self, "D1") else self.D, z)


class AlphaTransformer(nn.Module):
    def __init__(self, dim=16, depth=2, heads=2, decoupled=True):
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            attention = PreNorm(dim, Attention(dim, heads, dim // heads, bias=False), eps=1e-6)
            coding = PreNorm(dim, OvercompleteISTABlock(dim, decoupled=decoupled), eps=1e-6)
            self.layers.append(nn.ModuleList([attention, coding]))

    def forward(self, x):
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


# -- GPT -----------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd, n_head, block_size, dropout, bias, flash):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.attn_dropout = nn.Dropout(dropout)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.n_embd, self.dropout, self.flash = n_head, n_embd, dropout, flash
        if not flash:
            self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size))[None, None])

    def forward(self, x):
        B, T, C = x.shape
        w = self.c_attn(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(w, w, w, dropout_p=self.dropout if self.training else 0, is_causal=True)
        else:
            att = (w @ w.transpose(-2, -1)) * (1.0 / math.sqrt(w.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ w
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class MLP(nn.Module):
    def __init__(self, n_embd, expansion):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(expansion * n_embd, n_embd)))
        self.step_size = 0.1
        self.lambd = 0.1
        self.expansion = expansion

    def forward(self, x):
        if self.expansion == 1:
            residual = x @ self.weight - x @ self.weight.T @ self.weight
            return F.relu(x + self.step_size * residual - self.step_size * self.lambd)
        a = F.linear(x, self.weight)
        z = F.relu(self.step_size * (a - self.lambd))
        z = F.relu(z + self.step_size * (a - F.linear(F.linear(z, self.weight.T), self.weight) - self.lambd))
        return F.linear(z, self.weight.T)


class GPTBlock(nn.Module):
    def __init__(self, n_embd=16, n_head=2, block_size=32, dropout=0.0, bias=True, flash=False, expansion=1, own=True):
        super().__init__()
        self.prenorm_1 = LayerNorm(n_embd, bias) if own else nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, block_size, dropout, bias, flash)
        self.prenorm_2 = LayerNorm(n_embd, bias) if own else nn.LayerNorm(n_embd)
        self.ista = MLP(n_embd, expansion)

    def forward(self, x):
        x = x + self.attn(self.prenorm_1(x))
        return self.ista(self.prenorm_2(x))


class GPT(nn.Module):
    def __init__(self, n_embd=16, vocabulary=11, depth=2, **options):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, n_embd)
        self.h = nn.ModuleList(GPTBlock(n_embd, **options) for _ in range(depth))
        self.lm_head = nn.Linear(n_embd, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.wte(tokens) if not tokens.is_floating_point() else tokens
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


# -- parity --------------------------------------------------------------------------------------------------------


def double(module):
    """``module`` in float64, with parameters that are nobody's default."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def outcome(model, x):
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = model(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad((out * weights).sum(), [x, *parameters], allow_unused=True)
    return dict(zip(["out", "x", *names], [out.detach(), *gradients], strict=True))


def check(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] is None) == (want[name] is None), name
        torch.testing.assert_close(
            got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class Calls:
    """Counts the calls of fused operators, so that a test can tell which route was taken."""

    NAMES = ("subspace_attention", "mssa_block", "ista_step", "ista_block", "overcomplete_ista")

    def __init__(self, monkeypatch):
        self.counts = {}
        for name in self.NAMES:
            monkeypatch.setattr(ops, name, self._counted(name, getattr(ops, name)))

    def _counted(self, name, function):
        def call(*args, **kwargs):
            self.counts[name] = self.counts.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    def of(self, function, *args):
        self.counts = {}
        function(*args)
        return self.counts


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


VISION = {"mssa_block": 2, "ista_block": 2}
MODELS = [
    pytest.param(Vision, 12, VISION, id="vision"),
    pytest.param(lambda: Vision(heads=1, dim_head=16), 12, VISION, id="one-head"),
    pytest.param(MAE, 16, {"mssa_block": 4, "ista_block": 2}, id="mae"),
    pytest.param(AlphaTransformer, 16, {"mssa_block": 2, "overcomplete_ista": 2}, id="alpha"),
    pytest.param(lambda: AlphaTransformer(decoupled=False), 16, {"mssa_block": 2, "overcomplete_ista": 2}, id="tied"),
    pytest.param(GPT, 16, VISION, id="gpt"),
    pytest.param(lambda: GPT(bias=False, flash=True), 16, VISION, id="gpt-flash"),
    pytest.param(lambda: GPT(own=False), 16, VISION, id="gpt-torch-norm"),
    pytest.param(lambda: GPT(expansion=4), 16, {"mssa_block": 2, "overcomplete_ista": 2}, id="gpt-overcomplete"),
]


@pytest.mark.parametrize(("build", "width", "expected"), MODELS)
def test_same_results_through_fused_operators(build, width, expected, calls):
    torch.manual_seed(0)
    model, x = double(build()), torch.randn(2, 9, width, dtype=torch.float64)
    want, classes = outcome(model, x), [type(m) for m in model.modules()]
    parameters, state, held = dict(model.named_parameters()), list(model.state_dict()), dict(vars(model))
    assert calls.of(model, x) == {}

    report = fuse(model)
    assert calls.of(model, x) == expected
    check(outcome(model, x), want)
    assert list(model.state_dict()) == state
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert len(parameters) == len(dict(model.named_parameters()))
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))

    again = fuse(model)
    assert (again.fused, again.left) == (report.fused, report.left)
    assert calls.of(model, x) == expected

    unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert vars(model).keys() == held.keys()
    assert not any("_fused" in vars(m) for m in model.modules())
    assert calls.of(model, x) == {}
    assert all(
        torch.equal(a, b) for a, b in zip(outcome(model, x).values(), want.values(), strict=True) if b is not None
    )
    unfuse(model)


@pytest.mark.parametrize(
    ("build", "width"), [(Vision, 12), (MAE, 16), (lambda: FeedForward(8), 8)], ids=["vision", "mae", "module"]
)
def test_prepared_for_inference_it_keeps_folded_matrices(build, width, monkeypatch):
    model = double(build()).eval()
    x = torch.randn(2, 5, width, dtype=torch.float64)
    fuse(model)
    folds, fold = [], ops.fold
    monkeypatch.setattr(ops, "fold", lambda weight: folds.append(weight) or fold(weight))
    expected = model(x)
    assert not folds
    prepare_for_inference(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
        count = len(folds)
        model(x)
    dictionaries = [m for m in model.modules() if isinstance(m, FeedForward)]
    assert count == len(folds) == len(dictionaries)
    with torch.no_grad():
        dictionaries[0].weight.mul_(1.5)
    changed = model(x)
    assert len(folds) == count + 1
    assert "_folded" not in copy.deepcopy(dictionaries[0]).__dict__
    unfuse(model)
    torch.testing.assert_close(changed, model(x), rtol=0, atol=1e-10)
    assert not {"_folded", "keep_folded"} & dictionaries[0].__dict__.keys()


def test_report():
    model = Vision()
    text = str(fuse(model))
    assert "transformer: Transformer: 2 × y = x + attn(x); x = ista(y)" in text
    assert "transformer.layers.*.0.fn (2 times): Attention: subspace_attention" in text
    assert "transformer.layers.*.1 (2 times): PreNorm: ista_block" in text
    assert "mlp_head: Sequential: no CRATE part in it" in text
    causal = fuse(GPT()).fused
    assert causal["h.0.attn"] == "CausalSelfAttention: subspace_attention, causal"


def test_optimizer_keeps_training_the_same_parameters():
    torch.manual_seed(0)
    models = [double(Vision())]
    models.append(copy.deepcopy(models[0]))
    x, y = torch.randn(6, 9, 12, dtype=torch.float64), torch.randint(5, (6,))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    losses = [[], []]
    for step in range(20):
        if step == 5:
            fuse(models[0])
        if step == 15:
            unfuse(models[0])
        for model, optimizer, seen in zip(models, optimizers, losses, strict=True):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)


# -- the unfused route ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        # Hooked, a module is called; what contains it takes the route that calls it; the others stay fused.
        ("0.0.fn.qkv", {"mssa_block": 1, "subspace_attention": 1, "ista_block": 2}),
        ("0.0.fn.to_out.0", {"mssa_block": 1, "subspace_attention": 1, "ista_block": 2}),
        ("0.0.fn", {"mssa_block": 1, "subspace_attention": 1, "ista_block": 2}),
        ("0.0.norm", {"mssa_block": 1, "subspace_attention": 1, "ista_block": 2}),
        ("0.0", {"mssa_block": 1, "subspace_attention": 1, "ista_block": 2}),
        ("0.0.fn.attend", {"mssa_block": 1, "ista_block": 2}),
        ("0.1.fn", {"mssa_block": 2, "ista_step": 1, "ista_block": 1}),
        ("0.1.norm", {"mssa_block": 2, "ista_step": 1, "ista_block": 1}),
        ("0.1", VISION),
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
    assert calls.of(model, x) == {"mssa_block": 1, "ista_block": 1}
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


# -- numbers in the code ---------------------------------------------------------------------------------------------


class InCode(nn.Module):
    """An ISTA step without attributes for its numbers."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim, dim)))
        self.dim = dim

    def forward(self, x):
        return F.relu(x + 0.3 * (x @ self.weight - x @ self.weight.T @ self.weight) - 0.3 * 0.07)


class NoThreshold(InCode):
    def forward(self, x):
        return F.relu(x + (x - x @ self.weight.T) @ self.weight / 3)


class ThresholdInCode(InCode):
    def __init__(self, dim):
        super().__init__(dim)
        self.step_size = 0.2

    def forward(self, x):
        gradient = (x - x @ self.weight.T) @ self.weight - 0.05
        return F.relu(x + self.step_size * gradient)


class RowsInCode(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(3 * dim, dim)))

    def forward(self, x):
        codes = F.relu(0.1 * (x @ self.weight.T) - 0.02)
        codes = F.relu(codes + 0.1 * ((x - codes @ self.weight) @ self.weight.T) - 0.02)
        return codes @ self.weight


class DictionariesInCode(OvercompleteISTABlock):
    def __init__(self, dim):
        super().__init__(dim)
        del self.eta, self.lmbda

    def forward(self, x):
        codes = F.relu(1.5 * (x @ self.D) - 1.5 * 0.4)
        codes = F.relu(codes + 1.5 * ((x - codes @ self.D.T) @ self.D) - 1.5 * 0.4)
        return codes @ self.D1.T


@pytest.mark.parametrize(
    ("kind", "numbers", "operator"),
    [
        (InCode, "step_size = 0.3, lambd = 0.07", "ista_block"),
        (NoThreshold, "step_size = 0.3333333333, lambd = 0", "ista_block"),
        (ThresholdInCode, "with lambd = 0.05", "ista_block"),
        (RowsInCode, "step_size = 0.1, lambd = 0.2", "overcomplete_ista"),
        (DictionariesInCode, "step_size = 1.5, lambd = 0.4", "overcomplete_ista"),
    ],
)
def test_numbers_in_the_code_are_measured(kind, numbers, operator, calls):
    torch.manual_seed(0)
    model = double(Transformer(16, 2, 2, 8))
    for pair in model.layers:
        pair[1] = PreNorm(16, double(kind(16))).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = outcome(model, x)
    report = fuse(model)
    assert numbers in report.fused["layers.1.1.fn"]
    assert calls.of(model, x) == {"mssa_block": 2, operator: 2}
    check(outcome(model, x), want)
    check(outcome(pickle.loads(pickle.dumps(model)), x), want)
    unfuse(model)
    assert type(model.layers[0][1].fn) is kind
    assert calls.of(model, x) == {}


def test_an_attribute_beside_a_number_in_the_code_counts():
    torch.manual_seed(0)
    module, x = double(ThresholdInCode(16)), torch.randn(1, 4, 16, dtype=torch.float64)
    module.step_size = 0.7
    want = outcome(module, x)
    module.step_size = 0.2
    fuse(module)
    module.step_size = 0.7
    check(outcome(module, x), want)


class Elsewhere(InCode):
    def __init__(self, dim, **held):
        super().__init__(dim)
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def numbers(self):
        return self.alpha, 0.07

    def forward(self, x):
        step_size, lambd = self.numbers()
        return F.relu(x + step_size * ((x - x @ self.weight.T) @ self.weight - lambd))


class InConfiguration(Elsewhere):
    def numbers(self):
        return self.options["alpha"], 0.07


class OnTheClass(Elsewhere):
    alpha = 0.3


class ByMode(Elsewhere):
    def numbers(self):
        return 0.3 if self.training else 0.2, 0.07


class ByNorm(Elsewhere):
    def forward(self, x):
        step_size = 0.3 / (1 + 0.0001 * x.var(-1, keepdim=True))
        return F.relu(x + step_size * ((x - x @ self.weight.T) @ self.weight - 0.07))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Elsewhere(16, alpha=0.3), "an attribute whose name is not known here"),
        (lambda: Elsewhere(16, alpha=torch.tensor(0.3)), "an attribute whose name is not known here"),
        (lambda: Elsewhere(16, alpha=1), "may come from its alpha"),
        (lambda: InConfiguration(16, options={"alpha": 0.3}), "may come from its options"),
        (lambda: OnTheClass(16), "an attribute whose name is not known here"),
        (lambda: ByMode(16), "does not compute an ISTA step"),
        (lambda: ByNorm(16), "does not compute an ISTA step"),
    ],
)
def test_numbers_that_may_change_are_left(build, reason):
    torch.manual_seed(0)
    model = nn.Sequential(double(build()), Transformer(16, 1, 2, 8))
    report = fuse(model)
    assert reason in report.left["0"]
    assert "0" not in report.fused


def test_matrices_of_other_modules_are_no_dictionaries():
    class Projection(InCode):
        def forward(self, x):
            return x @ self.weight

    report = fuse(nn.Sequential(nn.Linear(16, 16, bias=False), nn.Embedding(16, 16), Projection(16)))
    assert not report.fused
    assert all("no CRATE part" in reason for reason in report.left.values())


# -- what is left alone --------------------------------------------------------------------------------------------


class OtherAttention(Attention):
    """q, k and v of three projections, as in a ViT."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, dim // heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class NormalisedAttention(Attention):
    def forward(self, x):
        w = F.normalize(self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), dim=-1)
        return self.to_out((self.attend(w @ w.mT * self.scale) @ w).transpose(1, 2).flatten(2))


class DetachedAttention(Attention):
    """The same output, another gradient."""

    def forward(self, x):
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.to_out((self.attend(w @ w.detach().mT * self.scale) @ w).transpose(1, 2).flatten(2))


class RecordingAttention(Attention):
    def forward(self, x):
        self.attention_map = super().forward(x, return_attention=True)
        return super().forward(x)


class FixedStep(FeedForward):
    """Does not read its ``step_size``."""

    def forward(self, x):
        return F.relu(x + 0.1 * (x @ self.weight - x @ self.weight.T @ self.weight) - 0.1 * self.lambd)


class PlusISTA(FeedForward):
    def forward(self, x):
        return x + super().forward(x)


class LearnedStep(FeedForward):
    def __init__(self, dim):
        super().__init__(dim)
        self.step_size = nn.Parameter(torch.tensor(0.1))


class StochasticDepth(Transformer):
    def forward(self, x):
        for attn, ff in self.layers:
            x = ff(F.dropout(attn(x), 0.2, self.training) + x)
        return x


class Features(Transformer):
    def forward(self, x):
        return [x := ff(attn(x) + x) for attn, ff in self.layers]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: OtherAttention(16, 2), "does not compute subspace attention"),
        (lambda: NormalisedAttention(16, 2, 8), "does not compute subspace attention"),
        (lambda: DetachedAttention(16, 2, 8), "does not compute subspace attention"),
        (lambda: RecordingAttention(16, 2, 8), "keeps something on the module"),
        (lambda: FixedStep(16), "does not compute an ISTA step"),
        (lambda: PlusISTA(16), "does not compute an ISTA step"),
        (lambda: LearnedStep(16), "is a tensor"),
    ],
)
def test_other_functions_with_the_same_attributes(build, reason):
    torch.manual_seed(0)
    model = double(nn.Sequential(PreNorm(16, build()), Transformer(16, 1, 2, 8)))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = outcome(model, x)
    report = fuse(model)
    assert reason in report.left["0.fn"]
    assert "0.fn" not in report.fused
    assert "1" in report.fused
    check(outcome(model, x), want)


@pytest.mark.parametrize(
    ("build", "reason"), [(StochasticDepth, "known succession of its layers"), (Features, "returns a list")]
)
def test_another_loop_keeps_its_loop(build, reason, calls):
    torch.manual_seed(0)
    model = double(build(16, 2, 2, 8)).eval()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = model(x)
    report = fuse(model)
    assert reason in report.left[""]
    assert calls.of(model, x) == {"subspace_attention": 2, "ista_block": 2}
    torch.testing.assert_close(model(x), want)


def test_replaced_forward_is_left():
    model = Vision()
    part = model.transformer.layers[0][0].fn
    part.forward = lambda x: 2 * x
    report = fuse(model)
    assert "replaced on the instance" in report.left["transformer.layers.0.0.fn"]
    x = torch.randn(1, 3, 16)
    assert torch.equal(part(x), 2 * x)


def test_models_without_crate_parts():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2))
    report = fuse(model)
    assert not report.fused
    assert report.left == {"": "Sequential: no CRATE part in it"}
    assert fuse(nn.ReLU()).left == {}


def test_modules_of_this_package_are_fused_already():
    report = fuse(nn.ModuleDict({"ours": CrateBlock(16, 2, 8), "theirs": Transformer(16, 1, 2, 8)}))
    assert report.left["ours.mssa"] == report.left["ours.ista"] == "runs fused operators already"
    assert "theirs" in report.fused


# -- what people do with models ------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize("build", [Vision, GPT])
def test_copies_are_fused_models_of_their_own(build, duplicate, calls):
    torch.manual_seed(0)
    model = double(build())
    x = torch.randn(2, 9, 12 if build is Vision else 16, dtype=torch.float64)
    want = outcome(model, x)
    fuse(model)
    other = duplicate(model)
    assert calls.of(other, x) == VISION
    check(outcome(other, x), want)
    if duplicate is not copy.copy:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        check(outcome(other, x), want)
    unfuse(other)
    assert calls.of(other, x) == {}
    check(outcome(other, x), want)


def test_conversion_and_loading(calls):
    torch.manual_seed(0)
    model, source = Vision(), double(Vision())
    fuse(model)
    model.double()
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    check(outcome(model, x), outcome(source, x))
    assert calls.of(model, x) == VISION
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_built_on_the_meta_device():
    with torch.device("meta"):
        model = Vision()
        assert len(fuse(model).fused) == 9
    model.to_empty(device="cpu")
    model.load_state_dict((source := Vision()).state_dict())
    x = torch.randn(2, 9, 12)
    torch.testing.assert_close(model(x), source(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_fused_in_any_mode(mode):
    model = Vision()
    with mode():
        assert len(fuse(model).fused) == 9
    model(torch.randn(2, 9, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_backend_request_does_not_disturb_recognition():
    with ops.use_backend("reference"):
        assert len(fuse(Vision()).fused) == 9


@pytest.mark.parametrize("build", [Vision, MAE, AlphaTransformer, GPT])
def test_compile(build):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = double(build())
    x = torch.randn(2, 9, 12 if build is Vision else 16, dtype=torch.float64)
    want = outcome(model, x)
    fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = outcome(compiled, x)
    check({name.removeprefix("_orig_mod."): value for name, value in got.items()}, want)


def test_compile_with_hooks():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    model.transformer.layers[0][0].fn.qkv.register_forward_hook(lambda m, args, out: out * 0.5)
    model.transformer.layers[1][1].fn.register_forward_hook(lambda m, args, out: out * 0.5)
    want = model(x)
    fuse(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)


def test_second_derivatives_are_refused_until_unfused():
    model = double(Vision())
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)

    def second():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()

    fuse(model)
    with pytest.raises(RuntimeError, match="backward"):
        second()
    unfuse(model)
    second()


def test_data_parallel(tmp_path):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch.distributed is not built in")
    store = dist.FileStore(os.fspath(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = double(Vision())
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        want = outcome(model, x)
        fuse(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = wrapped(x)
            weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            (out * weights).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-10, atol=1e-10)
    finally:
        dist.destroy_process_group()


def test_autocast():
    torch.manual_seed(0)
    model = Vision(depth=4)
    x = torch.randn(2, 9, 12)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        own = model(x)
        fuse(model)
        fused = model(x)
    # The operators compute in autocast's dtype throughout, the public code keeps its residual in float32: the budget
    # is one rounding of each half-step's output on top.
    rounding = 2 * 4 * 2.0**-9 * exact.abs().max()
    assert (fused - exact).abs().max() <= 2 * (own - exact).abs().max() + rounding
