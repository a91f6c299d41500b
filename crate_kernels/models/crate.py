"""Vision CRATE, the image classifier of "White-Box Transformers via Sparse Rate Reduction" (arXiv 2306.01129)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CrateBlock
from ..ops import checks
from .checkpoint import KeyMap
from .vision import PatchEmbedding, Patches, VisionModel, pair, whole_patches


class CRATE(VisionModel):
    """Vision CRATE: patch embedding, class token, learned positions, ``depth`` layers, LayerNorm and a linear head.

    Args:
        image_size, patch_size: pixels, an integer or (height, width).
        num_classes: size of the head's output; 0 leaves the head out.
        dim, depth, heads, dim_head, dropout: of the layers, see :class:`crate_kernels.nn.CrateBlock`.
        pool: ``"cls"`` reads the class token, ``"mean"`` the mean of all tokens, ``""`` classifies every token.
        channels: of the images.
        emb_dropout: dropout after the embedding.
        ista: step size of the ISTA steps.
        residual_dtype: see :attr:`CrateModel.residual_dtype`.
    """

    layout: KeyMap | None = KeyMap(
        {
            "pos_embedding": "position_embedding",
            "cls_token": "cls_token",
            "to_patch_embedding.1": "patch_embedding.patch_norm",
            "to_patch_embedding.2": "patch_embedding.projection",
            "to_patch_embedding.3": "patch_embedding.norm",
            "transformer.layers.{i}.0.norm": "blocks.{i}.mssa_norm",
            "transformer.layers.{i}.0.fn.qkv": "blocks.{i}.mssa.projection",
            "transformer.layers.{i}.0.fn.to_out.0": "blocks.{i}.mssa.output",
            "transformer.layers.{i}.1.norm": "blocks.{i}.ista_norm",
            "transformer.layers.{i}.1.fn": "blocks.{i}.ista",
            "mlp_head.0": "norm",
            "mlp_head.1": "head",
        }
    )

    # A subclass replaces these to define a variant.
    embedding: Callable[..., Patches] = PatchEmbedding
    block: Callable[..., nn.Module] = CrateBlock

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        ista: float = 0.1,
        residual_dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dict(
                image_size=image_size, patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth,
                heads=heads, pool=pool, channels=channels, dim_head=dim_head, dropout=dropout,
                emb_dropout=emb_dropout, ista=ista,
            )
        )  # fmt: skip
        checks.positive_ints(dim=dim, depth=depth, heads=heads, channels=channels)
        checks.integer("num_classes", num_classes)
        checks.dropout("emb_dropout", emb_dropout)
        checks.number("ista", ista, minimum=0.0)
        image_size, patch_size = pair("image_size", image_size), pair("patch_size", patch_size)
        self.grid_size = whole_patches("image_size", image_size, patch_size)
        pool = pool_name(pool)
        self.num_classes, self.pool, self.num_features = num_classes, pool, dim
        self.position_embedding = nn.Parameter(torch.randn(1, self.grid_size[0] * self.grid_size[1] + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.patch_embedding = self.embedding(patch_size, channels, dim)
        self.dropout = nn.Dropout(emb_dropout)
        self.blocks = nn.ModuleList(
            self.block(dim, heads, dim_head, dropout=dropout, step_size=ista) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.residual_dtype = residual_dtype

    def embed(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> the first layer's tokens ``(B, 1 + patches, dim)``, class token first."""
        tokens = self.patch_embedding(images)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.dropout(self.add_positions(tokens, images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last layer's tokens ``(B, 1 + patches, dim)``, before the final LayerNorm."""
        return self.run_blocks(self.embed(images))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalize and classify ``tokens (B, N, dim)`` -> ``(B, num_classes)``. ``pre_logits`` gives ``(B,
        dim)``.

        Without pooling every token is normalized and classified: ``(B, N, …)``.
        """
        if self.pool:
            tokens = tokens.mean(dim=1) if self.pool == "mean" else tokens[:, 0]
        tokens = self.norm(tokens)
        return tokens if pre_logits else self.head(tokens)

    def reset_parameters(self) -> None:
        """Fill all weights like the constructor, with other random numbers. For a model built on the device meta."""
        nn.init.normal_(self.position_embedding)
        nn.init.normal_(self.cls_token)
        module: Any
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    init_weights = reset_parameters
    """timm's name of this attribute."""

    @property
    def global_pool(self) -> str:
        """timm's name of the pooling."""
        return {"cls": "token", "mean": "avg", "": ""}[self.pool]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes``; 0 removes it.

        ``global_pool`` is a value of ``pool``, or timm's name of it: ``"token"``, ``"avg"``, ``""`` for no pooling.
        """
        checks.integer("num_classes", num_classes)
        if global_pool is not None:
            self.pool = self.config["pool"] = pool_name(global_pool, "global_pool")
        self.num_classes = self.config["num_classes"] = num_classes
        device, dtype = self.cls_token.device, self.cls_token.dtype
        head = nn.Linear(self.num_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self.head = head
        self.head.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> logits ``(B, num_classes)``. Positions are interpolated for other image sizes."""
        return self.forward_head(self.forward_features(images))


def pool_name(pool: str, argument: str = "pool") -> str:
    """``"cls"``, ``"mean"`` or ``""``. Also accepts timm's names ``"token"`` and ``"avg"``."""
    name = {"token": "cls", "avg": "mean"}.get(pool, pool)
    if name not in ("cls", "mean", ""):
        ours = "'cls', 'mean' or ''" if argument == "pool" else "'token', 'avg' or ''"
        raise ValueError(f"{argument}: expected {ours}, got {pool!r}")
    return name


SIZES = {
    "tiny": dict(dim=384, depth=12, heads=6),
    "small": dict(dim=576, depth=12, heads=12),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
}
"""The sizes of the first paper, for 224 x 224 images in 16 x 16 patches."""

PATCH8_SIZES = {
    "tiny": dict(dim=192, depth=12, heads=3),
    "small": dict(dim=384, depth=12, heads=6),
    "base": dict(dim=768, depth=12, heads=12),
}
"""T/8, S/8 and B/8 of "Emergence of Segmentation with Minimalistic White-Box Transformers" (arXiv 2308.16271)."""


def _build(size: dict, patch_size: int, num_classes: int, options: dict) -> CRATE:
    arguments = dict(image_size=224, patch_size=patch_size, num_classes=num_classes, **size)
    arguments["dim_head"] = size["dim"] // size["heads"]
    return CRATE(**arguments | options)


def CRATE_tiny(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-T/16: 6,090,856 parameters with 1000 classes."""
    return _build(SIZES["tiny"], 16, num_classes, options)


def CRATE_small(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-S/16: 13,116,328 parameters with 1000 classes."""
    return _build(SIZES["small"], 16, num_classes, options)


def CRATE_base(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-B/16: 22,796,008 parameters with 1000 classes."""
    return _build(SIZES["base"], 16, num_classes, options)


def CRATE_large(num_classes: int = 1000, **options) -> CRATE:
    """CRATE-L/16: 77,641,192 parameters with 1000 classes."""
    return _build(SIZES["large"], 16, num_classes, options)


def CRATE_tiny_patch8(num_classes: int = 21842, **options) -> CRATE:
    """CRATE-T/8 of the segmentation paper: dim 192."""
    return _build(PATCH8_SIZES["tiny"], 8, num_classes, options)


def CRATE_small_patch8(num_classes: int = 21842, **options) -> CRATE:
    """CRATE-S/8 of the segmentation paper: dim 384."""
    return _build(PATCH8_SIZES["small"], 8, num_classes, options)


def CRATE_base_patch8(num_classes: int = 21842, **options) -> CRATE:
    """CRATE-B/8 of the segmentation paper: dim 768."""
    return _build(PATCH8_SIZES["base"], 8, num_classes, options)
