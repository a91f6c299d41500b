"""Image files as input of a model, at any size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.vision import VisionModel
from .inputs import normalization


class ImageError(ValueError):
    """An image that cannot be used; the message names the file."""


def read_image(path: str | os.PathLike, channels: int):
    """A Pillow image in RGB, or in gray for one channel. Transparent parts become white.

    Raises:
        ImageError: the file is missing, is not an image, is damaged, or has more than eight bits a channel.
    """
    from PIL import Image

    if channels not in (1, 3):
        raise ImageError(f"image files have 1 or 3 channels, the model takes {channels}")
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"{path}: no such image file")
    try:
        with Image.open(path) as file:
            file.load()
            image = file.copy()
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ImageError(f"{path} is not a readable image: {error}") from error
    if image.mode.startswith(("I", "F")):
        raise ImageError(f"{path} has {image.mode} pixels of more than eight bits; convert it to eight bits a channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def model_input(image, model: VisionModel, metadata: dict, size: int | None = None) -> Tensor:
    """``(1, C, H, W)`` float32, normalized. It has the proportions of the image, rounded to whole patches.

    Args:
        image: a Pillow image.
        metadata: of the model's file; it records mean and standard deviation.
        size: pixels along the shorter side; None takes the model's own size.
    """
    from PIL import Image

    size = size or min(model.image_size)
    width, height = image.size
    scale = size / min(width, height)
    height, width = (
        max(1, round(side * scale / patch)) * patch
        for side, patch in zip((height, width), model.patch_embedding.patch_size, strict=True)
    )
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    tensor = torch.from_numpy(pixels.copy()).view(height, width, -1).permute(2, 0, 1)
    mean, std = normalization(model, metadata)
    return ((tensor.float() / 255 - mean) / std).unsqueeze(0)
