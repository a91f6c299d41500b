"""Write a new variant of CRATE: change the layer, keep everything else of the model.

The variant takes several ISTA steps in each layer instead of one. It also ties the output projection to the subspaces,
as in the paper's equation. Every other part (embedding, head, saving, timm-style features) is inherited.

    python examples/write_a_variant.py
"""

import torch

from crate_kernels import ops, use_backend
from crate_kernels.models import CRATE
from crate_kernels.nn import CrateBlock


class UnrolledBlock(CrateBlock):
    """``z' = z + MSSA(LN z)``, then K ISTA steps with one dictionary instead of a single step."""

    steps = 3

    def __init__(self, dim, heads, dim_head, **options):
        super().__init__(dim, heads, dim_head, tied_output=True, **options)

    def sparsify(self, z):
        x = self.ista_norm(z)
        for _ in range(self.steps):
            # The operator has its own gradient and chooses its kernel, like any layer of the package.
            x = ops.ista_step(x, self.ista.weight, step_size=self.ista.step_size, lambd=self.ista.lambd)
        return x


class UnrolledCRATE(CRATE):
    """CRATE with :class:`UnrolledBlock` as its layer."""

    block = UnrolledBlock


def main():
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=4, dim_head=16)
    model = UnrolledCRATE(**sizes).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    logits = model(images)
    with use_backend("reference"):  # the published equations without kernels, as a check
        expected = model(images)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, logits {tuple(logits.shape)}")
    error = (logits - expected).abs().max().item()
    print(f"largest difference from the reference equations: {error:.1e}")
    print(f"non-zero fraction of each layer's tokens: {nonzero(model, images)}")
    return error


def nonzero(model, images):
    features = model.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
    return [round((tokens != 0).double().mean().item(), 2) for tokens in features]


if __name__ == "__main__":
    main()
