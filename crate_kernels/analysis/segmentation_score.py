"""Scores of the segmentation by attention: ``python -m crate_kernels.analysis.segmentation_score``.

Cut-outs are pasted on real photos. The alpha channel of a cut-out is its exact mask. Two models with about the same
number of parameters, a CRATE and timm's ViT, learn *which* cut-out an image shows. Training uses no masks. Then the
class token's attention and normalized cuts of the keys are compared with the masks, on cut-outs and photos that neither
model has seen. Validation images choose the layer, the head and the threshold of each method, for each model.

Needs ``pip install '.[train]'`` and the Debian package tuxpaint-stamps-default.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.images import package_folder
from ..models import CRATE
from ..models.checkpoint import write_atomically
from ..version import __version__
from .segmentation import attention_mask, class_attention, enlarge, intersection_over_union, keys, object_masks

STAMPS = Path("/usr/share/tuxpaint/stamps")
TRAINING_PHOTOS = ("coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png", "grass.png", "brick.png", "moon.png")
TEST_PHOTOS = ("astronaut.png", "chelsea.png", "gravel.png", "hubble_deep_field.jpg", "coins.png")

MASSES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
COSINES = (0.0, 0.2, 0.4, 0.6)
METHODS = ("attention, best head", "attention, mean of heads", "normalized cut")


# -- images --------------------------------------------------------------------------------------------------------


@dataclass
class Composites:
    """Random images: a cut-out at a random place, in a random size, perhaps mirrored, on a random piece of a photo.

    ``stamps``: RGBA arrays, cropped to the visible part. ``photos``: RGB arrays. ``size``: pixels along an image.
    """

    stamps: list[np.ndarray]
    photos: list[np.ndarray]
    size: int

    def batch(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(count, 3, size, size)``, normalized; numbers of the cut-outs ``(count,)``; masks ``(count, size,
        size)``."""
        labels = generator.integers(len(self.stamps), size=count)
        images, masks = zip(*(self._paste(self.stamps[label], generator) for label in labels), strict=True)
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images, torch.from_numpy(labels), torch.from_numpy(np.stack(masks))

    def _paste(self, stamp: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        from PIL import Image

        size = self.size
        photo = self.photos[generator.integers(len(self.photos))]
        side = int(generator.uniform(0.35, 1.0) * min(photo.shape[:2]))
        top, left = (generator.integers(length - side + 1) for length in photo.shape[:2])
        piece = Image.fromarray(photo[top : top + side, left : left + side])
        image = np.array(piece.resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
        if generator.random() < 0.5:
            stamp = stamp[:, ::-1]
        scale = generator.uniform(0.45, 0.8) * size / max(stamp.shape[:2])
        height, width = (max(1, round(length * scale)) for length in stamp.shape[:2])
        # Colors are averaged with the weight alpha, because transparent pixels may have any color.
        weighted = np.dstack([stamp[..., :3] * (stamp[..., 3:] / 255.0), stamp[..., 3]]).astype(np.float32)
        small = np.dstack(
            [
                np.asarray(Image.fromarray(weighted[..., c]).resize((width, height), Image.Resampling.BOX))
                for c in range(4)
            ]
        )
        top, left = generator.integers(size - height + 1), generator.integers(size - width + 1)
        alpha = small[..., 3:] / 255.0
        place = image[top : top + height, left : left + width]
        place[:] = place * (1 - alpha) + small[..., :3]
        mask = np.zeros((size, size), dtype=bool)
        mask[top : top + height, left : left + width] = alpha[..., 0] > 0.5
        return image.clip(0, 255).astype(np.uint8), mask


def read_stamps(root: Path) -> list[np.ndarray]:
    """All cut-outs under ``root`` that have at least 80 pixels on each side and cover 30 to 95 % of their box."""
    from PIL import Image

    stamps = []
    for path in sorted(root.rglob("*.png")):
        with Image.open(path) as file:
            if file.mode not in ("RGBA", "LA", "PA") and "transparency" not in file.info:
                continue
            image = file.convert("RGBA")
        box = image.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox()
        if box is None or max(box[2] - box[0], box[3] - box[1]) < 80:
            continue
        image = image.crop(box)
        image.thumbnail((96, 96))
        stamp = np.asarray(image)
        if 0.3 < (stamp[..., 3] > 127).mean() < 0.95:
            stamps.append(stamp)
    if len(stamps) < 50:
        raise ValueError(f"{root}: {len(stamps)} usable cut-outs; install the Debian package tuxpaint-stamps-default")
    return stamps


def read_photos(names: tuple[str, ...]) -> list[np.ndarray]:
    """Photos that come inside the package scikit-image, at most 256 pixels along the shorter side."""
    import importlib.util

    from PIL import Image

    package = importlib.util.find_spec("skimage")
    if package is None:
        raise ModuleNotFoundError("the photos come with scikit-image: pip install scikit-image", name="skimage")
    photos = []
    for name in names:
        image = Image.open(Path(package_folder(package), "data", name)).convert("RGB")
        width, height = (256 * side // min(image.size) + 1 for side in image.size)
        image.thumbnail((width, height))
        photos.append(np.asarray(image))
    return photos


# -- models --------------------------------------------------------------------------------------------------------


def build_crate(size: int, patch: int, classes: int, dim: int, depth: int, heads: int) -> CRATE:
    return CRATE(
        image_size=size, patch_size=patch, num_classes=classes, dim=dim, depth=depth, heads=heads, dim_head=dim // heads
    )


def build_vit(size: int, patch: int, classes: int, dim: int, depth: int, heads: int) -> nn.Module:
    """timm's ViT of half the width. Its layers have as many parameters as CRATE's: 12 (d/2)² = 3 d²."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=size, patch_size=patch, num_classes=classes, embed_dim=dim // 2, depth=depth, num_heads=heads
    )


@torch.no_grad()
def attention_and_keys(model: Any, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's class attention ``(B, H, rows, columns)`` and keys ``(B, N, width)``, of CRATE or of timm's ViT."""
    if isinstance(model, CRATE):
        return class_attention(model, images, layer), keys(model, images, layer)
    seen: list[Tensor] = []
    attention = model.blocks[layer].attn
    handle = attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model.forward_features(images)
    handle.remove()
    query, key, _ = attention.qkv(seen[0]).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    maps = (query[:, :, :1] @ key.mT * attention.scale).softmax(dim=-1)[:, :, 0, 1:]
    side = round(maps.shape[-1] ** 0.5)
    return maps.unflatten(-1, (side, side)), key.transpose(1, 2).flatten(2)[:, 1:]


def train(model: nn.Module, data: Composites, steps: int, batch_size: int, rate: float, seed: int) -> float:
    """Train with AdamW and a cosine schedule -> accuracy of the last 100 steps.

    Both models see the same images in the same order.
    """
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    right: list[float] = []
    for step in range(1, steps + 1):
        images, labels, _ = data.batch(batch_size, generator)
        logits = model(images)
        cross_entropy(logits, labels, label_smoothing=0.1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        right.append((logits.argmax(-1) == labels).float().mean().item())
        if step % 100 == 0:
            print(f"  step {step}/{steps}: accuracy {100 * statistics.mean(right[-100:]):.1f} %", flush=True)
    model.eval()
    return statistics.mean(right[-100:])


# -- scores --------------------------------------------------------------------------------------------------------


def candidates(model: Any, images: Tensor, method: str) -> Iterator[tuple[dict, Callable[[], Tensor]]]:
    """Every setting of a method, with a function that computes the masks ``(B, H, W)`` in pixels."""
    size = (images.shape[-2], images.shape[-1])
    for layer in range(len(model.blocks)):
        attention, features = attention_and_keys(model, images, layer)
        if method == "normalized cut":
            grid = (attention.shape[2], attention.shape[3])
            for cosine in COSINES:
                for centered in (False, True):
                    yield (
                        {"layer": layer, "cosine": cosine, "centered": centered},
                        partial(cut, features, grid, size, cosine, centered),
                    )
            continue
        # Maps are enlarged before the threshold, so that outlines are finer than the patches.
        maps = enlarge(attention, size)
        for head, heat in {"mean": maps.mean(dim=1)}.items() if "mean" in method else enumerate(maps.unbind(1)):
            for mass in MASSES:
                yield {"layer": layer, "head": head, "mass": mass}, partial(attention_mask, heat, mass)


def cut(features: Tensor, grid: tuple[int, int], size: tuple[int, int], cosine: float, centered: bool) -> Tensor:
    """The first object of every image ``(B, *size)``, empty if there is none; ``features (B, N, d)``."""
    masks = torch.zeros(len(features), *grid, dtype=torch.bool)
    for mask, patches in zip(masks, features, strict=True):
        for found in object_masks(patches, grid, 1, cosine, centered):
            mask.copy_(found)
    return enlarge(masks, size) > 0.5


def masks_for(model: nn.Module, images: Tensor, method: str, setting: dict) -> Tensor:
    """The masks of one setting of :func:`candidates`."""
    return next(make() for found, make in candidates(model, images, method) if found == setting)


def score(model: nn.Module, validation: tuple, test: tuple) -> dict[str, dict]:
    """Method -> mean IoU on the test images, with the setting that scores best on the validation images."""
    result = {}
    for method in METHODS:
        count = 64 if method == "normalized cut" else len(validation[0])  # each image needs an eigenproblem
        images, truth = validation[0][:count], validation[2][:count]
        found = [
            (intersection_over_union(make(), truth).mean().item(), setting)
            for setting, make in candidates(model, images, method)
        ]
        best, setting = max(found, key=lambda pair: pair[0])
        ious = intersection_over_union(masks_for(model, test[0], method, setting), test[2])
        result[method] = {
            "miou": ious.mean().item(), "standard_error": (ious.std() / len(ious) ** 0.5).item(),
            "validation_miou": best, "setting": setting,
        }  # fmt: skip
    return result


def bounds(test: tuple, patch: int) -> dict[str, float]:
    """Scores without a model: the whole image, a disc in the middle, and the exact masks rounded to patches."""
    truth = test[2]
    size = truth.shape[-1]
    rows = torch.arange(size) - (size - 1) / 2
    disc = (rows[:, None] ** 2 + rows**2 < (0.35 * size) ** 2).expand_as(truth)
    patches = nn.functional.avg_pool2d(truth.float()[:, None], patch)[:, 0]
    rounded = enlarge((patches > 0.5).float(), (size, size)) > 0.5
    return {
        name: intersection_over_union(masks, truth).mean().item()
        for name, masks in (
            ("whole image", torch.ones_like(truth)), ("disc in the middle", disc), ("truth in patches", rounded),
        )
    }  # fmt: skip


def picture(path: Path, models: dict[str, nn.Module], scores: dict, test: tuple, count: int = 8) -> Path:
    """Draw test images, their exact masks, and the attention of each model's best head."""
    from .plots import new_figure, save

    method = METHODS[0]
    rows = ["image", "exact mask", *models]
    figure = new_figure(1.3 * count + 0.8, 1.36 * len(rows))
    grid = figure.subplots(len(rows), count)
    images = test[0][:count]
    pixels = ((images + 1) / 2).permute(0, 2, 3, 1).numpy()
    shown = [pixels, test[2][:count].float().numpy()]
    for name, model in models.items():
        setting = scores[name][method]["setting"]
        shown.append(attention_and_keys(model, images, setting["layer"])[0][:, setting["head"]].numpy())
        masks = masks_for(model, images, method, setting).numpy()
        for axes, mask in zip(grid[len(shown) - 1], masks, strict=True):
            axes.contour(mask, levels=[0.5], colors="cyan", linewidths=1, extent=(0, 1, 0, 1), origin="upper")
    for row, (name, maps) in enumerate(zip(rows, shown, strict=True)):
        for axes, image in zip(grid[row], maps, strict=True):
            axes.imshow(image, cmap="gray" if row < 2 else "magma", extent=(0, 1, 0, 1), zorder=-1)
            axes.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(name, fontsize=7)
    return save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=Path, default=STAMPS, help=f"folder of cut-outs (default {STAMPS})")
    parser.add_argument("--output", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--cut-outs", type=int, default=100, help="how many to learn to tell apart (default 100)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--patch", type=int, default=6)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--images", type=int, default=400, help="test images; half as many for validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and images; a run each")
    args = parser.parse_args(arguments)

    began = time.monotonic()
    stamps = read_stamps(args.stamps)
    held_out, validation_stamps = stamps[::5], stamps[1::10]
    training_stamps = [stamp for i, stamp in enumerate(stamps) if i % 5 and i % 10 != 1]
    count = min(args.cut_outs, len(training_stamps))
    training_stamps = [training_stamps[i * len(training_stamps) // count] for i in range(count)]  # from all themes
    photos = read_photos(TRAINING_PHOTOS)
    data = Composites(training_stamps, photos, args.size)
    validation = Composites(validation_stamps, photos, args.size).batch(args.images // 2, np.random.default_rng(1))
    test = Composites(held_out, read_photos(TEST_PHOTOS), args.size).batch(args.images, np.random.default_rng(2))
    sizes = (args.size, args.patch, len(training_stamps), args.dim, args.depth, args.heads)
    record: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(args).items()},
        "cut_outs": {"training": len(training_stamps), "validation": len(validation_stamps), "test": len(held_out)},
        "versions": {"crate_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "without_a_model": bounds(test, args.patch),
        "models": {},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        models: dict[str, Any] = {}
        scores = {}
        for name, build in (("CRATE", build_crate), ("ViT", build_vit)):
            for state in ("untrained", "trained"):
                torch.manual_seed(seed)
                model = models[f"{name}, {state}"] = build(*sizes).eval()
                run: dict[str, Any] = {"seed": seed}
                if state == "trained":
                    print(f"{name}, seed {seed}", flush=True)
                    start = time.monotonic()
                    run["accuracy"] = train(model, data, args.steps, args.batch_size, args.learning_rate, seed)
                    run["training_seconds"] = time.monotonic() - start
                run["scores"] = scores[f"{name}, {state}"] = score(model, validation, test)
                parameters = sum(p.numel() for p in model.parameters())
                entry = record["models"].setdefault(f"{name}, {state}", {"parameters": parameters, "runs": []})
                entry["runs"].append(run)
        if seed == args.seeds[0]:
            models["CRATE, trained"].save(
                args.output / "model.safetensors", data="cut-outs on photos", mean=(0.5,) * 3, std=(0.5,) * 3
            )
            picture(args.output / "segmentation.png", models, scores, test)
        record["seconds"] = time.monotonic() - began
        write_atomically(args.output / "scores.json", (json.dumps(record, indent=2) + "\n").encode())
    print(table(record))
    return 0


def table(record: dict) -> str:
    """The result as Markdown: mean and standard deviation over the runs of the mean IoU, in percent."""
    lines = ["| | parameters | accuracy | " + " | ".join(METHODS) + " |", "|---|---|---|" + "---|" * len(METHODS)]
    for name, entry in record["models"].items():
        runs = entry["runs"]
        right = [run["accuracy"] for run in runs if "accuracy" in run]
        cells = [f"{100 * statistics.mean(right):.0f} %" if right else ""]
        for method in METHODS:
            values = [100 * run["scores"][method]["miou"] for run in runs]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
        lines.append(f"| {name} | {entry['parameters']:,} | " + " | ".join(cells) + " |")
    bound = ", ".join(f"{name} {100 * value:.1f}" for name, value in record["without_a_model"].items())
    return "\n".join(lines) + f"\n\nWithout a model: {bound}. {record['seconds']:.0f} s in all."


if __name__ == "__main__":
    raise SystemExit(main())
