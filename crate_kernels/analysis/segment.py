"""``crate-kernels segment``: what a vision CRATE separates in images, as masks and pictures to look at."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.vision import VisionModel
from .images import model_input, read_image
from .inputs import open_model
from .plots import new_figure, save
from .segmentation import attention_mask, class_attention, enlarge, keys, object_masks, principal_components

MASK_COLOURS = ("#ee6677", "#4477aa", "#ccbb44", "#228833", "#66ccee", "#aa3377")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="image files of any size")
    parser.add_argument(
        "--checkpoint", required=True, help="a vision model's safetensors file, or the folder of a training run"
    )
    parser.add_argument("--model", help="registered name of the model, for a public checkpoint that does not say")
    parser.add_argument("--output", default="segments", help="folder of the results (default segments)")
    parser.add_argument("--size", type=int, help="pixels along the shorter side that the model sees (default: its own)")
    parser.add_argument("--layer", type=int, default=-1, help="layer whose attention is read (default -1, the last)")
    parser.add_argument("--mass", type=float, default=0.6, help="share of a head's attention in its mask (default 0.6)")
    parser.add_argument("--masks", type=int, default=3, help="most objects to cut out of an image (default 3)")
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="cosine from which patches belong together (default 0)"
    )


def run(args: argparse.Namespace) -> int:
    began = time.monotonic()
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size must be at least 1, got {args.size}")
    if args.masks < 1:
        raise ValueError(f"--masks must be at least 1, got {args.masks}")
    model, metadata = open_model(args.checkpoint, args.model)
    if not isinstance(model, VisionModel):
        raise ValueError(f"{args.checkpoint} holds a {type(model).__name__}, which sees no images")
    if model.config.get("pool") == "mean":
        print("note: this model's head reads the mean of all tokens, so training shaped its class token little")
    output = Path(args.output)
    names = result_names(args.images)
    pictures = [read_image(path, model.patch_embedding.channels) for path in args.images]
    results = segment(
        model, metadata, pictures, size=args.size, layer=args.layer, mass=args.mass, count=args.masks,
        threshold=args.threshold,
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
    """What was found in one image, on its grid of patches.

    ``attention (H, rows, columns)``: of the class token; ``attention_masks`` their thresholded maps, bool.
    ``masks (objects, rows, columns)``: of the normalised cuts, bool.
    ``components (rows, columns, 3)``: of the last layer's tokens, 0..1, in axes that all images share.
    """

    attention: Tensor
    attention_masks: Tensor
    masks: Tensor
    components: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.attention.shape[1:])


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
    """Segment Pillow images, each at its own size; see the functions of :mod:`crate_kernels.analysis.segmentation`."""
    found, features = [], []
    for picture in pictures:
        image = model_input(picture, model, metadata, size)
        attention = class_attention(model, image, layer)[0]
        grid = tuple(attention.shape[1:])
        # Patches that an ISTA step made non-negative share a large mean; without it half of all cosines are negative.
        masks = object_masks(keys(model, image, layer)[0], grid, count, threshold, centre=True)
        features.append(model.norm(model.run_blocks(model.embed(image)))[0, 1:])
        found.append((attention, attention_mask(attention, mass), masks))
    components = principal_components(features)
    return [
        Segmentation(attention, thresholded, masks, colours.unflatten(0, tuple(attention.shape[1:])))
        for (attention, thresholded, masks), colours in zip(found, components, strict=True)
    ]


def result_names(paths: list[str]) -> list[str]:
    """A name for each image's results: its file's, with a number where two would be equal."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        number = 2
        while name in names:
            name, number = f"{stem}_{number}", number + 1
        names.append(name)
    return names


def write_label_image(path: Path, masks: Tensor, size: tuple[int, int]) -> None:
    """The masks as one grey PNG in the image's size: 0 is background, 1 the first object, 2 the second ..."""
    from PIL import Image

    labels = torch.zeros(masks.shape[1:], dtype=torch.uint8)
    for number, mask in enumerate(masks, 1):
        labels[mask] = number
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels.numpy()).resize(size, Image.Resampling.NEAREST).save(path)


def overlay(picture, masks: Tensor) -> np.ndarray:
    """The picture with each mask ``(objects, rows, columns)`` in a colour of its own: ``(H, W, 3)`` in 0..1."""
    from matplotlib.colors import to_rgb

    pixels = np.asarray(picture.convert("RGB")) / 255.0
    result = 0.55 * pixels + 0.45 * pixels.mean(axis=2, keepdims=True)  # faded, so that masks stand out
    for number, mask in enumerate(enlarge(masks, pixels.shape[:2]).numpy() if len(masks) else ()):
        colour = np.array(to_rgb(MASK_COLOURS[number % len(MASK_COLOURS)]))
        result = np.where(mask[..., None] > 0.5, 0.45 * pixels + 0.55 * colour, result)
    return result


def plot_segmentation(picture, result: Segmentation, path: Path, title: str | None = None) -> Path:
    """One sheet: the picture, its objects, the components as colours, and every head's attention with its mask."""
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
        (f"normalised cut ({len(result.masks)} objects)", overlay(picture, result.masks)),
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
