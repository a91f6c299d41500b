"""Does pretraining transfer? CRATE and ViT on Fashion-MNIST, with MAE, with DINO, and trained from scratch.

::

    apt install dataset-fashion-mnist                       # or --root with torchvision's files
    nice python benchmarks/pretraining_study.py             # about half an hour of CPU time; resumes after a kill
    python benchmarks/pretraining_study.py --render         # the tables of docs/pretraining_study.md

A *variant* is a family of layers with a number of steps. ``crate`` is CRATE. ``vit`` has the same embedding, positions,
pooling and heads, but the layers of a Vision Transformer. Its tokens are narrower, so that it has as many parameters.
It trains for as many steps. ``vit-time`` is the same network, trained for the CPU time of ``crate``.

A *method* is one of five. ``mae`` and ``dino`` pretrain without labels and then fine-tune on a few labels. The other
three do not pretrain. ``scratch`` trains on the same few labels for the CPU time of pretraining and fine-tuning
together. ``short`` trains for the CPU time of fine-tuning alone. ``mae-short`` is ``short`` with the network of
``mae``, which embeds the patches differently.

The last 5,000 training images choose learning rates and the layer of the linear probe, with another seed and half the
steps. The test images are used once for each final model, after its training. The results file has one JSON line for
each finished piece of work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_kernels.data.images import ImageSource, load
from crate_kernels.models import CRATE, CrateDINO, CrateMAE
from crate_kernels.models.mae import CrateMAEClassifier
from crate_kernels.training.dino import DINOLoss
from crate_kernels.training.initial import encoder
from crate_kernels.training.pretrain import probe_accuracy, random_crops

ROOT = Path(__file__).parents[1]
DIM, DEPTH, HEADS, PATCH = {"crate": 64, "vit": 32}, 4, {"crate": 4, "vit": 2}, 7
VARIANTS = ("crate", "vit", "vit-time")
PRETRAINING = ("mae", "dino")
FEW = ("short", "mae-short")
SEEDS, TUNING_SEED = (0, 1, 2), 100
BATCH, LABELS, VALIDATION = 128, 60, 5000
RATES = (3e-3, 1e-2)
MASKED, CROP, FLIP, TEACHER_MOMENTUM, JITTER = 0.5, 0.6, 0.5, 0.99, 0.4


# -- networks ----------------------------------------------------------------------------------------------------------


class ViT(CRATE):
    """CRATE's model with the layers of a Vision Transformer."""

    def block(self, dim: int, heads: int, dim_head: int, **options) -> nn.Module:
        return Block(dim, heads, mlp_ratio=4.0, qkv_bias=True)


class ViTMAEClassifier(CrateMAEClassifier):
    """CRATE-MAE's classifier with the layers of a Vision Transformer."""

    block = ViT.block


def family(variant: str) -> str:
    return variant.partition("-")[0]


def sizes(kind: str) -> dict:
    return dict(
        image_size=28, patch_size=PATCH, channels=1, dim=DIM[kind], depth=DEPTH, heads=HEADS[kind],
        dim_head=DIM[kind] // HEADS[kind], pool="mean",
    )  # fmt: skip


def classifier(kind: str, method: str) -> CRATE:
    """The network that learns from labels. It has the embedding of its pretraining."""
    if method in ("mae", "mae-short"):
        return (CrateMAEClassifier if kind == "crate" else ViTMAEClassifier)(lambd=0.1, num_classes=10, **sizes(kind))
    return (CRATE if kind == "crate" else ViT)(num_classes=10, **sizes(kind))


def masked_autoencoder(kind: str) -> CrateMAE:
    model = CrateMAE(
        img_size=28, patch_size=PATCH, in_chans=1, embed_dim=DIM[kind], depth=DEPTH, num_heads=HEADS[kind],
        decoder_depth=2, norm_pix_loss=True, lambd=0.1,
    )  # fmt: skip
    if kind == "vit":
        for name in ("blocks", "decoder_blocks"):
            layers = [Block(DIM[kind], HEADS[kind], mlp_ratio=4.0, qkv_bias=True) for _ in getattr(model, name)]
            setattr(model, name, nn.ModuleList(layers))
        model.reset_parameters = None  # it works only with CRATE's layers
    return model


