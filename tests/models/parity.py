"""Compares a model under two backends, and with written-out equations: outputs and every gradient."""

import torch

from crate_kernels import ops
from crate_kernels.agreement import judge


def outputs_and_gradients(model, function, backend=None):
    """``function(model) -> tensors``; returns them and the gradient of every trainable parameter it reaches."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with ops.use_backend(backend):
        outputs = function(model)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o).cos() for o in outputs]
        total = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))
        gradients = torch.autograd.grad(total, parameters.values(), allow_unused=True)
    return outputs, dict(zip(parameters, gradients, strict=True))


def assert_same(actual, expected, unused=()):
    for a, e in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    for name, gradient in expected[1].items():
        if name.startswith(unused) and unused:
            assert gradient is None
            assert actual[1][name] is None
        else:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(actual[1][name], gradient, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: n + m)


def assert_backends_agree(model, function, unused=()):
    """``eager`` and ``reference`` at 1e-10."""
    model = model.double()
    assert_same(
        outputs_and_gradients(model, function, "eager"), outputs_and_gradients(model, function, "reference"), unused
    )


def logits_and_gradients(model, images, backend):
    """Logits and gradients of a classifier, with image i in class i."""
    with ops.use_backend(backend):
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.arange(len(images), device=images.device))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [logits.detach(), *gradients]


def assert_within_budget(got, reference, exact, dtype):
    """Logits and all gradients together are within the error budget of a whole model: ``crate_kernels.agreement``."""
    verdict = judge(got, exact, reference, dtype, kinks=False, together=True)
    assert verdict.passed, verdict.detail


def attention(x, mssa):
    """Softmax(w wᵀ / sqrt(p)) w per head and the output projection, head by head."""
    heads = [
        torch.softmax(w @ w.transpose(1, 2) / w.shape[-1] ** 0.5, dim=-1) @ w
        for w in (x @ mssa.projection.weight.T).chunk(mssa.heads, dim=-1)
    ]
    return mssa.output(torch.cat(heads, dim=-1))
