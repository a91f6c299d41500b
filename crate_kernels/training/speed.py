"""Speed of a model with the requested (or automatic) backend and with ``reference``, on one real batch."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..agreement import Verdict, judge
from ..models.base import CrateModel
from ..ops import requested_backend, use_backend
from ..timing import medians

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def training_step(model: nn.Module, images: Tensor, labels: Tensor, precision: str, backend: str | None = None):
    """Forward, loss and backward, without the optimizer; gradients are left on the model."""
    model.zero_grad()
    with use_backend(backend), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images)
        cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    return logits.detach()


def against_reference(model: CrateModel, images: Tensor, labels: Tensor, precision: str) -> dict[str, dict[str, float]]:
    """Images per second of the requested (or automatic) backend and of ``reference``, forward and training step.

    Raises:
        RuntimeError: the two results differ, so that a comparison of times has no meaning.
    """
    model = copy.deepcopy(model).eval()  # dropout would make the outputs differ
    backend = requested_backend()
    few = _some(model, images, labels)
    verdict = agreement(model, *few, precision, backend)
    if not verdict.passed:
        raise RuntimeError(f"the backends disagree, so no speed is measured ({verdict.detail})")
    inference = copy.deepcopy(model).prepare_for_inference()

    @torch.no_grad()
    def forward(name: str | None):
        with use_backend(name), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            inference(images)

    rounds = 15 if len(few[0]) == len(images) else 5
    result = {}
    for what, function in (
        ("forward", forward),
        ("training step", partial(training_step, model, images, labels, precision)),
    ):
        runs = {"ours": partial(function, backend), "reference": partial(function, "reference")}
        rates = {name: len(images) / value for name, value in medians(runs, images.device, rounds).items()}
        result[what] = {
            "images_per_second": rates["ours"],
            "reference_images_per_second": rates["reference"],
            "ratio": rates["ours"] / rates["reference"],
        }
    return result


def agreement(model: nn.Module, images: Tensor, labels: Tensor, precision: str, backend: str | None) -> Verdict:
    """Compare logits and gradients of ``backend`` with the exact ones, see :mod:`crate_kernels.agreement`."""

    def results(model: nn.Module, images: Tensor, precision: str, name: str | None) -> list[Tensor]:
        logits = training_step(model, images, labels, precision, name)
        return [logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    exact = results(copy.deepcopy(model).double(), images.double(), "fp64", "reference")
    reference = results(model, images, precision, "reference")
    ours = results(model, images, precision, backend)
    return judge(ours, exact, reference, DTYPES[precision], kinks=True, together=True)


def _some(model: CrateModel, images: Tensor, labels: Tensor, tokens: int = 4096) -> tuple[Tensor, Tensor]:
    """The first images, with about ``tokens`` tokens together: enough to measure, and quick."""
    per_image = model.position_embedding.shape[1]
    count = max(1, min(len(images), tokens // per_image))
    return images[:count], labels[:count]