def self_distillation(kind: str) -> CrateDINO:
    options = dict(hidden=256, bottleneck=64, prototypes=512)
    model = CrateDINO(**options, **sizes(kind))
    if kind == "vit":
        for branch in (model.student, model.teacher):
            branch.backbone = ViT(num_classes=0, **sizes(kind))
        model.teacher.load_state_dict(model.student.state_dict())
        model.teacher.requires_grad_(False)
    return model


def transfer(source: nn.Module, target: CRATE) -> None:
    """Put the pretrained weights into a classifier. The head keeps its random initial weights."""
    state = encoder(source) if isinstance(source, CrateMAE) else source.backbone.state_dict()
    missing, unexpected = target.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise AssertionError(f"weights do not fit: {missing}, {unexpected}")


# -- data --------------------------------------------------------------------------------------------------------------


class Data:
    """Normalized images. The test images are decoded only when :meth:`test` is called."""

    def __init__(self, root: str | None):
        self._data = load(ImageSource("fashion-mnist", root))
        self.images, self.labels = self._tensors(self._data.train)
        self.pool = len(self.labels) - VALIDATION

    def _tensors(self, split) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(split.images.copy()).float().div_(255).unsqueeze(1)
        return (images - self._data.mean[0]) / self._data.std[0], torch.from_numpy(split.labels.copy())

    def unlabelled(self) -> Tensor:
        return self.images[: self.pool]

    def labelled(self, seed: int) -> tuple[Tensor, Tensor]:
        """``LABELS`` images of each class, drawn by the seed."""
        order = torch.randperm(self.pool, generator=torch.Generator().manual_seed(1000 + seed))
        chosen = torch.cat([order[self.labels[order] == label][:LABELS] for label in range(10)])
        return self.images[chosen], self.labels[chosen]

    def validation(self) -> tuple[Tensor, Tensor]:
        return self.images[self.pool :], self.labels[self.pool :]

    def test(self) -> tuple[Tensor, Tensor]:
        return self._tensors(self._data.test)


def batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of endless epochs, each in a new order."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (part for part in order.split(BATCH) if len(part) == BATCH)


# -- training ----------------------------------------------------------------------------------------------------------


def optimize(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float, after=lambda progress: None
) -> float:
    """AdamW with a warm-up over a tenth of the steps, then a cosine. Returns the CPU time in seconds."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    began, warmup = time.process_time(), max(1, steps // 10)
    model.train()
    for step in range(steps):
        factor = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss().backward()
        nn.utils.clip_grad_norm_([p for p in weights if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after((step + 1) / steps)
    return time.process_time() - began


def pretrainer(kind: str, method: str, images: Tensor, seed: int) -> tuple[nn.Module, Callable, Callable]:
    """A model, the function that computes its loss on the next batch, and the function to call after a step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = batches(len(images), generator)
    if method == "mae":
        model = masked_autoencoder(kind)

        def loss() -> Tensor:
            views = random_crops(images[next(order)], 28, (CROP, 1.0), FLIP, generator)
            return model(views, MASKED, torch.rand(len(views), 16, generator=generator))[0]

        return model, loss, lambda progress: None
    model, criterion = self_distillation(kind), DINOLoss(512)

    def view(batch: Tensor, size: int, scale: tuple[float, float]) -> Tensor:
        contrast, brightness = JITTER * (2 * torch.rand(2, len(batch), 1, 1, 1, generator=generator) - 1)
        return random_crops(batch, size, scale, FLIP, generator) * (1 + contrast) + brightness

    def loss() -> Tensor:
        batch = images[next(order)]
        views = [view(batch, 28, (CROP, 1.0)) for _ in range(2)] + [view(batch, 14, (0.3, CROP)) for _ in range(2)]
        return criterion(model.student(views), model.teach(views[:2]))

    def after(progress: float) -> None:
        model.update_teacher(1 - (1 - TEACHER_MOMENTUM) * 0.5 * (1 + math.cos(math.pi * progress)))

    return model, loss, after


