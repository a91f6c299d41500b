"""ISTA modules with their step size and threshold as numbers in their code."""

import pickle

import pytest
import torch
from torch import nn

from crate_kernels import fuse, unfuse

from .compare import check, double, outcome
from .twins import OvercompleteISTABlock, PreNorm, Transformer

F = nn.functional


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
    ("kind", "numbers", "expected"),
    [
        (InCode, "step_size = 0.3, lambd = 0.07", {"crate_layer": 2}),
        (NoThreshold, "step_size = 0.3333333333, lambd = 0", {"crate_layer": 2}),
        (ThresholdInCode, "with lambd = 0.05", {"crate_layer": 2}),
        (RowsInCode, "step_size = 0.1, lambd = 0.2", {"mssa_block": 2, "overcomplete_ista": 2}),
        (DictionariesInCode, "step_size = 1.5, lambd = 0.4", {"mssa_block": 2, "overcomplete_ista": 2}),
    ],
)
def test_numbers_in_the_code_are_measured(kind, numbers, expected, calls):
    torch.manual_seed(0)
    model = double(Transformer(16, 2, 2, 8))
    for pair in model.layers:
        pair[1] = PreNorm(16, double(kind(16))).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    want = outcome(model, x)
    report = fuse(model)
    assert numbers in report.fused["layers.1.1.fn"]
    assert calls.of(model, x) == expected
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
