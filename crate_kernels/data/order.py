"""The order in which a run reads its samples: a shuffle of any size that needs no memory and can start anywhere."""

from __future__ import annotations

import numpy as np

ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # the constants of splitmix64


def seed_for(*parts: int) -> int:
    """One seed below 2³² from several non-negative integers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _mixed(x: np.ndarray) -> np.ndarray:
    """A hash of each ``uint64`` (the last step of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def shuffled(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The entries at ``positions`` of one permutation of ``range(count)``. The permutation is never stored.

    A Feistel network permutes the next power of four. A result that is not below ``count`` goes through the network
    again until it is ("cycle walking"; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", section 4). This
    takes less than four passes on average.

    Args:
        positions: integers in ``range(count)``, of any shape.
        count: size of the permutation, from 1 to 2⁶².
        seed: chooses the permutation.

    Returns:
        int64, of the shape of ``positions``.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < count:
        raise ValueError(f"positions must lie in 0..{count - 1}")
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)
    values = positions.astype(np.uint64).ravel()
    walking = np.arange(values.size)
    while walking.size:
        left, right = values[walking] >> half, values[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        values[walking] = (left << half) | right
        walking = walking[values[walking] >= count]
    return values.astype(np.int64).reshape(positions.shape)


def epochs(first: int, count: int, per_epoch: int) -> list[tuple[int, np.ndarray]]:
    """The samples ``first`` to ``first + count`` of an endless run, as pairs of (epoch, positions in the epoch)."""
    parts = []
    while count:
        epoch, position = divmod(first, per_epoch)
        taken = min(count, per_epoch - position)
        parts.append((epoch, np.arange(position, position + taken)))
        first, count = first + taken, count - taken
    return parts
