"""How fast a model runs: the automatic backend against ``reference``, and bf16 against fp32, on one real batch."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..ops import requested_backend, use_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-2, repeats):  # the first two turns warm up
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(model: nn.Module, images: Tensor, labels: Tensor, precision: str, backend: str | None = None):
    """Forward, loss and backward, without the optimiser; gradients are left on the model."""
    model.zero_grad()
    with use_backend(backend), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images)
        cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    return logits.detach()


def faster_precision(model: nn.Module, images: Tensor, labels: Tensor) -> str:
    """``"bf16"`` where a training step under autocast takes at least a tenth less time than in float32.

    Measured, because no capability flag tells: a GPU always wins, a CPU only with bf16 instructions and fast kernels
    for the shapes at hand.
    """
    model = copy.deepcopy(model).train()
    images, labels = _some(model, images, labels)
    times = interleaved_medians(
        {
            precision: lambda p=precision: training_step(model, images, labels, p, requested_backend())
            for precision in DTYPES
        },
        5,
        images.device,
    )
    return "bf16" if times["bf16"] < 0.9 * times["fp32"] else "fp32"


def against_reference(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> dict[str, dict[str, float]]:
    """Images per second of the requested (or automatic) backend and of ``reference``, forward and training step.

    Raises:
        RuntimeError: the two do not agree on this batch, so their times mean nothing.
    """
    model = copy.deepcopy(model).eval()  # dropout would make the outputs differ
    backend = requested_backend()
    few = _some(model, images, labels)
    check_agreement(model, *few, precision, backend)

    inference = copy.deepcopy(model).prepare_for_inference()

    @torch.no_grad()
    def forward(name: str | None):
        with use_backend(name), torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            inference(images)

    repeats = 15 if len(few[0]) == len(images) else 5
    result = {}
    for what, function in (
        ("forward", forward),
        ("training step", lambda name: training_step(model, images, labels, precision, name)),
    ):
        seconds = interleaved_medians(
            {"ours": lambda f=function: f(backend), "reference": lambda f=function: f("reference")},
            repeats,
            images.device,
        )
        rates = {name: len(images) / value for name, value in seconds.items()}
        result[what] = {
            "images_per_second": rates["ours"],
            "reference_images_per_second": rates["reference"],
            "ratio": rates["ours"] / rates["reference"],
        }
    return result


def check_agreement(model: nn.Module, images: Tensor, labels: Tensor, precision: str, backend: str | None) -> None:
    """Logits and gradient err no more than twice as much as the reference backend's do in the same precision.

    The truth is the reference backend in float64. One rounding of the truth's norm is granted on top, since either
    error may happen to be near zero.
    """

    def results(model: nn.Module, images: Tensor, precision: str, name: str | None) -> dict[str, Tensor]:
        logits = training_step(model, images, labels, precision, name)
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return {"logits": logits.double(), "the gradient": torch.cat(gradients)}

    truth = results(copy.deepcopy(model).double(), images.double(), "fp64", "reference")
    reference = results(model, images, precision, "reference")
    ours = results(model, images, precision, backend)
    for name, exact in truth.items():
        rounding = torch.finfo(DTYPES[precision]).eps * exact.norm()
        budget = 2 * (reference[name] - exact).norm() + rounding
        error = (ours[name] - exact).norm()
        if not error <= budget:
            raise RuntimeError(
                f"the backends disagree on {name}: the error {error:.2e} exceeds {budget:.2e}; no speed is measured"
            )


def _some(model: nn.Module, images: Tensor, labels: Tensor, tokens: int = 4096) -> tuple[Tensor, Tensor]:
    """As many images as make about ``tokens`` tokens: enough to measure and compare by, and soon done."""
    per_image = model.position_embedding.shape[1]
    count = max(1, min(len(images), tokens // per_image))
    return images[:count], labels[:count]
