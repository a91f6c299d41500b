"""Training of CRATE-MAE: reconstruct masked photographs, then a picture and a linear probe of the frozen encoder.

Without options it trains on crops of the photographs inside scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import launch
from ..models import CrateMAE
from ..options import option
from . import command
from .config import data_name
from .engine import Meter
from .pretrain import PretrainConfig, Pretrainer, probe_accuracy, random_crops


@dataclass
class MAEConfig(PretrainConfig):
    """The options of ``train-mae``."""

    dim: int = option(128, "width of the tokens, a multiple of 4", "model", least=4, most=1 << 16)
    decoder_depth: int = option(4, "number of decoder layers", "model", least=1, most=1000)
    lambd: float = option(0.1, "sparsity weight of the ISTA steps", "model", least=0)
    norm_pix_loss: bool = option(True, "predict each patch standardized by itself", "model")
    learning_rate: float = option(2e-3, "after the warm-up; falls to zero along a cosine", "optimization", above=0)
    epochs: int = option(6, "passes over the training images", "optimization", least=1, most=1_000_000)
    mask_ratio: float = option(0.5, "share of the patches that is hidden", "optimization", above=0, below=1)
    crop: float = option(0.4, "smallest share of an image's area that a random crop keeps", "data", above=0, most=1)
    flip: float = option(0.5, "probability of mirroring an image", "data", least=0, most=1)

    def check(self, given: Iterable[str] = ()) -> None:
        super().check(given)
        if self.dim % 4:
            raise ValueError(f"--dim must be a multiple of 4, for sine and cosine of two coordinates; got {self.dim}")

    def default_output(self) -> str:
        return f"runs/mae-{data_name(self.data)}"


class MAETrainer(Pretrainer):
    """A masked autoencoder in training."""

    command, options = "train-mae", MAEConfig
    entries = ("forward_intermediates",)
    has_unused_parameters = True  # public checkpoints contain them, but no computation uses them
    model: CrateMAE
    settings: MAEConfig

    def build(self) -> CrateMAE:
        s = self.settings
        return CrateMAE(
            img_size=self.size, patch_size=s.patch_size, in_chans=self.data.channels, embed_dim=s.dim, depth=s.depth,
            num_heads=s.heads, decoder_depth=s.decoder_depth, norm_pix_loss=s.norm_pix_loss, lambd=s.lambd,
        )  # fmt: skip

    def view_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        s = self.settings
        if self.size[0] == self.size[1]:
            images = random_crops(images, self.size[0], (s.crop, 1.0), s.flip, generator)
        noise = launch.rand(len(images), self.patches, dim=0, generator=generator)
        return self.network(images, s.mask_ratio, noise.to(self.device))[0]

    @property
    def patches(self) -> int:
        rows, columns = self.model.grid_size
        return rows * columns

    def probe_inputs(self, count: int) -> tuple[Tensor, dict[str, Any]]:
        # Unmasked images, as in the use of the encoder.
        return super().probe_inputs(count)[0], {"mask_ratio": 0.0}

    def encode(self, images: Tensor) -> Tensor:
        """Input of the probe: the mean of the patch tokens ``(B, d)`` after half of the encoder's layers.

        The last layers specialize in the pixels to be predicted.
        """
        middle = (len(self.model.blocks) - 1) // 2
        (tokens,) = self.model.forward_intermediates(
            images, [middle], output_fmt="NLC", intermediates_only=True, stop_early=True
        )
        return tokens.mean(dim=1)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss on masked test images, always the same masks; accuracy of a linear probe of the frozen encoder."""
        self.model.eval()
        generator, meter = torch.Generator().manual_seed(0), Meter(self.device)
        for images, _ in self.test_images(shared=True):
            count = int(launch.total(torch.tensor(len(images), device=self.device)))
            noise = torch.rand(count, self.patches, generator=generator)[launch.share(count)].to(self.device)
            with self.autocast():
                loss, _, _ = self.model(images, self.settings.mask_ratio, noise)
            meter.add(len(images), loss.double() * len(images))
        return {"test_loss": meter.read()["loss"], "probe_accuracy": probe_accuracy(*self.features(self.encode))}

    def draw(self) -> list[Path]:
        images, labels = next(iter(self.test_images()))
        chosen = torch.linspace(0, len(labels) - 1, min(8, len(labels))).long()
        images = images[chosen]
        noise = torch.rand(len(images), self.patches, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.model.eval()
        seen, reconstruction = self.model.reconstruct(images, self.settings.mask_ratio, noise)
        return [save_picture([self.normalize.inverse(part) for part in (images, seen, reconstruction)],
                             self.output / "reconstruction.png")]  # fmt: skip


def save_picture(rows: list[Tensor], path: Path, width: int = 192) -> Path:
    """Write rows of ``uint8`` images ``(n, 1 or 3, H, W)`` as one PNG, each image about ``width`` pixels wide."""
    from PIL import Image

    images = torch.stack(rows).expand(-1, -1, 3, -1, -1) if rows[0].shape[1] == 1 else torch.stack(rows)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1), value=255)  # a thin white frame
    zoom = max(1, width // images.shape[-1])
    images = images.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)
    picture = images.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(picture.numpy())).save(path)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of :class:`MAEConfig`, and ``--resume``."""
    parser.epilog = "Without options: crops of the photos in scikit-image and scikit-learn, in minutes on two cores."
    command.add_arguments(parser, MAETrainer)


def run(args: argparse.Namespace) -> int:
    """Train as the command line says; ends with a picture and the probe's accuracy."""
    return command.run(args, MAETrainer)