def pretrain(kind: str, method: str, images: Tensor, seed: int, steps: int, rate: float) -> tuple[nn.Module, float]:
    model, loss, after = pretrainer(kind, method, images, seed)
    return model, optimize(model, loss, steps, rate, after)


def supervised(model: CRATE, images: Tensor, labels: Tensor, seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = batches(len(images), generator)

    def loss() -> Tensor:
        chosen = next(order)
        views = random_crops(images[chosen], 28, (CROP, 1.0), FLIP, generator)
        return nn.functional.cross_entropy(model(views), labels[chosen], label_smoothing=0.1)

    return loss


@torch.no_grad()
def accuracy(model: CRATE, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(i).argmax(-1) == t).sum()) for i, t in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


@torch.no_grad()
def features(model: CRATE, images: Tensor, layer: int) -> Tensor:
    """The mean of the patch tokens after a layer: ``(B, dim)``."""
    model.eval()
    found = []
    for part in images.split(500):
        (tokens,) = model.forward_intermediates(
            part, [layer], output_fmt="NLC", intermediates_only=True, stop_early=True
        )
        found.append(tokens.mean(dim=1))
    return torch.cat(found)


def probe(model: CRATE, layer: int, few: tuple[Tensor, Tensor], judged: tuple[Tensor, Tensor]) -> float:
    """The accuracy of logistic regression on the features of a few labelled images."""
    return probe_accuracy(features(model, few[0], layer), few[1], features(model, judged[0], layer), judged[1])


# -- the study ---------------------------------------------------------------------------------------------------------


