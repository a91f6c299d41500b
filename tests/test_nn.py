"""The modules compared with plain torch code: values and all gradients in float64. Common uses of modules also work."""

import copy
import io

import pytest
import torch
from torch import nn

from crate_kernels import use_backend
from crate_kernels.nn import (
    ISTA,
    MSSA,
    CrateBlock,
    CrateDecoderBlock,
    OvercompleteCrateBlock,
    OvercompleteISTA,
    TransposedProjection,
    mssa_half_step,
    prepare_for_inference,
    rotate,
)

F = nn.functional


# -- the reference, in plain torch -----------------------------------------------------------------------------------


def norm(layer, x):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def hide(scores, causal, lengths):
    tokens = scores.shape[-1]
    if causal:
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if lengths is not None:
        scores = scores.masked_fill((torch.arange(tokens) >= lengths[:, None])[:, None, None], -torch.inf)
    return scores


def mssa(m, x, lengths=None):
    w = F.linear(x, m.projection.weight).unflatten(-1, (m.heads, -1)).transpose(1, 2)
    q = directions(m, w)
    o = hide(m.scale * q @ q.mT, m.causal, lengths).softmax(-1) @ w
    o = o.transpose(1, 2).flatten(2)
    if isinstance(m.output, TransposedProjection):
        return o @ m.projection.weight
    return F.linear(o, m.output.weight, m.output.bias) if isinstance(m.output, nn.Linear) else o


def directions(m, w):
    """Query and key ``(B, H, N, p)``: w itself, or normalized, then rotated as complex numbers."""
    if m.qk_norm is not None:
        eps = torch.finfo(w.dtype).eps
        w = w * (w.square().mean(-1, keepdim=True) + eps).rsqrt() * m.qk_norm.weight
    if m.rotary is not None:
        half = w.shape[-1] // 2
        position = torch.arange(w.shape[2], dtype=w.dtype)[:, None]
        angle = position * m.rotary ** (-torch.arange(half, dtype=w.dtype) / half)
        turned = torch.complex(w[..., :half], w[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        w = torch.cat([turned.real, turned.imag], -1)
    return w


def ista(m, x):
    w = m.weight
    return torch.relu(x + m.step_size * (x @ w - x @ w.T @ w) - m.step_size * m.lambd)


def overcomplete(m, x):
    a = x @ m.D
    z1 = torch.relu(m.step_size * a - m.step_size * m.lambd)
    z2 = torch.relu(z1 - m.step_size * (z1 @ m.D.T @ m.D - a) - m.step_size * m.lambd)
    return z2 @ (m.D if m.D1 is None else m.D1).T


def crate_block(m, z, lengths=None):
    z = (1 - m.shrink) * z + m.mssa_step_size * mssa(m.mssa, norm(m.mssa_norm, z), lengths)
    return ista(m.ista, norm(m.ista_norm, z))


def overcomplete_block(m, z, lengths=None):
    z = z + mssa(m.mssa, norm(m.mssa_norm, z), lengths)
    coded = overcomplete(m.ista, norm(m.ista_norm, z))
    return z + coded if m.residual else coded


def decoder_block(m, z, lengths=None):
    y = norm(m.dictionary_norm, z) @ m.dictionary.weight.T
    return y - mssa(m.mssa, norm(m.mssa_norm, y), lengths)


# -- comparison ----------------------------------------------------------------------------------------------------


def double(module):
    """``module`` in float64 with random parameters, so that no bias is zero and no gain is one."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def with_gradients(function, module, *inputs, **arguments):
    """Output and the gradients of the inputs and of every parameter, for a fixed random output gradient."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    out = function(*leaves, **arguments)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad((out * weights).sum(), [*leaves, *parameters.values()], allow_unused=True)
    return {"out": out.detach(), **dict(zip([*range(len(leaves)), *parameters], gradients, strict=True))}


def agree(module, reference, *inputs, **arguments):
    got = with_gradients(module, module, *inputs, **arguments)
    want = with_gradients(lambda *x, **a: reference(module, *x, **a), module, *inputs, **arguments)
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] is None) == (want[name] is None), name
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    return got


