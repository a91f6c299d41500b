"""Compares models: outputs, gradients, and the operators that they call."""

import torch

from crate_kernels import ops


def double(module):
    """``module`` in float64, with parameters that differ from the defaults."""
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
    """Counts the calls of operators, so that a test can check which route was taken."""

    NAMES = ("crate_layer", "subspace_attention", "mssa_block", "ista_step", "ista_block", "overcomplete_ista")

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


VISION = {"crate_layer": 2}
