"""Errors and memory of CRATE-T and CRATE-S under bfloat16 autocast, with a float32 and a bfloat16 residual stream.

    python benchmarks/residual_stream.py

The table has the relative errors of the logits, and of all gradients together, against the reference equations in
float64. The weights are random. The script prints the table of ``docs/numerics.md``.
"""

import copy
import math

import torch
from torch import Tensor, nn

from crate_kernels import use_backend
from crate_kernels.agreement import relative
from crate_kernels.bench.models import saved_bytes
from crate_kernels.models import CRATE_small, CRATE_tiny

RUNS = (
    ("reference", "reference", None),
    ("here, float32 stream", None, None),
    ("here, bfloat16 stream", None, torch.bfloat16),
)
"""Name, backend, dtype of the residual stream."""


def outcome(model: nn.Module, images: Tensor, backend: str | None, autocast: bool) -> list[Tensor]:
    """The logits and all gradients."""
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    loss = nn.functional.cross_entropy(logits.to(images.dtype), torch.arange(len(images)))
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def together(got: list[Tensor], exact: list[Tensor]) -> float:
    """``‖got − exact‖ / ‖exact‖`` of all tensors as one vector."""
    wrong = sum((a.double() - b).square().sum().item() for a, b in zip(got, exact, strict=True))
    return math.sqrt(wrong / sum(b.square().sum().item() for b in exact))


def main() -> None:
    print("| | | logits | gradients | bytes saved per token-channel and layer |")
    print("|---|---|---|---|---|")
    for size, build in (("CRATE-T", CRATE_tiny), ("CRATE-S", CRATE_small)):
        errors: dict[str, list[tuple[float, float]]] = {name: [] for name, _, _ in RUNS}
        for seed in range(4):
            torch.manual_seed(seed)
            model, images = build(), torch.randn(2, 3, 224, 224)
            exact = outcome(copy.deepcopy(model).double(), images.double(), "reference", autocast=False)
            for name, backend, dtype in RUNS:
                model.residual_dtype = dtype
                got = outcome(model, images, backend, autocast=True)
                errors[name].append((relative(got[0], exact[0]), together(got[1:], exact[1:])))
        tokens = model.embed(torch.randn(8, 3, 224, 224)).detach().requires_grad_()
        for name, backend, dtype in RUNS:
            model.residual_dtype = dtype
            one, two = (saved_bytes(model.blocks[:depth], tokens, torch.bfloat16, backend) for depth in (1, 2))
            logits, gradients = torch.tensor(errors[name]).log().mean(0).exp().tolist()
            print(f"| {size} | {name} | {logits:.1e} | {gradients:.1e} | {(two - one) / tokens.numel():.1f} |")


if __name__ == "__main__":
    main()