class Study:
    """Pieces of work, each done once and recorded as a line of the results file."""

    def __init__(self, results: Path, folder: Path, data: Data, budget: dict[str, float], minutes: float = math.inf):
        self.results, self.folder, self.data, self.budget = results, folder, data, budget
        self.end = time.monotonic() + 60 * minutes
        self.done: dict[str, dict] = {}
        if results.exists():
            for line in results.read_text().splitlines():
                record = json.loads(line)
                self.done[record["piece"]] = record

    def piece(self, name: str, work: Callable[[], dict]) -> dict:
        if name not in self.done:
            if time.monotonic() > self.end:
                raise SystemExit("time is up: the same command resumes")
            self.done[name] = {"piece": name} | work()
            with open(self.results, "a") as file:
                file.write(json.dumps(self.done[name]) + "\n")
            print(json.dumps(self.done[name]), flush=True)
        return self.done[name]

    def run(self) -> None:
        recorded = self.piece("settings", self.settings)["cpu_seconds"]
        if recorded != self.budget:
            raise SystemExit(f"{self.results} was made with a budget of {recorded}: give another --results")
        self.piece("calibration", self.calibrate)
        for kind in ("crate", "vit"):
            for method in PRETRAINING:
                self.tune_pretraining(kind, method)
                self.tune(kind, method, "finetune")
            self.tune(kind, "scratch", "scratch")
        # Seed by seed, with the most important comparison first, so that an unfinished study has complete rows.
        equal_steps, equal_time = VARIANTS[:2], VARIANTS[2:]
        usual = (*PRETRAINING, "scratch")
        for variants, methods in ((equal_steps, usual), (equal_steps, FEW), (equal_time, (*usual, *FEW))):
            for seed, variant in itertools.product(SEEDS, variants):
                for method in methods:
                    name = f"final {variant} {method} {seed}"
                    self.piece(name, lambda v=variant, m=method, s=seed: self.final(v, m, s))
                if variant == family(variant):
                    self.piece(f"untrained {variant} {seed}", lambda k=variant, s=seed: self.untrained(k, s))

    def settings(self) -> dict:
        count = {kind: sum(p.numel() for p in classifier(kind, "scratch").parameters()) for kind in DIM}
        return {
            "parameters": count, "dim": DIM, "heads": HEADS, "depth": DEPTH, "patch": PATCH, "batch": BATCH,
            "labels_per_class": LABELS, "validation_images": VALIDATION, "unlabelled_images": self.data.pool,
            "cpu_seconds": self.budget, "rates": RATES, "torch": torch.__version__, "threads": torch.get_num_threads(),
        }  # fmt: skip

    def calibrate(self) -> dict:
        """CPU milliseconds of a training step: the median of interleaved rounds."""
        few = self.data.labelled(TUNING_SEED)
        times: dict[str, list[float]] = {}
        for _ in range(5):
            for kind in ("crate", "vit"):
                for method in (*PRETRAINING, "scratch"):
                    if method == "scratch":
                        model, after = classifier(kind, method), lambda progress: None
                        loss = supervised(model, *few, 0)
                    else:
                        model, loss, after = pretrainer(kind, method, self.data.unlabelled()[:5000], 0)
                    optimize(model, loss, 2, 1e-3, after)
                    times.setdefault(f"{kind} {method}", []).append(optimize(model, loss, 8, 1e-3, after) / 8 * 1e3)
        return {"milliseconds": {name: round(statistics.median(values), 3) for name, values in times.items()}}

    def steps(self, variant: str, method: str, phase: str, share: float = 1.0) -> int:
        """Number of steps. CRATE's steps fill a share of the budget. ``vit`` takes as many steps, ``vit-time`` as much
        time."""
        seconds = {"pretrain": self.budget["pretrain"], "finetune": self.budget["finetune"]}
        seconds["scratch"] = sum(seconds.values())
        cost = self.done["calibration"]["milliseconds"]
        kind = family(variant) if variant.endswith("-time") else "crate"
        return round(share * 1e3 * seconds[phase] / cost[f"{kind} {method if phase == 'pretrain' else 'scratch'}"])

    def weights(self, kind: str, method: str, rate: float) -> Path:
        return self.folder / f"{kind}-{method}-{rate}.pt"

    def tune_pretraining(self, kind: str, method: str) -> None:
        """Find the learning rate and the layer with the best linear probe on validation images."""
        for rate in RATES:
            self.piece(f"tune {kind} {method} {rate}", lambda r=rate: self.try_pretraining(kind, method, r))

    def try_pretraining(self, kind: str, method: str, rate: float) -> dict:
        steps = self.steps(kind, method, "pretrain", 0.5)
        model, seconds = pretrain(kind, method, self.data.unlabelled(), TUNING_SEED, steps, rate)
        network = classifier(kind, method)
        transfer(model, network)
        few, judged = self.data.labelled(TUNING_SEED), self.data.validation()
        found = [probe(network, layer, few, judged) for layer in range(DEPTH)]
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), self.weights(kind, method, rate))
        return {"rate": rate, "steps": steps, "cpu_seconds": seconds, "validation_probe": found}

    def chosen(self, kind: str, method: str) -> dict:
        """The choice by validation: the learning rate of pretraining, and the layer for the probe."""
        tried = [self.done[f"tune {kind} {method} {rate}"] for rate in RATES]
        best = max(tried, key=lambda record: max(record["validation_probe"]))
        layer = best["validation_probe"].index(max(best["validation_probe"]))
        return {"pretrain": best["rate"], "layer": layer}

    def best(self, kind: str, method: str, phase: str) -> float:
        tried = [self.done[f"tune {kind} {method} {phase} {rate}"] for rate in RATES]
        return max(tried, key=lambda record: record["validation_accuracy"])["rate"]

    def tune(self, kind: str, method: str, phase: str) -> None:
        for rate in RATES:
            self.piece(f"tune {kind} {method} {phase} {rate}", lambda r=rate: self.try_labels(kind, method, phase, r))

    def try_labels(self, kind: str, method: str, phase: str, rate: float) -> dict:
        torch.manual_seed(TUNING_SEED)
        network = classifier(kind, method)
        if phase == "finetune":
            pretrained = self.chosen(kind, method)["pretrain"]
            if not self.weights(kind, method, pretrained).exists():
                self.try_pretraining(kind, method, pretrained)
            network.load_state_dict(torch.load(self.weights(kind, method, pretrained), weights_only=True))
        loss = supervised(network, *self.data.labelled(TUNING_SEED), TUNING_SEED)
        steps = self.steps(kind, method, phase, 0.5)
        seconds = optimize(network, loss, steps, rate)
        result = accuracy(network, *self.data.validation())
        return {"rate": rate, "steps": steps, "cpu_seconds": seconds, "validation_accuracy": result}

    def final(self, variant: str, method: str, seed: int) -> dict:
        kind, few = family(variant), self.data.labelled(seed)
        torch.manual_seed(seed)
        network, record, phase = classifier(kind, method), {}, "finetune"
        rate = self.best(kind, method, phase) if method in PRETRAINING else self.best(kind, "scratch", "scratch")
        if method == "scratch":
            phase = "scratch"
        if method in PRETRAINING:
            choice = self.chosen(kind, method)
            steps = self.steps(variant, method, "pretrain")
            model, seconds = pretrain(kind, method, self.data.unlabelled(), seed, steps, choice["pretrain"])
            transfer(model, network)
            record |= {"pretrain_steps": steps, "pretrain_cpu_seconds": seconds}
            record["probe"] = probe(network, choice["layer"], few, self.data.test())
        steps = self.steps(variant, method, phase)
        loss = supervised(network, *few, seed)
        record |= {"steps": steps, "cpu_seconds": optimize(network, loss, steps, rate)}
        return record | {"accuracy": accuracy(network, *self.data.test())}

    def untrained(self, kind: str, seed: int) -> dict:
        """The linear probe of a network with random weights, at the layer that is best on validation images."""
        torch.manual_seed(seed)
        network, few = classifier(kind, "scratch"), self.data.labelled(seed)
        found = [probe(network, layer, few, self.data.validation()) for layer in range(DEPTH)]
        return {"probe": probe(network, found.index(max(found)), few, self.data.test())}


