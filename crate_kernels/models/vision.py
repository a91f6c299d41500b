"""Shared code of the vision models: patches, positions, intermediate features and attention maps."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import checks
from .base import CrateModel


class PatchSizeError(ValueError):
    """The patch size does not divide the image size of a model.

    Args:
        name: name of the argument.
        image, patch: (height, width) in pixels.

    Attributes:
        image, patch: the sizes in words.
    """

    def __init__(self, name: str, image: tuple[int, int], patch: tuple[int, int]):
        self.image, self.patch = f"{image[0]} x {image[1]}", f"{patch[0]} x {patch[1]}"
        super().__init__(f"{name}: {self.image} pixels are not a multiple of the patch size {self.patch}")


def whole_patches(name: str, image: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in an image. Raises :class:`PatchSizeError` if the patch size does not divide its
    size."""
    if image[0] % patch[0] or image[1] % patch[1]:
        raise PatchSizeError(name, image, patch)
    return image[0] // patch[0], image[1] // patch[1]


@torch.fx.wrap
def patch_grid(
    images: Tensor, patch_size: tuple[int, int], channels: int, weight: Tensor | None = None
) -> tuple[int, int]:
    """Rows and columns of patches in ``images``. Raises an error for images that do not fit.

    ``images`` are also held to device and dtype of ``weight``, a parameter of the model.
    """
    checks.model_input("images", images, weight)
    rows, columns = patch_size
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"images: expected shape (B, {channels}, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating dtype, got {images.dtype}")
    checks.model_dtype("images", images, weight)
    height, width = images.shape[2:]
    if height % rows or width % columns or not height or not width:
        raise ValueError(f"images: {height} x {width} pixels are not a multiple of the patch size {rows} x {columns}")
    return height // rows, width // columns


