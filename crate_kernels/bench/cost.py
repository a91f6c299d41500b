"""The least work of each operator, and the lower bound of its time.

The counts follow from the mathematics, not from an implementation: each matrix product counts multiplications and
additions, every input is read once, every output is written once, and each score needs one exponential. Attention
counts the customary 4·N²·p operations forward and 10·N²·p backward, so that the results compare with those of other
kernels. A kernel that uses the symmetry of ``w wᵀ`` needs 6 of the 8 half-products forward and 7 of 10 backward, so it
can exceed 100 %. An ISTA step counts one product forward and two backward (the folded form). The computation of ``W −
WᵀW`` (2·d³, independent of the rows) is not counted. LayerNorm, ReLU and residuals are a few operations per element,
which take less time than the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Peaks:
    """Measured peaks of the device in this run; ``exponentials`` is None if unknown."""

    copy: float
    """Bytes per second of a large copy, reads plus writes."""
    product: float
    """Floating-point operations per second of a large matrix product in the dtype measured."""
    exponentials: float | None = None
    """Exponentials per second."""


@dataclass(frozen=True)
class Cost:
    """Least work of one call."""

    flops: float
    bytes: float
    exponentials: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.exponentials + other.exponentials)

    def terms(self, peak_rates: Peaks) -> dict[str, float]:
        """Seconds that each unit needs for this work at its measured peak."""
        found = {"product": self.flops / peak_rates.product, "memory": self.bytes / peak_rates.copy}
        if peak_rates.exponentials:
            found["exponentials"] = self.exponentials / peak_rates.exponentials
        return found

    def bound(self, peak_rates: Peaks) -> float:
        """Lower bound in seconds: the largest term. The other terms are assumed to overlap with it perfectly."""
        return max(self.terms(peak_rates).values())


def _in(direction: str, forward: Cost, backward: Cost) -> Cost:
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def subspace_attention(
    direction: str, *, batch: int, tokens: int, heads: int, width: int, causal: bool, itemsize: int
) -> Cost:
    """The forward reads ``w`` and writes ``o``. The backward reads ``w, o`` and the gradient, and writes ``dw``."""
    pairs = batch * heads * tokens * (tokens + 1) / 2 if causal else batch * heads * tokens * tokens
    tensor = batch * tokens * heads * width * itemsize
    return _in(
        direction,
        Cost(4 * pairs * width, 2 * tensor, pairs),
        Cost(10 * pairs * width, 4 * tensor, pairs),
    )


def ista_step(direction: str, *, rows: int, dim: int, itemsize: int) -> Cost:
    """The forward reads ``x, W`` and writes the output. The backward also reads the gradient, and writes ``dx, dW``."""
    tensor, weight = rows * dim * itemsize, dim * dim * itemsize
    return _in(
        direction,
        Cost(2 * rows * dim * dim, 2 * tensor + weight),
        Cost(4 * rows * dim * dim, 4 * tensor + 2 * weight),
    )


ista_block = ista_step
"""The cost of the step. LayerNorm adds no product and, in a fused kernel, no bytes."""


def overcomplete_ista(direction: str, *, rows: int, dim: int, atoms: int, tied: bool, itemsize: int) -> Cost:
    """Four products of ``rows·dim·atoms`` forward, eight backward. The codes can stay on the chip."""
    product, tensor = 2 * rows * dim * atoms, rows * dim * itemsize
    weights = (1 if tied else 2) * dim * atoms * itemsize
    return _in(direction, Cost(4 * product, 2 * tensor + weights), Cost(8 * product, 3 * tensor + 2 * weights))


def mssa_block(
    direction: str, *, batch: int, tokens: int, heads: int, width: int, dim: int, causal: bool, itemsize: int
) -> Cost:
    """Projection, attention, output projection. Only the backward reads ``w`` and ``o`` again."""
    attention = subspace_attention(
        direction, batch=batch, tokens=tokens, heads=heads, width=width, causal=causal, itemsize=itemsize
    )
    rows, inner = batch * tokens, heads * width
    projection, weights = 2 * rows * dim * inner, 2 * dim * inner * itemsize
    outer, middle = rows * dim * itemsize, rows * inner * itemsize
    moved = _in(
        direction,
        Cost(2 * projection, 2 * outer + weights),
        Cost(4 * projection, 3 * outer + 2 * middle + 2 * weights),
    )
    return Cost(attention.flops + moved.flops, moved.bytes, attention.exponentials)


def crate_layer(
    direction: str, *, batch: int, tokens: int, heads: int, width: int, dim: int, causal: bool, itemsize: int
) -> Cost:
    """Both halves of a layer. The tokens between them are written once and read once, as with two blocks."""
    first = mssa_block(
        direction, batch=batch, tokens=tokens, heads=heads, width=width, dim=dim, causal=causal, itemsize=itemsize
    )
    return first + ista_block(direction, rows=batch * tokens, dim=dim, itemsize=itemsize)


def cached_subspace_attention(*, batch: int, tokens: int, heads: int, width: int, itemsize: int) -> Cost:
    """One new token against ``tokens`` cached ones. The cache is read once, as key and as value."""
    pairs = batch * heads * tokens
    return Cost(4 * pairs * width, pairs * width * itemsize, pairs)
