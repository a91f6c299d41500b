"""Use one operator in a network that is not a transformer: ISTA steps as the layers of a small digit classifier.

Each layer codes the image with its own dictionary. No coefficient is negative, and many are zero. The data are the
1,797 digits of 8 x 8 pixels that come with scikit-learn.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from crate_kernels.ops import ista_step


class SparseCoder(nn.Module):
    """``depth`` ISTA steps, each with its own dictionary, then a linear classifier."""

    def __init__(self, dim=64, depth=3, classes=10, threshold=0.1):
        super().__init__()
        self.dictionaries = nn.ParameterList(torch.randn(dim, dim) / dim**0.5 for _ in range(depth))
        self.head = nn.Linear(dim, classes)
        self.threshold = threshold

    def codes(self, x):
        """``x (B, d)`` -> sparse codes ``(B, d)``, none negative."""
        for dictionary in self.dictionaries:
            # One differentiable operator. It computes one matrix product instead of the three in the equation.
            x = ista_step(x, dictionary, step_size=0.5, lambd=self.threshold)
        return x

    def forward(self, x):
        return self.head(self.codes(x))


def main(epochs=20):
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    order = torch.randperm(len(images))
    training, test = order[:1400], order[1400:]
    model = SparseCoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(epochs):
        for part in torch.randperm(len(training)).split(100):
            batch = training[part]
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(-1) == labels[test]).float().mean().item()
        nonzero = (model.codes(images[test]) > 0).float().mean().item()
    print(f"test accuracy {accuracy:.3f}; {nonzero:.0%} of the coefficients are not zero")
    return accuracy


if __name__ == "__main__":
    main()
