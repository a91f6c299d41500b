"""CRATE on more than one device, on torch's own distributed engine."""

from .ring_attention import ring_subspace_attention as ring_subspace_attention