ATTENTION = [
    dict(dim=12, heads=3, dim_head=4),
    dict(dim=12, heads=2, dim_head=5),
    dict(dim=12, heads=1, dim_head=12),
    dict(dim=12, heads=3, dim_head=None, causal=True),
    dict(dim=12, heads=3, dim_head=4, output_bias=False),
]
VARIANTS = [
    dict(tied_output=True),
    dict(scale=1.0, tied_output=True, causal=True),
    dict(qk_norm=True),
    dict(rotary=100.0, causal=True),
    dict(rotary=10000.0, qk_norm=True, tied_output=True),
]
MODULES = [
    *[pytest.param(lambda o=o: MSSA(**o), mssa, id=f"mssa-{i}") for i, o in enumerate(ATTENTION)],
    pytest.param(lambda: ISTA(12, step_size=0.2, lambd=0.3), ista, id="ista"),
    pytest.param(lambda: OvercompleteISTA(12, expansion=2, step_size=0.2, lambd=0.3), overcomplete, id="tied"),
    pytest.param(lambda: OvercompleteISTA(12, expansion=3, tied=False), overcomplete, id="untied"),
    *[pytest.param(lambda o=o: CrateBlock(**o, step_size=0.3), crate_block, id=f"block-{i}")
      for i, o in enumerate(ATTENTION)],
    pytest.param(lambda: OvercompleteCrateBlock(12, 3, 4), overcomplete_block, id="alpha-block"),
    pytest.param(lambda: OvercompleteCrateBlock(12, 3, 4, tied=True, residual=False, causal=True),
                 overcomplete_block, id="lm-block"),
    pytest.param(lambda: CrateDecoderBlock(12, 3, 4, eps=1e-6), decoder_block, id="decoder-block"),
    *[pytest.param(lambda o=o: MSSA(12, 3, 4, **o), mssa, id="mssa-" + "-".join(o)) for o in VARIANTS],
    *[pytest.param(lambda o=o: CrateBlock(12, 3, 4, **o), crate_block, id="block-" + "-".join(o)) for o in VARIANTS],
    pytest.param(lambda: CrateBlock(12, 3, 4, mssa_step_size=0.3, shrink=0.3), crate_block, id="block-gradient-step"),
    pytest.param(lambda: CrateBlock(12, 3, 4, learnable="channel"), crate_block, id="block-learnable"),
    *[pytest.param(lambda o=o: ISTA(12, lambd=0.3, learnable=o), ista, id=f"ista-{o}") for o in ("scalar", "channel")],
    *[pytest.param(lambda o=o: OvercompleteISTA(12, expansion=2, learnable=o), overcomplete, id=f"tied-{o}")
      for o in ("scalar", "channel")],
    pytest.param(lambda: OvercompleteCrateBlock(12, 3, 4, learnable="channel", tied_output=True),
                 overcomplete_block, id="alpha-learnable"),
]  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize(("build", "reference"), MODULES)
def test_values_and_gradients(build, reference, tokens):
    torch.manual_seed(0)
    module = double(build())
    agree(module, reference, torch.randn(2, tokens, 12, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("build", "reference"), [(MSSA, mssa), (CrateBlock, crate_block), (OvercompleteCrateBlock, overcomplete_block)]
)
def test_lengths(build, reference, causal):
    torch.manual_seed(0)
    module = double(build(12, 3, 4, causal=causal))
    x, lengths = torch.randn(3, 6, 12, dtype=torch.float64), torch.tensor([6, 1, 4])
    agree(module, reference, x, lengths=lengths)
    # Tokens beyond the length change no token before it.
    changed = x.clone()
    changed[2, 4:] = 7
    torch.testing.assert_close(module(x, lengths)[2, :4], module(changed, lengths)[2, :4])


def test_decoder_lengths():
    module = double(CrateDecoderBlock(12, 3, 4))
    agree(module, decoder_block, torch.randn(2, 6, 12, dtype=torch.float64), lengths=torch.tensor([2, 6]))


def test_one_head_of_full_width_has_no_output_projection():
    assert isinstance(MSSA(8, 1, 8).output, nn.Identity)
    assert isinstance(MSSA(8, 1, 4).output, nn.Linear)
    assert isinstance(MSSA(8, 2, 4).output, nn.Linear)


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="dim_head"):
        MSSA(10, 3, None)


