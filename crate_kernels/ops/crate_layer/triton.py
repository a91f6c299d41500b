"""A whole CRATE layer in Triton: the two halves one after the other."""

from __future__ import annotations

from ..ista_block import triton as ista_block
from ..mssa_block import triton as mssa_block
from .halves import compose

why_not, forward, backward = compose(mssa_block, ista_block)