class Patches(nn.Module):
    """Base of the embeddings. It checks images and cuts them into patches."""

    def __init__(self, patch_size: tuple[int, int], channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.channels = channels

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in ``images``. Raises an error for images that do not fit."""
        # Somebody may have put another module, without a weight, in the place of the projection.
        weight = getattr(getattr(self, "projection", None), "weight", None)
        return patch_grid(images, self.patch_size, self.channels, weight)

    def flatten(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> patches ``(B, N, rows·columns·C)``, each flattened as (row, column, channel)."""
        rows, columns = self.grid(images)
        patches = images.unflatten(2, (rows, self.patch_size[0])).unflatten(4, (columns, self.patch_size[1]))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unflatten(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of :meth:`flatten`."""
        pixels = patches.unflatten(1, grid).unflatten(3, (*self.patch_size, self.channels))
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbedding(Patches):
    """Cut images into patches, flatten each as (row, column, channel), and embed it between two LayerNorms.

    ``(B, C, H, W)`` -> ``(B, (H / patch height)·(W / patch width), dim)``.
    """

    def __init__(self, patch_size: tuple[int, int], channels: int, dim: int):
        super().__init__(patch_size, channels)
        patch_dim = channels * patch_size[0] * patch_size[1]
        self.patch_norm = nn.LayerNorm(patch_dim)
        self.projection = nn.Linear(patch_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.projection(self.patch_norm(self.flatten(images))))


class ConvPatchEmbedding(Patches):
    """Embed patches with one strided convolution and no norm (CRATE-MAE and CRATE-alpha). Shapes as for
    PatchEmbedding."""

    def __init__(self, patch_size: tuple[int, int], channels: int, dim: int, *, bias: bool = True):
        super().__init__(patch_size, channels)
        self.projection = nn.Conv2d(channels, dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        self.grid(images)
        return self.projection(images).flatten(2).transpose(1, 2)


class VisionModel(CrateModel):
    """Base of the vision models: tokens from :meth:`embed`, class token first, through ``blocks``, then ``norm``.

    A subclass sets ``patch_embedding``, ``grid_size``, ``blocks``, ``norm`` and ``num_features``. The feature methods
    have the names and arguments of timm and DINO, so that their tools work.
    """

    num_prefix_tokens = 1
    grad_checkpointing = False
    dynamic_img_size = True
    """Whether the model takes images of other sizes than :attr:`image_size`. Their positions are interpolated."""
    position_tables: tuple[str, ...] = ("position_embedding",)
    """Names of the parameters ``(1, 1 + rows·columns, dim)`` that belong to the grid of patches. The first is added."""
    num_features: int
    grid_size: tuple[int, int]
    patch_embedding: Any  # a Patches
    blocks: Any  # an nn.ModuleList of layers
    _traits: dict[str, Any]
    head: nn.Module
    norm: Any  # a LayerNorm, or Identity after prune_intermediate_layers

    @property
    def embed_dim(self) -> int:
        return self.num_features

    head_hidden_size = embed_dim

    @property
    def in_chans(self) -> int:
        return self.patch_embedding.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images for which the model was built."""
        (rows, columns), (height, width) = self.grid_size, self.patch_embedding.patch_size
        return rows * height, columns * width

    def embed(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the first layer's tokens ``(B, 1 + patches, dim)``, class token first."""
        raise NotImplementedError

    def run_blocks(self, tokens: Tensor) -> Tensor:
        """``tokens (B, N, dim)`` through all layers of the encoder."""
        for block in self.blocks:
            tokens = self._run_block(block, tokens)
        return tokens

    def _run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, tokens, use_reentrant=False)
        return block(tokens)

    def add_positions(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Add the positions for the grid of ``images`` to ``tokens (B, 1 + patches, dim)``, class token first."""
        grid = patch_grid(images, self.patch_embedding.patch_size, self.patch_embedding.channels)
        table = getattr(self, self.position_tables[0])
        return tokens + interpolate_positions(table, self.grid_size, grid, self.dynamic_img_size)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Interpolate the positions for images of ``img_size`` permanently. The outputs for such images do not change.

        Raises:
            ValueError: ``img_size`` is not a multiple of the patch size, or ``patch_size`` differs from the model's.
        """
        rows, columns = self.patch_embedding.patch_size
        if patch_size is not None and pair("patch_size", patch_size) != (rows, columns):
            raise ValueError(f"patch_size: is {rows} x {columns} and cannot change, got {patch_size}")
        if img_size is None:
            return
        size = pair("img_size", img_size)
        grid = whole_patches("img_size", size, (rows, columns))
        for name in self.position_tables:
            old = getattr(self, name)
            table = interpolate_positions(old.detach(), self.grid_size, grid).clone()
            setattr(self, name, nn.Parameter(table, requires_grad=old.requires_grad))
        self.grid_size = grid
        self.config["img_size" if "img_size" in self.config else "image_size"] = size
        if hasattr(self, "_traits"):  # timm's record of a model's input
            self._traits = {**self._traits, "img_size": size}
            self._model_args = {**getattr(self, "_model_args", {}), "img_size": size}

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers leave without weight decay, in addition to biases and norms."""
        return {name for name in ("cls_token", "mask_token", *self.position_tables) if hasattr(self, name)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only each layer's input for backward, and recompute the rest."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters belong to the embedding and which to a layer, for timm's layer-wise learning rates."""
        return dict(
            stem=r"^(?:cls_token|mask_token|position_|patch_embedding)",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @property
    def feature_info(self) -> list[dict]:
        """Name, width and pixels per position of every layer, in timm's format for features."""
        reduction = max(self.patch_embedding.patch_size)
        return [
            dict(module=f"blocks.{i}", num_chs=self.num_features, reduction=reduction) for i in range(len(self.blocks))
        ]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: str = "NCHW",
        return_prefix_tokens: bool = False,
        intermediates_only: bool = False,
        output_dict: bool = False,
        stop_early: bool = False,
    ):
        """Features of any layers, with timm's arguments.

        Args:
            indices: layers to return. An integer takes that many last layers, None all layers. Negative indices count
                from the end.
            norm: apply the final LayerNorm to the features.
            output_fmt: ``"NCHW"`` gives maps ``(B, dim, rows, columns)``, ``"NLC"`` tokens ``(B, patches, dim)``.
            return_prefix_tokens: pair each feature with its class token ``(B, 1, dim)``.
            intermediates_only: return only the list, not ``(last tokens, list)``.
            output_dict: return a dictionary with ``image_intermediates``, ``image_intermediates_prefix`` if requested,
                and ``image_features`` (the last tokens).
            stop_early: do not run layers after the last requested one.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = self._layers(indices)
        rows, columns = self.patch_embedding.grid(images)
        tokens, features = self.embed(images), []
        for layer, block in enumerate(self.blocks):
            if stop_early and layer > max(wanted, default=-1):
                break
            tokens = self._run_block(block, tokens)
            if layer in wanted:
                features.append(self.norm(tokens) if norm else tokens)
        prefixes, features = [f[:, :1] for f in features], [f[:, 1:] for f in features]
        if output_fmt == "NCHW":
            features = [f.transpose(1, 2).unflatten(2, (rows, columns)) for f in features]
        tokens = self.finish(tokens)
        if output_dict:
            named = {"image_intermediates": features}
            named |= {"image_intermediates_prefix": prefixes} if return_prefix_tokens else {}
            return named if intermediates_only else named | {"image_features": tokens}
        features = list(zip(features, prefixes, strict=True)) if return_prefix_tokens else features
        return features if intermediates_only else (tokens, features)

    def finish(self, tokens: Tensor) -> Tensor:
        """The last layer's tokens ``(B, N, dim)`` in the form that :meth:`forward_features` returns."""
        return tokens

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """Features of the last ``n`` layers, or of the layers in the list ``n``, with DINO's arguments. ``reshape``
        gives maps."""
        return self.forward_intermediates(
            images,
            n,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            return_prefix_tokens=return_prefix_tokens,
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop all parts that the features of ``indices`` do not need, for timm's feature extractor. Return those
        layers."""
        wanted = self._layers(indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head and hasattr(self, "reset_classifier"):
            self.reset_classifier(0)
        return wanted

    def get_attention(self, images: Tensor, layer: int = -1) -> Tensor:
        """The attention maps of one layer ``(B, heads, N, N)``, N = 1 + patches; index 0 is the class token."""
        (layer,) = self._layers([layer])
        block = self.blocks[layer]
        return block.mssa.attention(block.mssa_norm(self._tokens_before(images, layer)))

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """:meth:`get_attention` of the last layer, under the name that DINO's tools call."""
        return self.get_attention(images, -1)

    def get_last_key(self, images: Tensor) -> Tensor:
        """The last layer's projected tokens ``(B, heads, N, p)``, which are query, key and value."""
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


@torch.fx.wrap
def interpolate_positions(
    positions: Tensor, trained: tuple[int, int], grid: tuple[int, int], allowed: bool = True
) -> Tensor:
    """Interpolate positions ``(1, 1 + rows·columns, dim)`` to another grid of patches: bicubic, class token unchanged.

    Raises:
        ValueError: the grid differs, and other sizes are not ``allowed``.
    """
    # An exported program without a fixed grid always interpolates. For the trained grid the result is unchanged.
    if all(isinstance(size, int) for size in grid) and grid == trained:
        return positions
    if not allowed:
        raise ValueError(f"images: {grid[0]} x {grid[1]} patches, but the model has {trained[0]} x {trained[1]}")
    dtype = torch.promote_types(positions.dtype, torch.float32)
    rows, columns = (cubic_matrix(*sizes, dtype, positions.device) for sizes in zip(trained, grid, strict=True))
    patches = columns @ positions[:, 1:].to(dtype).unflatten(1, trained)  # (1, trained rows, columns, dim)
    patches = (rows @ patches.flatten(2)).unflatten(2, (grid[1], -1)).flatten(1, 2)
    return torch.cat([positions[:, :1], patches.to(positions.dtype)], dim=1)


def cubic_matrix(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix ``(new, old)`` of bicubic interpolation with antialiasing along one dimension.

    It is the matrix of ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``, which some runtimes lack.
    Each row is Keys' cubic with a = −½, stretched if the grid shrinks, and sums to one.
    """
    places = torch.arange(new, dtype=dtype, device=device) + 0.5
    scale = old / (places[-1:] + 0.5)  # a tensor, so that an exported program accepts any size
    distance = (torch.arange(old, dtype=dtype, device=device) + 0.5 - (places * scale)[:, None]) / scale.clamp(min=1)
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """``value`` as (height, width)."""
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in both):
        raise ValueError(f"{name}: expected a positive integer or a pair of them, got {value!r}")
    return both