def test_attention_maps_are_those_of_the_output():
    module = double(MSSA(12, 3, 4, causal=True))
    x, lengths = torch.randn(2, 5, 12, dtype=torch.float64), torch.tensor([5, 3])
    maps = module.attention(x, lengths)
    assert maps.shape == (2, 3, 5, 5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    o = (maps @ module.project(x).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.output(o), module(x, lengths))


# -- variants ------------------------------------------------------------------------------------------------------


def test_defaults_have_the_parameters_they_had():
    assert list(CrateBlock(12, 3, 4).state_dict()) == [
        "mssa_norm.weight", "mssa_norm.bias", "mssa.projection.weight", "mssa.output.weight", "mssa.output.bias",
        "ista_norm.weight", "ista_norm.bias", "ista.weight",
    ]  # fmt: skip


def test_tied_output_follows_its_projection():
    module = double(MSSA(12, 3, 4, tied_output=True))
    assert list(module.state_dict()) == ["projection.weight"]
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.projection.weight.mul_(1.5)
    torch.testing.assert_close(other(x), mssa(other, x))
    assert not torch.allclose(other(x), module(x))
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other(x), module(x))


def test_rotation_depends_on_distances_alone():
    w = torch.randn(2, 6, 3, 8, dtype=torch.float64)
    assert torch.equal(rotate(w)[:, 0], w[:, 0])
    torch.testing.assert_close(rotate(w).norm(dim=-1), w.norm(dim=-1))
    near, far = (rotate(w, torch.arange(6) + shift).transpose(1, 2) for shift in (0, 100))
    torch.testing.assert_close(near @ near.mT, far @ far.mT)
    per_sequence = torch.stack([torch.arange(6), torch.arange(6) + 3])
    torch.testing.assert_close(rotate(w, per_sequence)[1], rotate(w, torch.arange(6) + 3)[1])
    module = double(MSSA(12, 3, 4, rotary=100.0, causal=True))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x, positions=torch.arange(5) + 7), module(x))
    assert not torch.allclose(module(x, positions=2 * torch.arange(5)), module(x))
    with pytest.raises(ValueError, match="even"):
        MSSA(12, 3, 5, rotary=100.0)


@pytest.mark.parametrize("options", [{}, dict(qk_norm=True, tied_output=True)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 4])])
def test_cross_attention(options, lengths):
    def reference(m, x, context):
        w, c = (m.project(t).transpose(1, 2) for t in (x, context))
        scores = m.scale * directions(m, w) @ directions(m, c).mT
        if lengths is not None:
            scores = scores.masked_fill((torch.arange(9) >= lengths[:, None])[:, None, None], -torch.inf)
        return m.output((scores.softmax(-1) @ c).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    module = double(MSSA(12, 3, 4, **options))
    x, context = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 9, 12, dtype=torch.float64)
    got = with_gradients(lambda x, c: module(x, lengths, context=c), module, x, context)
    want = with_gradients(lambda x, c: reference(module, x, c), module, x, context)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10)
    # Attention with the tokens as their own context equals attention without a context.
    torch.testing.assert_close(module(context, lengths, context=context), module(context, lengths))


def test_cross_attention_has_no_order():
    x = torch.randn(1, 4, 12)
    for options in (dict(causal=True), dict(rotary=100.0)):
        with pytest.raises(ValueError, match="context"):
            MSSA(12, 3, 4, **options)(x, context=x)


@pytest.mark.parametrize("build", [MSSA, CrateBlock, OvercompleteCrateBlock, CrateDecoderBlock])
def test_feature_maps(build):
    module = double(build(12, 3, 4))
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64)
    tokens = x.reshape(2, 12, 15).transpose(1, 2)
    assert module(x).shape == x.shape
    torch.testing.assert_close(module(x), module(tokens).transpose(1, 2).reshape(x.shape))


