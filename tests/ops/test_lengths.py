"""``lengths``: tokens beyond a length change no result, even if they are NaN. Bad lengths raise an error everywhere."""

import pytest
import torch

from crate_kernels import ops
from crate_kernels.nn import MSSA
from crate_kernels.ops.subspace_attention import eager as eager_attention

from .oracle import skip_without

BACKENDS = ["reference", "eager", "blocked", "cpu"]


@pytest.fixture
def backend(request, monkeypatch):
    """The backend's name. "blocked" is the eager backend as it runs where torch has no flash kernel."""
    skip_without(request.param)
    if request.param == "blocked":
        monkeypatch.setattr(eager_attention, "_has_flash", lambda w: False)
        return "eager"
    return request.param


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


NORM, U, OUT, DICTIONARY = (
    (1 + normal(32) / 4, normal(32) / 4),
    normal(32, 32) / 6,
    normal(32, 32) / 5,
    normal(32, 32) / 6,
)
MAPS = MSSA(32, 2, 16, dropout=1e-9).train()

OPERATORS = {
    "attention": lambda z, **options: ops.subspace_attention(z.unflatten(-1, (2, 16)), **options).flatten(2),
    "value": lambda z, **options: ops.subspace_attention(*(z.unflatten(-1, (2, 16)),) * 2, **options).flatten(2),
    "causal": lambda z, **options: ops.subspace_attention(z.unflatten(-1, (2, 16)), causal=True, **options).flatten(2),
    "block": lambda z, **options: ops.mssa_block(z, *NORM, U, OUT, NORM[1], heads=2, **options),
    "layer": lambda z, **options: ops.crate_layer(z, *NORM, U, OUT, NORM[1], *NORM, DICTIONARY, heads=2, **options),
}
"""Everything that takes ``lengths``, as a function of tokens ``(B, N, 32)``."""
GRADIENTS = [name for name in OPERATORS if name != "layer"]
"""Operators whose gradients are checked. A layer's second LayerNorm gives a NaN token a NaN gradient."""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_hidden_tokens_of_any_value_reach_no_visible_row(backend, operator, bad):
    tokens = 40 if operator == "causal" else 100
    lengths = torch.tensor([21, tokens])
    z, grad = normal(2, tokens, 32), normal(2, tokens, 32)
    grad[0, 21:] = 0
    poisoned = z.clone()
    poisoned[0, 21:] = bad
    results = []
    for x in (z.requires_grad_(), poisoned.requires_grad_()):
        out = OPERATORS[operator](x, lengths=lengths, backend=backend)
        results.append([out[0, :21].detach(), out[1].detach()])
        if operator in GRADIENTS:
            (dx,) = torch.autograd.grad(out, x, grad)
            results[-1] += [dx[0, :21], dx[1]]
    for clean, other in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_tokens_of_any_value_in_modules_that_run_without_operators(bad):
    """Attention with dropout, which stores its attention maps, and cross-attention."""
    z, context = normal(2, 9, 32), normal(2, 9, 32)
    poisoned = context.clone()
    poisoned[0, 4:] = bad
    lengths = torch.tensor([4, 9])
    torch.testing.assert_close(
        MAPS(poisoned, lengths)[lengths[:, None] > torch.arange(9)],
        MAPS(context, lengths)[lengths[:, None] > torch.arange(9)],
    )
    torch.testing.assert_close(MAPS(z, lengths, context=poisoned), MAPS(z, lengths, context=context))


WAYS = OPERATORS | {
    "maps": lambda z, lengths, backend: ops.attention_maps(z.unflatten(-1, (2, 16)), 0.25, False, lengths),
    "dropout": lambda z, lengths, backend: MAPS(z, lengths),
    "cross": lambda z, lengths, backend: MAPS(z, lengths, context=z),
}


@pytest.mark.parametrize("lengths", [[0, 5], [3, 6]])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["reference", "eager", "cpu"], indirect=True)
def test_values_out_of_range_are_an_error(backend, way, lengths):
    message = rf"lengths: values must lie in 1\.\.5 .* got {lengths[0]}\.\.{lengths[1]}"
    with pytest.raises(ValueError, match=message):
        WAYS[way](normal(2, 5, 32), lengths=torch.tensor(lengths), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "eager"], indirect=True)
def test_values_out_of_range_are_an_error_in_compiled_and_exported_graphs(backend):
    class Model(torch.nn.Module):
        def forward(self, z, lengths):
            return OPERATORS["attention"](z, lengths=lengths, backend=backend)

    model, z, good = Model(), normal(2, 5, 32), torch.tensor([2, 5])
    torch._dynamo.reset()
    shapes = {1: torch.export.Dim("tokens", min=2, max=64)}, None
    exported = torch.export.export(model, (z, good), dynamic_shapes=shapes).module()
    for graph in (torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True), exported):
        torch.testing.assert_close(graph(z, good), model(z, good))
        for bad in ([0, 5], [3, 6]):
            with pytest.raises((ValueError, RuntimeError), match="lengths: values must"):
                graph(z, torch.tensor(bad))
