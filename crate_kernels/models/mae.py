"""CRATE-MAE, the masked autoencoder of white-box encoder and decoder layers (arXiv 2404.02446)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CrateBlock, CrateDecoderBlock
from ..ops import checks
from .checkpoint import KeyMap
from .crate import CRATE
from .vision import ConvPatchEmbedding, VisionModel, pair, whole_patches


class CrateMAE(VisionModel):
    """Masked autoencoder: mask most patches, encode *all* positions, decode, predict the masked pixels.

    Mask tokens replace the masked patches before the encoder. One fixed sine-cosine table is added to all tokens. The
    encoder's layers compress and sparsify. The decoder's layers invert these steps.

    Public checkpoints contain a second table and a projection between encoder and decoder that no computation uses. The
    model keeps them (``unused_*``), so that such checkpoints load strictly and are written back unchanged.

    Args:
        img_size, patch_size: pixels, an integer or (height, width).
        in_chans: channels of the images.
        embed_dim, depth, num_heads: sizes of the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: sizes of the decoder. Its width must be the encoder's.
        norm_pix_loss: predict each patch standardized by its own mean and variance.
        lambd: sparsity weight of the ISTA steps.
        residual_dtype: dtype of the encoder's stream, see :attr:`CrateModel.residual_dtype`. A decoder layer begins
            with a matrix product, so autocast narrows the decoder's stream in any case, as in the public code.
    """

    layout = KeyMap(
        {
            "cls_token": "cls_token",
            "mask_token": "mask_token",
            "pos_embed": "unused_position_table",
            "decoder_pos_embed": "position_table",
            "patch_embed.proj": "patch_embedding.projection",
            "blocks.{i}.layers.0.0.norm": "blocks.{i}.mssa_norm",
            "blocks.{i}.layers.0.0.fn.qkv": "blocks.{i}.mssa.projection",
            "blocks.{i}.layers.0.0.fn.to_out.0": "blocks.{i}.mssa.output",
            "blocks.{i}.layers.0.1.norm": "blocks.{i}.ista_norm",
            "blocks.{i}.layers.0.1.fn": "blocks.{i}.ista",
            "norm": "norm",
            "decoder_embed": "unused_decoder_embedding",
            "decoder_blocks.{i}.layers.0.0.norm": "decoder_blocks.{i}.dictionary_norm",
            "decoder_blocks.{i}.layers.0.0.fn": "decoder_blocks.{i}.dictionary",
            "decoder_blocks.{i}.layers.0.1.norm": "decoder_blocks.{i}.mssa_norm",
            "decoder_blocks.{i}.layers.0.1.fn.qkv": "decoder_blocks.{i}.mssa.projection",
            "decoder_blocks.{i}.layers.0.1.fn.to_out.0": "decoder_blocks.{i}.mssa.output",
            "decoder_norm": "decoder_norm",
            "decoder_pred": "prediction",
        }
    )

    num_classes = 0
    position_tables = ("position_table", "unused_position_table")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int | None = None,
        decoder_depth: int = 12,
        decoder_num_heads: int | None = None,
        norm_pix_loss: bool = False,
        lambd: float = 0.5,
        residual_dtype: torch.dtype | None = None,
    ):
        decoder_embed_dim = embed_dim if decoder_embed_dim is None else decoder_embed_dim
        decoder_num_heads = num_heads if decoder_num_heads is None else decoder_num_heads
        super().__init__(
            dict(
                img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth,
                num_heads=num_heads, decoder_embed_dim=decoder_embed_dim, decoder_depth=decoder_depth,
                decoder_num_heads=decoder_num_heads, norm_pix_loss=norm_pix_loss, lambd=lambd,
            )
        )  # fmt: skip
        checks.positive_ints(
            in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            decoder_depth=decoder_depth, decoder_num_heads=decoder_num_heads,
        )  # fmt: skip
        checks.number("lambd", lambd, minimum=0.0)
        checks.flag("norm_pix_loss", norm_pix_loss)
        img_size, patch_size = pair("img_size", img_size), pair("patch_size", patch_size)
        self.grid_size = whole_patches("img_size", img_size, patch_size)
        if decoder_embed_dim != embed_dim:
            raise ValueError(
                f"decoder_embed_dim: the decoder continues on the encoder's tokens, so it must be embed_dim = "
                f"{embed_dim}, got {decoder_embed_dim}"
            )
        if embed_dim % 4:
            raise ValueError(
                f"embed_dim: must be a multiple of 4, for sine and cosine of two coordinates; got {embed_dim}"
            )
        self.norm_pix_loss, self.num_features = norm_pix_loss, embed_dim

        self.patch_embedding = ConvPatchEmbedding(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        table = sincos_positions(self.grid_size, embed_dim)
        self.position_table = nn.Parameter(table, requires_grad=False)
        self.unused_position_table = nn.Parameter(table.clone(), requires_grad=False)
        self.blocks = nn.ModuleList(CrateBlock(embed_dim, num_heads, None, lambd=lambd) for _ in range(depth))
        self.norm: nn.LayerNorm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.unused_decoder_embedding = nn.Linear(embed_dim, embed_dim)
        self.decoder_blocks: Any = nn.ModuleList(
            CrateDecoderBlock(embed_dim, decoder_num_heads, None) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.prediction = nn.Linear(embed_dim, in_chans * patch_size[0] * patch_size[1])
        self.residual_dtype = residual_dtype
        self.reset_parameters()

    def reset_parameters(self):
        """Linear layers xavier-uniform with zero bias, dictionaries kaiming-uniform, the two tokens N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.decoder_blocks:
            nn.init.kaiming_uniform_(block.dictionary.weight)
        nn.init.xavier_uniform_(self.patch_embedding.projection.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    # -- encoder and decoder -----------------------------------------------------------------------------------------

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, C, H, W)`` -> tokens ``(B, 1 + N, d)``. Patches with ``mask (B, N)`` = 1 become mask tokens."""
        tokens = self.patch_embedding(images)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1).bool(), self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.add_positions(tokens, images)

    def forward_encoder(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoder's tokens ``(B, 1 + N, d)``, normalized, class token first."""
        return self.finish(self.run_blocks(self.embed(images, mask)))

    def finish(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens)

    def forward_features(self, images: Tensor) -> Tensor:
        """The encoder's tokens of unmasked images ``(B, 1 + N, d)``, for a probe or a new head."""
        return self.forward_encoder(images)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """One feature per image: the class token ``(B, d)`` of ``tokens (B, 1 + N, d)``. There is no classifier."""
        return tokens[:, 0]

    def forward_decoder(self, tokens: Tensor) -> Tensor:
        """``tokens (B, 1 + N, d)`` -> predicted patches ``(B, N, patch height·patch width·C)``."""
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.prediction(self.decoder_norm(tokens))[:, 1:]

    # -- masking and loss --------------------------------------------------------------------------------------------

    def random_mask(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> Tensor:
        """A random mask ``(B, N)``: 1 for a hidden patch, 0 for a visible one, with the same number in every image.

        The ``int(N·(1 − mask_ratio))`` patches with the smallest ``noise (B, N)`` stay visible. The default noise is
        uniform.
        """
        if not 0 <= checks.number("mask_ratio", mask_ratio) <= 1:
            raise ValueError(f"mask_ratio: expected a number in 0..1, got {mask_ratio}")
        rows, columns = self.patch_embedding.grid(images)
        shape = (images.shape[0], rows * columns)
        if noise is None:
            noise = torch.rand(shape, device=images.device)
        else:
            checks.tensor("noise", noise, shape, like=images, beside="images")
        rank = noise.argsort(dim=1).argsort(dim=1)
        return (rank >= int(rows * columns * (1 - mask_ratio))).to(images.dtype)

    def target(self, images: Tensor) -> Tensor:
        """The patches ``(B, N, patch height·patch width·C)`` to predict. ``norm_pix_loss`` standardizes each of
        them."""
        patches = self.patch_embedding.flatten(images)
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(patches)
            patches = (patches - mean) / deviation
        return patches

    def forward(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mask, encode, decode, and compare with the target.

        Args:
            images: ``(B, C, H, W)``.
            mask_ratio, noise: see :meth:`random_mask`.

        Returns:
            The loss, a scalar: the mean squared error over masked patches (0 if no patch is masked); the predicted
            patches ``(B, N, patch height·patch width·C)``; the mask ``(B, N)``, 1 for hidden patches.
        """
        mask = self.random_mask(images, mask_ratio, noise)
        prediction = self.forward_decoder(self.forward_encoder(images, mask))
        error = (prediction.to(images.dtype) - self.target(images)).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum().clamp(min=1), prediction, mask

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The visible part of the images, and their reconstruction: ``(B, C, H, W)`` each, in the scale of ``images``.

        Returns:
            The images with zeros in hidden patches, and the images with predictions in hidden patches.
        """
        _, prediction, mask = self(images, mask_ratio, noise)
        patches = self.patch_embedding.flatten(images)
        if self.norm_pix_loss:
            mean, deviation = _patch_statistics(patches)
            prediction = prediction * deviation + mean
        mask = mask.unsqueeze(-1)
        grid = self.patch_embedding.grid(images)
        seen = patches * (1 - mask)
        return self.patch_embedding.unflatten(seen, grid), self.patch_embedding.unflatten(
            seen + prediction.to(images.dtype) * mask, grid
        )


class CrateMAEClassifier(CRATE):
    """The encoder of a :class:`CrateMAE` with a classification head, for fine-tuning with ``crate-kernels train
    --init``.

    It reads unmasked images. Positions start from the encoder's fixed table and are learned.

    Args:
        lambd: sparsity weight of the ISTA steps.
        options: see :class:`CRATE`.
    """

    layout = None
    embedding = ConvPatchEmbedding

    def __init__(self, *, lambd: float = 0.5, **options):
        self._lambd = lambd
        super().__init__(**options)
        self.config["lambd"] = lambd
        self.norm.eps = 1e-6
        self._reset_positions()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_positions()

    init_weights = reset_parameters

    def _reset_positions(self) -> None:
        with torch.no_grad():
            self.position_embedding.copy_(sincos_positions(self.grid_size, self.num_features))

    def block(self, dim: int, heads: int, dim_head: int, **options) -> nn.Module:
        return CrateBlock(dim, heads, None, lambd=self._lambd, **options)


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """The fixed position table of masked autoencoders, ``(1, 1 + rows·columns, dim)``, zeros for the class token.

    The first half of the channels encodes the column x, the second the row y, each as ``sin(x·ω)`` then ``cos(x·ω)``
    with ``ω_i = 10000^(−i / (dim/4))``.
    """
    rows, columns = grid
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in (x, y)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=table.dtype), table])[None].to(torch.get_default_dtype())


SIZES = {
    "tiny": dict(embed_dim=384, depth=12, num_heads=6),
    "small": dict(embed_dim=576, depth=12, num_heads=12),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
}
"""Sizes of the encoders. The decoders have the same sizes."""


def _build(name: str, options: dict) -> CrateMAE:
    return CrateMAE(**dict(SIZES[name], decoder_depth=SIZES[name]["depth"]) | options)


def mae_crate_tiny(**options) -> CrateMAE:
    """CRATE-MAE-T/16: 11,404,032 trainable parameters."""
    return _build("tiny", options)


def mae_crate_small(**options) -> CrateMAE:
    """CRATE-MAE-S/16: 25,178,880 trainable parameters."""
    return _build("small", options)


def mae_crate_base(**options) -> CrateMAE:
    """CRATE-MAE-B/16: 44,335,872 trainable parameters."""
    return _build("base", options)


def mae_crate_large(**options) -> CrateMAE:
    """CRATE-MAE-L/16: 153,871,104 trainable parameters."""
    return _build("large", options)
