"""What the vision models share: patches, positions, intermediate features and attention maps."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .base import CrateModel


class Patches(nn.Module):
    """Base of the embeddings: what images fit, and how many patches they hold."""

    def __init__(self, patch_size: tuple[int, int], channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.channels = channels

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in ``images``, or an error that says what does not fit."""
        rows, columns = self.patch_size
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images: expected shape (B, {self.channels}, H, W), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        if height % rows or width % columns or not height or not width:
            raise ValueError(f"images: {height} x {width} pixels are no multiple of the patch size {rows} x {columns}")
        return height // rows, width // columns

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
    """Embed patches with one strided convolution and no norm: CRATE-MAE and CRATE-alpha. Shapes as above."""

    def __init__(self, patch_size: tuple[int, int], channels: int, dim: int, *, bias: bool = True):
        super().__init__(patch_size, channels)
        self.projection = nn.Conv2d(channels, dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        self.grid(images)
        return self.projection(images).flatten(2).transpose(1, 2)


class VisionModel(CrateModel):
    """Base of the vision models: tokens from :meth:`embed`, class token first, through ``blocks``, then ``norm``.

    A subclass sets ``patch_embedding``, ``grid_size``, ``blocks``, ``norm`` and ``num_features``. The names and
    arguments of the features are timm's and DINO's, so that their tools work.
    """

    num_prefix_tokens = 1
    grad_checkpointing = False
    num_features: int
    grid_size: tuple[int, int]

    @property
    def embed_dim(self) -> int:
        return self.num_features

    head_hidden_size = embed_dim

    @property
    def in_chans(self) -> int:
        return self.patch_embedding.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model was built for."""
        (rows, columns), (height, width) = self.grid_size, self.patch_embedding.patch_size
        return rows * height, columns * width

    def embed(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the first layer's tokens ``(B, 1 + patches, dim)``, class token first."""
        raise NotImplementedError

    def run_blocks(self, tokens: Tensor) -> Tensor:
        """``tokens (B, N, dim)`` through all layers of the encoder."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return tokens

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input for the backward pass and compute the rest again."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters belong to the embedding and which to a layer, for timm's layer-wise learning rates."""
        return dict(
            stem=r"^(?:cls_token|mask_token|position_|patch_embedding)",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @property
    def feature_info(self) -> list[dict]:
        """Of every layer: its name, width and the pixels along one of its positions, as timm describes features."""
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

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features of ``indices`` do not need, as timm's feature extractor asks; return those layers."""
        wanted = self._layers(indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head and hasattr(self, "reset_classifier"):
            self.head = nn.Identity()
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


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """``value`` as (height, width)."""
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or any(isinstance(v, bool) or not isinstance(v, Integral) or v < 1 for v in both):
        raise ValueError(f"{name}: expected a positive integer or a pair of them, got {value!r}")
    return both
