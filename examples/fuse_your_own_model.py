"""Speed up a CRATE model that you wrote yourself: ``fuse`` finds its layers under any class names."""

import torch
from torch import nn

from crate_kernels import fuse, unfuse


class Compress(nn.Module):
    """Subspace self-attention: one projection is query, key and value."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x):
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        maps = (self.scale * w @ w.transpose(-1, -2)).softmax(-1)
        return self.to_out((maps @ w).transpose(1, 2).flatten(2))


class Sparsify(nn.Module):
    """One ISTA step: a gradient step on the reconstruction error, then soft thresholding."""

    def __init__(self, dim, step_size=0.1, lambd=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self.step_size, self.lambd = step_size, lambd

    def forward(self, x):
        gradient = x @ self.weight - x @ self.weight.T @ self.weight
        return torch.relu(x + self.step_size * gradient - self.step_size * self.lambd)


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Compress(dim, heads)
        self.norm2, self.ista = nn.LayerNorm(dim), Sparsify(dim)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return self.ista(self.norm2(x))


def main():
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Layer(192, 6) for _ in range(4))), torch.randn(8, 197, 192)
    before = model(x)
    print(fuse(model))  # in place; parameters, state_dict keys and hooks do not change
    difference = (model(x) - before).abs().max().item()
    print(f"largest difference of the outputs: {difference:.1e}")
    unfuse(model)
    return difference


if __name__ == "__main__":
    main()