# -- tables ------------------------------------------------------------------------------------------------------------


def render(done: dict[str, dict]) -> str:
    """The results as a Markdown table: mean and standard deviation over the seeds, in percent."""

    def cell(prefix: str, name: str) -> str:
        values = [100 * r[name] for piece, r in done.items() if piece.startswith(prefix + " ") and name in r]
        if not values:
            return ""
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}" + (
            "" if len(values) == len(SEEDS) else f" ({len(values)} seeds)"
        )

    titles = {"crate": "CRATE", "vit": "ViT, same parameters", "vit-time": "ViT, same time"}
    shown = [variant for variant in VARIANTS if any(piece.startswith(f"final {variant} ") for piece in done)]
    lines = [f"| | {' | '.join(titles[variant] for variant in shown)} |", f"| --- |{' --- |' * len(shown)}"]
    rows = [("linear probe, untrained", "untrained", "probe", None)]
    rows += [(f"linear probe after {method.upper()}", "final", "probe", method) for method in PRETRAINING]
    rows += [(f"{method.upper()}, then fine-tuning", "final", "accuracy", method) for method in PRETRAINING]
    rows += [("from scratch, budget of fine-tuning alone", "final", "accuracy", "short")]
    rows += [("the same with MAE's network", "final", "accuracy", "mae-short")]
    rows += [("from scratch, budget of both phases", "final", "accuracy", "scratch")]
    for title, stage, name, method in rows:
        cells = [cell(f"{stage} {variant}" + (f" {method}" if method else ""), name) for variant in shown]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder of Fashion-MNIST; default: that of the Debian package")
    parser.add_argument("--pretrain-seconds", type=float, default=18.0, help="CPU time of CRATE's pretraining")
    parser.add_argument("--finetune-seconds", type=float, default=12.0, help="CPU time of CRATE's fine-tuning")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "pretraining_study.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/pretraining_study"), help="for weights")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end after the first piece of work beyond this time"
    )
    parser.add_argument("--render", action="store_true", help="only print the table")
    args = parser.parse_args()
    if args.render:
        records = map(json.loads, args.results.read_text().splitlines())
        print(render({record["piece"]: record for record in records}))
        return
    torch.set_num_threads(1)
    budget = {"pretrain": args.pretrain_seconds, "finetune": args.finetune_seconds}
    Study(args.results, args.folder, Data(args.root), budget, args.minutes).run()


if __name__ == "__main__":
    main()
