"""A whole CRATE layer in stock PyTorch: the two halves one after the other."""

from __future__ import annotations

from ..ista_block import eager as ista_block
from ..mssa_block import eager as mssa_block
from .halves import compose

why_not, forward, backward = compose(mssa_block, ista_block)