def test_feature_map_as_context():
    module = double(MSSA(12, 3, 4))
    queries, x = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 12, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(module(queries, context=x), module(queries, context=x.flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize("build", [ISTA, OvercompleteISTA])
@pytest.mark.parametrize("learnable", ["scalar", "channel"])
def test_learnable_step_passes_gradcheck(build, learnable, tokens):
    torch.manual_seed(0)
    module = double(build(4, learnable=learnable))
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


def test_learnable_step_starts_as_the_fixed_one():
    torch.manual_seed(0)
    for build in (ISTA, OvercompleteISTA):
        fixed = build(12, step_size=0.2, lambd=0.3)
        for learnable in ("scalar", "channel"):
            module = build(12, step_size=0.2, lambd=0.3, learnable=learnable)
            module.load_state_dict(module.state_dict() | fixed.state_dict())
            x = torch.randn(20, 12)
            torch.testing.assert_close(module(x), fixed(x))
    with pytest.raises(ValueError, match="learnable"):
        ISTA(4, learnable="token")


@pytest.mark.parametrize("fused", [{}, dict(tied_output=True)])
def test_half_step_adds_to_the_tokens(fused):
    module = double(CrateBlock(12, 3, 4, **fused))
    z = torch.randn(2, 7, 12, dtype=torch.float64)
    want = z - 0.4 * mssa(module.mssa, norm(module.mssa_norm, z))
    torch.testing.assert_close(mssa_half_step(module.mssa_norm, module.mssa, z, step_size=-0.4), want)


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [CrateBlock, OvercompleteCrateBlock, CrateDecoderBlock])
def test_dropout_acts_in_training_only(build):
    torch.manual_seed(0)
    module = double(build(12, 3, 4, dropout=0.4))
    z = torch.randn(2, 7, 12, dtype=torch.float64)
    first, second = module(z), module(z)
    assert not torch.equal(first, second)
    module.eval()
    reference = {CrateBlock: crate_block, OvercompleteCrateBlock: overcomplete_block, CrateDecoderBlock: decoder_block}
    agree(module, reference[build], z)


def test_dropout_of_maps_and_of_the_output():
    torch.manual_seed(0)
    module = double(MSSA(12, 3, 4, dropout=0.4))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.manual_seed(3)
    got = module(x)
    torch.manual_seed(3)
    w = module.project(x).transpose(1, 2)
    maps = F.dropout((module.scale * w @ w.mT).softmax(-1), 0.4)
    want = F.dropout(module.output((maps @ w).transpose(1, 2).flatten(2)), 0.4)
    torch.testing.assert_close(got, want)


# -- what people do with modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "reference"), MODULES)
def test_state_dict_round_trip(build, reference):
    first, second = build(), build()
    x = torch.randn(2, 5, 12)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    copied = copy.deepcopy(first)
    buffer = io.BytesIO()
    torch.save(first, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(first(x), copied(x))
    assert torch.equal(first(x), loaded(x))


@pytest.mark.parametrize(("build", "reference"), MODULES)
def test_autocast_gives_the_dtype_of_the_reference(build, reference):
    torch.manual_seed(0)
    module = build()
    x = torch.randn(2, 20, 12, requires_grad=True)
    full = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), use_backend("reference"):
        assert out.dtype == module(x).dtype  # the stream of a block stays float32, as in the reference
    torch.testing.assert_close(out.float(), full, rtol=0.1, atol=0.1)  # about four roundings of 2^-8 each
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "build",
    [
        MSSA,
        CrateBlock,
        OvercompleteCrateBlock,
        CrateDecoderBlock,
        lambda *sizes: CrateBlock(*sizes, tied_output=True, rotary=100.0, qk_norm=True, learnable="channel"),
    ],
)
def test_compiles_without_breaks_for_any_number_of_tokens(build):
    torch._dynamo.reset()
    module = build(12, 3, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (5, 9, 16):
            x = torch.randn(2, tokens, 12, requires_grad=True)
            (want,) = torch.autograd.grad(module(x).square().sum(), x)
            (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
            torch.testing.assert_close(got, want)


# -- the saved folded matrix ----------------------------------------------------------------------------------------


class Prepared:
    """An ISTA module with a filled cache. Its check compares a call's result and how the call used the cache."""

    def __init__(self):
        torch.manual_seed(0)
        self.ista = prepare_for_inference(ISTA(6))
        self.x = torch.randn(20, 6)
        self.check()

    def check(self):
        out = self.ista(self.x.to(self.ista.weight.dtype))
        with torch.no_grad():
            torch.testing.assert_close(out, ista(self.ista, self.x.to(self.ista.weight.dtype)))


def in_place(p):
    with torch.no_grad():
        p.ista.weight.mul_(2)


def optimizer_step(p):
    optimizer = torch.optim.SGD(p.ista.parameters(), lr=1.0)
    p.ista(p.x).sum().backward()
    optimizer.step()


def load(p):
    p.ista.load_state_dict(ISTA(6).state_dict())


def load_assigned(p):
    p.ista.load_state_dict(ISTA(6).state_dict(), assign=True)


def data_assigned(p):
    p.ista.weight.data = torch.randn(6, 6)


def replaced(p):
    # The new matrix may have the same address as the old one.
    del p.ista.weight
    p.ista.weight = nn.Parameter(torch.randn(6, 6))


def converted(p):
    p.ista.to(torch.float64)


def copied(p):
    p.ista = copy.deepcopy(p.ista)
    assert p.ista._folded is None
    in_place(p)


def trained(p):
    p.ista.train()
    in_place(p)
    p.ista.eval()


def under_inference_mode(p):
    with torch.inference_mode():
        in_place(p)
        p.check()
    p.ista(p.x).sum().backward()  # autograd refuses a matrix that was folded in inference mode


@pytest.mark.parametrize(
    "change",
    [in_place, optimizer_step, load, load_assigned, data_assigned, replaced, converted, copied, trained,
     under_inference_mode],
)  # fmt: skip
def test_folded_is_never_stale(change):
    prepared = Prepared()
    change(prepared)
    prepared.check()


def test_folded_is_cached_and_dropped():
    p = Prepared()
    assert p.ista.folded() is p.ista.folded() is not None
    p.ista.train()
    assert p.ista._folded is None
    assert p.ista.folded() is None
    p.check()
    assert ISTA(6).eval().folded() is None


def test_folded_leaves_gradients_alone():
    torch.manual_seed(0)
    module = prepare_for_inference(double(CrateBlock(12, 3, 4)))
    module(torch.randn(2, 9, 12, dtype=torch.float64))
    assert module.ista._folded is not None
    agree(module, crate_block, torch.randn(2, 9, 12, dtype=torch.float64))


def test_folded_under_compile():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = prepare_for_inference(CrateBlock(12, 3, 4))
    z = torch.randn(2, 9, 12)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        module(z)
        torch.testing.assert_close(compiled(z), crate_block(module, z))
        module.ista.weight.mul_(2)
        torch.testing.assert_close(compiled(z), crate_block(module, z))


def test_prepare_for_inference_returns_the_model_in_evaluation_mode():
    model = nn.Sequential(CrateBlock(12, 3, 4), OvercompleteCrateBlock(12, 3, 4))
    assert prepare_for_inference(model) is model
    assert not any(m.training for m in model.modules())
    assert model[0].ista.keep_folded


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"learnable": "channel"}])
def test_an_input_of_another_width_is_refused_by_its_own_name(options):
    modules = {"z": [CrateBlock(16, 2, 8, **options), CrateDecoderBlock(16, 2, 8), OvercompleteCrateBlock(16, 2, 8)]}
    modules["x"] = [MSSA(16, 2, 8), ISTA(16), OvercompleteISTA(16)]
    for name, several in modules.items():
        for module in several:
            with pytest.raises(ValueError, match=f"^{name}: expected width 16, got 17$"):
                module(torch.zeros(2, 5, 17))
            with pytest.raises(TypeError, match=f"^{name}: expected a torch.Tensor, got ndarray$"):
                module(torch.zeros(2, 5, 16).numpy())
            if not isinstance(module, ISTA | OvercompleteISTA):
                with pytest.raises(ValueError, match=f"^{name}: expected width 16, got 17$"):
                    module(torch.zeros(2, 17, 3, 16))
    with pytest.raises(ValueError, match=r"^context: expected width 16, got 17$"):
        MSSA(16, 2, 8)(torch.zeros(2, 5, 16), context=torch.zeros(2, 5, 17))
