"""The attribute names that public CRATE code uses for one thing, in the order they are looked for."""

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
"""A layer or stack in which one of these is true runs its layers under activation checkpointing."""

FUSION = "_crate_fusion"
"""Where a fused module holds its route: the one attribute that ``fuse`` adds."""

ORIGINAL = "_crate_original"
"""Where the class of a fused module holds the class that it was made from."""


def attribute(module: nn.Module, names: tuple[str, ...], kind=object) -> str | None:
    """The first of ``names`` under which ``module`` has an object of this kind."""
    return next((n for n in names if hasattr(module, n) and isinstance(getattr(module, n), kind)), None)
