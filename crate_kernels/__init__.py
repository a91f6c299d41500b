"""Fused kernels and reference models for CRATE, the white-box transformer of sparse rate reduction."""

from . import ops as ops
from . import selftest as selftest
from .fusion import fuse as fuse
from .fusion import unfuse as unfuse
from .ops import use_backend as use_backend
from .version import __version__ as __version__
