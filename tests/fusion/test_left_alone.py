"""Modules that ``fuse`` leaves alone, and the reasons that it reports."""

import pytest
import torch
from torch import nn

from crate_kernels import fuse
from crate_kernels.nn import CrateBlock

from .compare import check, double, outcome
from .twins import Attention, FeedForward, PreNorm, Transformer, Vision

F = nn.functional


class OtherAttention(Attention):
    """q, k and v from three projections, as in a ViT."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads, dim // heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class NormalizedAttention(Attention):
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
        (lambda: NormalizedAttention(16, 2, 8), "does not compute subspace attention"),
        (lambda: DetachedAttention(16, 2, 8), "does not compute subspace attention"),
        (lambda: RecordingAttention(16, 2, 8), "stores something on the module"),
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


@pytest.mark.parametrize(("build", "reason"), [(StochasticDepth, "is random"), (Features, "returns a list")])
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
    assert report.left["ours.mssa"] == report.left["ours.ista"] == "already runs fused operators"
    assert "theirs" in report.fused
