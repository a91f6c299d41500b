"""``crate-kernels segment``: segment images by the attention of a vision CRATE; writes masks and pictures."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import options
from ..models.registry import registered
from ..models.vision import VisionModel
from ..options import option
from ..runs.folder import open_model
from .images import model_input, read_image
from .plots import new_figure, save
from .segmentation import attention_mask, class_attention, enlarge, keys, object_masks, principal_components

MASK_COLORS = ("#ee6677", "#4477aa", "#ccbb44", "#228833", "#66ccee", "#aa3377")


@dataclass
class Settings:
    """The options of ``segment``."""

    model: str | None = option(
        None,
        "registered name of the model, for a public checkpoint that does not name it",
        choices=registered(VisionModel),
    )
    output: str = option("segments", "folder of the results, which replace existing files")
    size: int | None = option(
        None, "pixels of the shorter side at the model's input; default: the model's own size", least=1, most=8192
    )
    layer: int = option(-1, "layer that gives the attention; -1 is the last")
    mass: float = option(0.6, "share of a head's attention in its mask", above=0, below=1)
    masks: int = option(3, "largest number of objects per image", least=1, most=255)
    threshold: float = option(0.0, "patches belong together if their cosine is at least this", least=-1, most=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files of any size")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="required: the folder of a training run, or a vision model's file",
    )
    options.add_arguments(parser, Settings, needed="IMAGE [IMAGE ...] --checkpoint PATH")


def run(args: argparse.Namespace) -> int:
    return segment_files(args.images, args.checkpoint, options.parse(args, Settings))


def segment_files(images: list[str], checkpoint: str, settings: Settings) -> int:
    """Segment image files, and write masks and pictures."""
    began = time.monotonic()
    model, metadata = open_model(checkpoint, settings.model)
    if not isinstance(model, VisionModel):
        raise ValueError(f"{checkpoint} holds a {type(model).__name__}, which takes no images")
    if not -len(model.blocks) <= settings.layer < len(model.blocks):
        raise ValueError(f"--layer must lie in {-len(model.blocks)}..{len(model.blocks) - 1}, got {settings.layer}")
    size, least = settings.size or min(model.image_size), 2 * max(model.patch_embedding.patch_size)
    if size < least:
        raise ValueError(f"--size must be at least {least} for this model, two patches, got {size}")
    if model.config.get("pool") == "mean":
        print("note: this model's head reads the mean of all tokens, so training hardly affects its class token")
    output = Path(settings.output)
    names = result_names(images)
    pictures = [read_image(path, model.patch_embedding.channels) for path in images]
    results = segment(
        model, metadata, pictures, size=settings.size, layer=settings.layer, mass=settings.mass, count=settings.masks,
        threshold=settings.threshold,
    )  # fmt: skip
    for name, picture, result in zip(names, pictures, results, strict=True):
        write_label_image(output / f"{name}_masks.png", result.masks, picture.size)
        sheet = plot_segmentation(picture, result, output / f"{name}.png", name)
        shares = ", ".join(f"{100 * mask.float().mean():.0f} %" for mask in result.masks) or "none"
        print(f"{sheet}: {result.grid[0]} x {result.grid[1]} patches; objects' share of the image: {shares}")
    print(f"{time.monotonic() - began:.1f} s")
    return 0


@dataclass
class Segmentation:
    """The result for one image, on its grid of patches.

    ``attention (H, rows, columns)``: attention of the class token. ``attention_masks``: the thresholded maps, bool.
    ``masks (objects, rows, columns)``: objects of the normalized cuts, bool.
    ``components (rows, columns, 3)``: principal components of the last layer's tokens, 0..1, the same axes for all
        images.
    """

    attention: Tensor
    attention_masks: Tensor
    masks: Tensor
    components: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        _, rows, columns = self.attention.shape
        return rows, columns


@torch.no_grad()
def segment(
    model: VisionModel,
    metadata: dict,
    pictures: list,
    *,
    size: int | None = None,
    layer: int = -1,
    mass: float = 0.6,
    count: int = 3,
    threshold: float = 0.0,
) -> list[Segmentation]:
    """Segment Pillow images, each at its own size. See the functions of :mod:`crate_kernels.analysis.segmentation`."""
    found, features = [], []
    for picture in pictures:
        image = model_input(picture, model, metadata, size)
        attention = class_attention(model, image, layer)[0]
        grid = (attention.shape[1], attention.shape[2])
        # The output of an ISTA step is non-negative, so patches share a large mean. Without it half of all cosines are
        # negative.
        masks = object_masks(keys(model, image, layer)[0], grid, count, threshold, center=True)
        features.append(model.norm(model.run_blocks(model.embed(image)))[0, 1:])
        found.append((attention, attention_mask(attention, mass), masks))
    components = principal_components(features)
    return [
        Segmentation(attention, thresholded, masks, colors.unflatten(0, tuple(attention.shape[1:])))
        for (attention, thresholded, masks), colors in zip(found, components, strict=True)
    ]


def result_names(paths: list[str]) -> list[str]:
    """A name for the results of each image: the name of its file, with a number if two names are equal."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        number = 2
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def write_label_image(path: Path, masks: Tensor, size: tuple[int, int]) -> None:
    """Write the masks as one gray PNG of the image's size: 0 is background, 1 the first object, 2 the second, and so
    on."""
    from PIL import Image

    labels = torch.zeros(masks.shape[1:], dtype=torch.uint8)
    for number, mask in enumerate(masks, 1):
        labels[mask] = number
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.numpy()).resize(size, Image.Resampling.NEAREST).save(path)


def overlay(picture, masks: Tensor) -> np.ndarray:
    """The picture with each mask ``(objects, rows, columns)`` in its own color: ``(H, W, 3)`` in 0..1."""
    from matplotlib.colors import to_rgb

    pixels = np.asarray(picture.convert("RGB")) / 255.0
    result = 0.55 * pixels + 0.45 * pixels.mean(axis=2, keepdims=True)  # pale, so that masks are visible
    for number, mask in enumerate(enlarge(masks, pixels.shape[:2]).numpy() if len(masks) else ()):
        color = np.array(to_rgb(MASK_COLORS[number % len(MASK_COLORS)]))
        result = np.where(mask[..., None] > 0.5, 0.45 * pixels + 0.55 * color, result)
    return result


def plot_segmentation(picture, result: Segmentation, path: Path, title: str | None = None) -> Path:
    """Draw the overview: the picture, its objects, the components as colors, and each head's attention with its
    mask."""
    heads = result.attention.shape[0]
    columns = min(max(3, heads), 6)
    rows = 1 + -(-heads // columns)
    width, height = picture.size
    figure = new_figure(2.2 * columns, 2.2 * rows * min(2.0, height / width) + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    extent = (0, width, height, 0)
    panels = (
        ("image", picture.convert("RGB")),
        (f"normalized cut ({len(result.masks)} objects)", overlay(picture, result.masks)),
        ("components of the tokens", result.components.numpy()),
    )
    for axes, (name, image) in zip(grid[0], panels, strict=False):
        axes.imshow(image, extent=extent)
        axes.set_title(name, fontsize=8)
    for head, axes in zip(range(heads), grid[1:].flat, strict=False):
        axes.imshow(result.attention[head].numpy(), cmap="magma", extent=extent)
        mask = enlarge(result.attention_masks[head], (height, width)).numpy()
        if mask.min() < 0.5 < mask.max():
            axes.contour(mask, levels=[0.5], colors="cyan", linewidths=0.8)
        axes.set_title(f"class token, head {head + 1}", fontsize=8)
    return save(figure, path, title)
