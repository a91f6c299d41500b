"""The attribute names in public CRATE code, in the order in which they are looked up."""

from __future__ import annotations

from torch import nn

HEADS = ("heads", "n_head", "num_heads")
PROJECTION = ("qkv", "c_attn", "to_qkv")
OUTPUT = (("to_out",), ("c_proj", "resid_dropout"), ("proj", "proj_drop"))
SCALE = ("scale",)
STEP_SIZE = ("step_size", "eta")
LAMBD = ("lambd", "lmbda", "lam")
DROPOUT = ("dropout", "attn_dropout", "resid_dropout", "attn_drop", "dropout_p")

CHECKPOINTING = ("gradient_checkpointing", "use_checkpoint", "grad_checkpointing")
"""If one of these attributes of a layer or stack is true, it runs its layers with activation checkpointing."""

FUSION = "_crate_fusion"
"""Attribute of a fused module that contains its route. ``fuse`` adds no other attribute."""

ORIGINAL = "_crate_original"
"""Attribute of a fused class that contains the original class."""


def attribute(module: nn.Module, names: tuple[str, ...], kind=object) -> str | None:
    """The first of ``names`` that is an attribute of ``module`` with a value of type ``kind``."""
    return next((n for n in names if hasattr(module, n) and isinstance(getattr(module, n), kind)), None)
