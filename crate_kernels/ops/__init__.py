"""The operators of CRATE's layers as differentiable functions; one folder each, with api, op and a file per backend."""

from .backends import requested_backend as requested_backend
from .backends import use_backend as use_backend
from .crate_layer import crate_layer as crate_layer
from .ista_block import ista_block as ista_block
from .ista_step import fold as fold
from .ista_step import ista_step as ista_step
from .mssa_block import mssa_block as mssa_block
from .overcomplete_ista import overcomplete_ista as overcomplete_ista
from .subspace_attention import attention_maps as attention_maps
from .subspace_attention import cached_subspace_attention as cached_subspace_attention
from .subspace_attention import subspace_attention as subspace_attention
from .subspace_cross_attention import subspace_cross_attention as subspace_cross_attention

OPERATORS = ("subspace_attention", "mssa_block", "ista_step", "ista_block", "overcomplete_ista", "crate_layer")
"""The operators that ``crate-kernels selftest`` tests on every backend."""
