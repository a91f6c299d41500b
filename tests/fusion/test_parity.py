"""A fused model gives the outputs and gradients of the model it was made from."""

import copy

import pytest
import torch
from torch import nn

from crate_kernels import fuse, ops, unfuse
from crate_kernels.nn import prepare_for_inference

from .compare import VISION, check, double, outcome
from .twins import GPT, MAE, AlphaTransformer, FeedForward, Vision

F = nn.functional


MODELS = [
    pytest.param(Vision, 12, VISION, id="vision"),
    pytest.param(lambda: Vision(heads=1, dim_head=16), 12, VISION, id="one-head"),
    pytest.param(MAE, 16, {"crate_layer": 2, "mssa_block": 2}, id="mae"),
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
    assert not any("_crate_fusion" in vars(m) for m in model.modules())
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
    assert causal["h.0.attn"] == "CausalSelfAttention: subspace_attention, causal, up to 32 tokens"


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
