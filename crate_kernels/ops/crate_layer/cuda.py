"""A whole CRATE layer in CUDA C++ and cuBLASLt: the two halves one after the other."""

from __future__ import annotations

from ..ista_block import cuda as ista_block
from ..mssa_block import cuda as mssa_block
from .halves import compose

why_not, forward, backward = compose(mssa_block, ista_block)
