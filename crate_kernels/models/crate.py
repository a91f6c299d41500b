"""Vision CRATE, the image classifier of "White-Box Transformers via Sparse Rate Reduction" (arXiv 2306.01129)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import CrateBlock
from .base import CrateModel
from .checkpoint import KeyMap


class PatchEmbedding(nn.Module):
    """Cut images into patches, flatten each as (row, column, channel), and embed it between two LayerNorms.

    ``(B, C, H, W)`` -> ``(B, (H / patch height)·(W / patch width), dim)``.
    """

    def __init__(self, patch_size: tuple[int, int], channels: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.channels = channels
        patch_dim = channels * patch_size[0] * patch_size[1]
        self.patch_norm = nn.LayerNorm(patch_dim)
        self.projection = nn.Linear(patch_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in ``images``, or an error that says what does not fit."""
        rows, columns = self.patch_size
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images: expected shape (B, {self.channels}, H, W), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        if height % rows or width % columns or not height or not width:
            raise ValueError(f"images: {height} x {width} pixels are no multiple of the patch size {rows} x {columns}")
        return height // rows, width // columns

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = self.grid(images)
        patches = images.unflatten(2, (rows, self.patch_size[0])).unflatten(4, (columns, self.patch_size[1]))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.norm(self.projection(self.patch_norm(patches)))


class CRATE(CrateModel):
    """Vision CRATE: patch embedding, class token, learned positions, ``depth`` layers, LayerNorm and a linear head.

    Args:
        image_size, patch_size: pixels, an integer or (height, width).
        num_classes: size of the head's output; 0 leaves the head out.
        dim, depth, heads, dim_head, dropout: of the layers, see :class:`crate_kernels.nn.CrateBlock`.
        pool: ``"cls"`` reads the class token, ``"mean"`` the mean of all tokens.
        channels: of the images.
        emb_dropout: dropout after the embedding.
        ista: step size of the ISTA steps.
    """

    layout = KeyMap(
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
    ):
        super().__init__(
            dict(
                image_size=image_size, patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth,
                heads=heads, pool=pool, channels=channels, dim_head=dim_head, dropout=dropout,
                emb_dropout=emb_dropout, ista=ista,
            )
        )  # fmt: skip
        image_size, patch_size = _pair("image_size", image_size), _pair("patch_size", patch_size)
        if image_size[0] % patch_size[0] or image_size[1] % patch_size[1]:
            raise ValueError(f"image_size: {image_size} is no multiple of patch_size {patch_size}")
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool: expected 'cls' or 'mean', got {pool!r}")
        self.grid_size = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
        self.num_classes, self.pool = num_classes, pool
        self.num_features = self.embed_dim = dim
        self.position_embedding = nn.Parameter(torch.randn(1, self.grid_size[0] * self.grid_size[1] + 1, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.patch_embedding = PatchEmbedding(patch_size, channels, dim)
        self.dropout = nn.Dropout(emb_dropout)
        self.blocks = nn.ModuleList(
            CrateBlock(dim, heads, dim_head, dropout=dropout, step_size=ista) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def embed(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the first layer's tokens ``(B, 1 + patches, dim)``, class token first."""
        grid = self.patch_embedding.grid(images)
        tokens = self.patch_embedding(images)
        tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.dropout(tokens + interpolate_positions(self.position_embedding, self.grid_size, grid))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last layer's tokens ``(B, 1 + patches, dim)``, before the final LayerNorm."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, normalise and classify ``tokens (B, N, dim)`` -> ``(B, num_classes)``, or ``(B, dim)`` before that."""
        pooled = self.norm(tokens.mean(dim=1) if self.pool == "mean" else tokens[:, 0])
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> logits ``(B, num_classes)``. Positions are interpolated for other image sizes."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: str = "NCHW",
        return_prefix_tokens: bool = False,
        intermediates_only: bool = False,
        stop_early: bool = False,
    ):
        """Features of any layers, with timm's arguments.

        Args:
            indices: layers to return; an integer takes the last so many, None all; negative ones count from the end.
            norm: apply the final LayerNorm to them.
            output_fmt: ``"NCHW"`` gives maps ``(B, dim, rows, columns)``, ``"NLC"`` tokens ``(B, patches, dim)``.
            return_prefix_tokens: pair each with its class token ``(B, 1, dim)``.
            intermediates_only: return the list alone, not ``(last tokens, list)``.
            stop_early: do not run layers past the last one asked for.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = self._layers(indices)
        rows, columns = self.patch_embedding.grid(images)
        tokens, features = self.embed(images), []
        for layer, block in enumerate(self.blocks):
            if stop_early and layer > max(wanted, default=-1):
                break
            tokens = block(tokens)
            if layer in wanted:
                feature = self.norm(tokens) if norm else tokens
                prefix, patches = feature[:, :1], feature[:, 1:]
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, (rows, columns))
                features.append((patches, prefix) if return_prefix_tokens else patches)
        return features if intermediates_only else (tokens, features)

    def get_attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """The attention maps of one layer ``(B, heads, N, N)``, N = 1 + patches; index 0 is the class token."""
        (layer,) = self._layers([layer])
        block = self.blocks[layer]
        return block.mssa.attention(block.mssa_norm(self._tokens_before(images, layer)))

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """:meth:`get_attention` of the last layer, under the name that DINO's tools call."""
        return self.get_attention(images, -1)

    def get_last_key(self, images: Tensor) -> Tensor:
        """The last layer's projected tokens ``(B, heads, N, p)``: query, key and value in one."""
        block = self.blocks[-1]
        return block.mssa.project(block.mssa_norm(self._tokens_before(images, len(self.blocks) - 1))).transpose(1, 2)

    def _tokens_before(self, images: Tensor, layer: int) -> Tensor:
        tokens = self.embed(images)
        for block in self.blocks[:layer]:
            tokens = block(tokens)
        return tokens

    def _layers(self, indices: int | list[int] | None) -> list[int]:
        depth = len(self.blocks)
        if indices is None:
            return list(range(depth))
        indices = list(range(depth - indices, depth)) if isinstance(indices, int) else list(indices)
        if any(not -depth <= i < depth for i in indices):
            raise ValueError(f"layers: {indices} do not all lie in {-depth}..{depth - 1}")
        return [i % depth for i in indices]


def interpolate_positions(positions: Tensor, trained: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """``(1, 1 + rows·columns, dim)`` for another grid of patches: bicubic, the class token's position unchanged."""
    if grid == trained:
        return positions
    patches = positions[:, 1:].transpose(1, 2).unflatten(2, trained)
    patches = nn.functional.interpolate(patches.float(), size=grid, mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], patches.to(positions.dtype).flatten(2).transpose(1, 2)], dim=1)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"{name}: expected a positive integer or a pair of them, got {value!r}")
    return pair


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
