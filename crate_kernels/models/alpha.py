"""CRATE-alpha, the scaled-up classifier with overcomplete dictionaries (arXiv 2405.20299)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..nn import OvercompleteCrateBlock
from ..ops import checks
from . import checkpoint
from .checkpoint import KeyMap
from .crate import CRATE
from .vision import ConvPatchEmbedding

BLOCK_EPS = 1e-6

CLIPA_LAYOUT = KeyMap(
    {
        "visual.class_embedding": "cls_token",
        "visual.positional_embedding": "position_embedding",
        "visual.conv1": "patch_embedding.projection",
        "visual.transformer.resblocks.{i}.ln_1": "blocks.{i}.mssa_norm",
        "visual.transformer.resblocks.{i}.attn.in_proj_weight": "blocks.{i}.mssa.projection.weight",
        "visual.transformer.resblocks.{i}.attn.out_proj": "blocks.{i}.mssa.output",
        "visual.transformer.resblocks.{i}.ln_2": "blocks.{i}.ista_norm",
        "visual.transformer.resblocks.{i}.mlp.c_fc": "blocks.{i}.ista.D",
        "visual.transformer.resblocks.{i}.mlp.c_proj": "blocks.{i}.ista.D1",
        "visual.ln_post": "norm",
        "visual.proj": "head.weight",
    },
    ignored=(r"(?!visual\.).*",),  # the text tower and the temperature
)
"""Keys of the vision tower of a CLIPA checkpoint. Four of them also have other shapes, see ``CrateAlpha``."""


class CrateAlpha(CRATE):
    """Vision CRATE at scale: two ISTA steps with ``D (d, 4d)``, decoded by ``D1``. Both halves are residual.

    ``z' = z + MSSA(LN z)``, ``z" = z' + ODL(LN z')``. The attention has no biases. A strided convolution embeds
    patches.

    The model loads its own public layout. With ``clipa=True`` it also loads the vision tower of a CLIPA checkpoint.
    There ``attn.in_proj_weight`` is one projection stacked three times. Loading checks that the three parts are equal
    and keeps one. :meth:`upstream_state_dict` stacks it again.

    Args:
        clipa: the vision tower of CLIPA. ``num_classes`` is then the width of the image embedding, the convolution and
            the head have no bias, and the last LayerNorm has eps 1e-6.
        others: see :class:`crate_kernels.models.CRATE`.
    """

    layout = KeyMap(
        {
            "pos_embedding": "position_embedding",
            "cls_token": "cls_token",
            "conv1": "patch_embedding.projection",
            "transformer.layers.{i}.0.norm": "blocks.{i}.mssa_norm",
            "transformer.layers.{i}.0.fn.qkv": "blocks.{i}.mssa.projection",
            "transformer.layers.{i}.0.fn.to_out.0": "blocks.{i}.mssa.output",
            "transformer.layers.{i}.1.norm": "blocks.{i}.ista_norm",
            "transformer.layers.{i}.1.fn": "blocks.{i}.ista",
            "mlp_head.0": "norm",
            "mlp_head.1": "head",
        }
    )

    def __init__(self, *, clipa: bool = False, **options):
        self._clipa = checks.flag("clipa", clipa)
        super().__init__(**options)
        self.config["clipa"] = clipa
        self._reset_projection()
        if clipa:
            self.layout = CLIPA_LAYOUT
            self.norm.eps = BLOCK_EPS
            self.reset_classifier(self.num_classes)

    def embedding(self, patch_size: tuple[int, int], channels: int, dim: int) -> ConvPatchEmbedding:
        return ConvPatchEmbedding(patch_size, channels, dim, bias=not self._clipa)

    def block(self, dim: int, heads: int, dim_head: int, **options) -> nn.Module:
        return OvercompleteCrateBlock(dim, heads, dim_head, output_bias=False, eps=BLOCK_EPS, **options)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_projection()

    init_weights = reset_parameters

    def _reset_projection(self) -> None:
        # As in the public training code. No norm follows, and torch's default would be small compared with the
        # positions.
        nn.init.kaiming_uniform_(self.patch_embedding.projection.weight)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self._clipa and num_classes:
            self.head.register_parameter("bias", None)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        state = checkpoint.strip_prefixes(state_dict)
        if self._clipa and CLIPA_LAYOUT.recognizes(state):
            state = {key: _from_clipa(key, value) for key, value in state.items()}
        return super().load_state_dict(state, strict=strict, assign=assign)

    def upstream_state_dict(self) -> dict[str, Tensor]:
        state = super().upstream_state_dict()
        return {key: _to_clipa(key, value) for key, value in state.items()} if self._clipa else state


def _from_clipa(key: str, value: Tensor) -> Tensor:
    """A tensor of a CLIPA checkpoint in the shape that this class uses."""
    if key == "visual.class_embedding":
        return value[None, None]
    if key == "visual.positional_embedding":
        return value[None]
    if key == "visual.proj":
        return value.T
    if key.startswith("visual.") and key.endswith("attn.in_proj_weight"):
        if value.dim() != 2 or value.shape[0] % 3:
            raise checkpoint.CheckpointError(
                f"{key}: expected three stacked matrices (3d, d), got {tuple(value.shape)}"
            )
        query, key_part, value_part = value.chunk(3)
        if not (torch.equal(query, key_part) and torch.equal(query, value_part)):
            raise checkpoint.CheckpointError(
                f"{key}: its three parts differ, so this is a general attention layer, not subspace attention"
            )
        return query
    return value


def _to_clipa(key: str, value: Tensor) -> Tensor:
    """The inverse of :func:`_from_clipa`."""
    if key == "visual.class_embedding":
        return value[0, 0]
    if key == "visual.positional_embedding":
        return value[0]
    if key == "visual.proj":
        return value.T
    if key.endswith("attn.in_proj_weight"):
        return value.repeat(3, 1)
    return value


SIZES = {
    "base": dict(dim=768, depth=12, heads=12, patch_size=16),
    "large": dict(dim=1024, depth=24, heads=16, patch_size=14),
    "huge": dict(dim=1280, depth=32, heads=16, patch_size=14),
}


def _build(name: str, options: dict) -> CrateAlpha:
    size = SIZES[name]
    arguments = dict(image_size=224, num_classes=1000, dim_head=size["dim"] // size["heads"], **size)
    return CrateAlpha(**arguments | options)


def CRATE_alpha_base(num_classes: int = 1000, **options) -> CrateAlpha:
    """CRATE-alpha-B/16: 72,328,936 parameters with 1000 classes."""
    return _build("base", dict(num_classes=num_classes) | options)


def CRATE_alpha_large(num_classes: int = 1000, **options) -> CrateAlpha:
    """CRATE-alpha-L/14: 253,650,920 parameters with 1000 classes."""
    return _build("large", dict(num_classes=num_classes) | options)


def CRATE_alpha_huge(num_classes: int = 1000, **options) -> CrateAlpha:
    """CRATE-alpha-H/14, with heads of width 80."""
    return _build("huge", dict(num_classes=num_classes) | options)


def CRATE_alpha_clipa_large(num_classes: int = 1024, **options) -> CrateAlpha:
    """The vision tower of CLIPA with CRATE-alpha-L/14; ``num_classes`` is the width of the image embedding."""
    return _build("large", dict(num_classes=num_classes, clipa=True) | options)


def CRATE_alpha_clipa_huge(num_classes: int = 1024, **options) -> CrateAlpha:
    """The vision tower of CLIPA with CRATE-alpha-H/14; ``num_classes`` is the width of the image embedding."""
    return _build("huge", dict(num_classes=num_classes, clipa=True) | options)
