"""What measuring costs: ``python -m crate_kernels.analysis.cost``.

The first table compares two equal determinants: the small one, and the N×N one of the definition. It uses the shapes of
CRATE models. The second table compares the probe, at its default period, with the training steps between two
measurements.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ..models import CRATE
from ..terminal import count
from ..timing import medians
from .objective import subspace_coding_rate
from .probe import LayerwiseProbe

SHAPES = {
    "CRATE-T/16, 224 px": (4, 6, 197, 64),
    "CRATE-S/16, 224 px": (4, 12, 197, 48),
    "CRATE-B/8, 224 px": (1, 12, 785, 64),
    "CRATE-GPT2, 1024 tokens": (1, 12, 1024, 64),
}
"""(B, H, N, p)"""


def reference_rate(w: Tensor, eps: float = 0.1) -> Tensor:
    """``Σ_h ½ logdet(I_N + p/(N·eps²) w_h w_hᵀ)``, computed exactly like this in float64."""
    tokens, width = w.shape[-2:]
    unit = normalize(w.double(), dim=-1)
    gram = torch.eye(tokens, dtype=torch.float64) + width / (tokens * eps**2) * unit @ unit.mT
    return 0.5 * torch.logdet(gram).sum(dim=-1).to(w.dtype)


def determinants(repeats: int = 5) -> None:
    """Compare the values of both determinants, and print the milliseconds of each."""
    print("| shape (B, H, N, p) | N×N as defined, ms | smaller, ms | times as fast |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(subspace_coding_rate(w), reference_rate(w), rtol=1e-5, atol=1e-3)
        times = medians(
            {"definition": partial(reference_rate, w), "smaller": partial(subspace_coding_rate, w)},
            torch.device("cpu"),
            repeats,
        )
        ratio = times["definition"] / times["smaller"]
        print(f"| {name} {shape} | {1e3 * times['definition']:.1f} | {1e3 * times['smaller']:.1f} | {ratio:.1f} |")


def probe(repeats: int = 9) -> None:
    """Print the share of training time that the probe takes, for models that ``crate-kernels train`` builds."""
    print("\n| model and batch | training step, ms | one measurement, ms | share of training time |\n|---|---|---|---|")
    models: list[tuple[str, int, dict[str, Any]]] = [
        (
            "digits, 17 tokens",
            128,
            dict(image_size=28, patch_size=7, channels=1, dim=96, depth=4, heads=4, dim_head=24),
        ),
        ("197 tokens", 16, dict(image_size=224, patch_size=16, dim=192, depth=6, heads=3)),
    ]
    for name, batch, sizes in models:
        model = CRATE(num_classes=10, **sizes)
        images = torch.randn(batch, model.patch_embedding.channels, sizes["image_size"], sizes["image_size"])
        labels = torch.randint(10, (batch,))
        optimizer = torch.optim.AdamW(model.parameters())

        def step(model=model, images=images, labels=labels, optimizer=optimizer):
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        measuring = LayerwiseProbe()
        times = medians({"step": step, "probe": partial(measuring.step, 0, model, images)}, images.device, repeats)
        share = times["probe"] / (measuring.every * times["step"])
        print(
            f"| {name}, batch {batch} | {1e3 * times['step']:.1f} | {1e3 * times['probe']:.1f} | {100 * share:.2f} % |"
        )


if __name__ == "__main__":
    print(f"{count(torch.get_num_threads(), 'thread')}, torch {torch.__version__}\n")
    determinants()
    probe()
