"""CRATE-DINO: teacher and student, views, both losses against their formulas, probes, and a resumable run."""

import argparse
import json

import pytest
import torch

from crate_kernels.models import CrateDINO, load_model

from .parity import assert_backends_agree

pytest.importorskip("timm")
pytest.importorskip("rich")


from crate_kernels.data import images as data
from crate_kernels.data.images import DataError, ImageData, Split
from crate_kernels.training import dino, mae, pretrain

SMALL = dict(image_size=8, patch_size=4, dim=16, depth=2, heads=2, dim_head=8, hidden=12, bottleneck=6)


def small(**options):
    torch.manual_seed(0)
    return CrateDINO(**SMALL | dict(prototypes=10) | options)


def views(generator=None):
    generator = generator or torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, size, size, generator=generator) for size in (8, 8, 4, 4)]


def test_views_of_different_sizes_are_scored_one_by_one_as_together():
    model = small().eval()
    together = model.student(views())
    assert together.shape == (4, 3, 10)
    for i, view in enumerate(views()):
        torch.testing.assert_close(model.student([view])[0], together[i], rtol=1e-4, atol=1e-5)
    assert together.abs().max() <= 1 + 1e-5  # cosines
    lengths = small(prototypes=0).student(views()).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(4, 3))


def test_teacher_follows_the_student_and_gets_no_gradient():
    model = small()
    before = [p.clone() for p in model.teacher.parameters()]
    model.student(views()).sum().backward()
    assert not model.teach(views()[:2]).requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1)
    model.update_teacher(0.9)
    for old, new, student in zip(before, model.teacher.parameters(), model.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * student)
    torch.testing.assert_close(model(views()[0]), model.teacher.backbone(views()[0]))


@pytest.mark.parametrize("prototypes", [10, 0])
def test_backends_agree(prototypes):
    model = small(prototypes=prototypes)
    assert_backends_agree(model, lambda m: m.student([v.double() for v in views()]))


def test_saved_files_rebuild_model_and_backbone(tmp_path):
    model, images = small(), views()[0]
    model.save(tmp_path / "dino.safetensors")
    again = load_model(tmp_path / "dino.safetensors")
    torch.testing.assert_close(again.student(views()), model.student(views()), rtol=0, atol=0)
    model.backbone.save(tmp_path / "backbone.safetensors")
    torch.testing.assert_close(load_model(tmp_path / "backbone.safetensors")(images), model(images), rtol=0, atol=0)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_dino_loss_is_centered_sharpened_cross_entropy():
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(3, 4, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    criterion = dino.DINOLoss(5, 0.2, 0.05, 0.75)
    criterion.center.copy_(torch.randn(5, generator=generator))
    center, total = criterion.center.clone(), 0.0
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    for t, s in pairs:
        for b in range(4):
            target = torch.softmax((teacher[t, b] - center) / 0.05, 0)
            total -= (target * torch.log(torch.softmax(student[s, b] / 0.2, 0))).sum() / 4 / len(pairs)
    torch.testing.assert_close(criterion(student, teacher), total)
    torch.testing.assert_close(criterion.center, 0.75 * center + 0.25 * teacher.reshape(-1, 5).mean(0))


def test_simdino_loss_is_distance_less_coding_rate():
    generator = torch.Generator().manual_seed(3)
    unit = torch.nn.functional.normalize
    student = unit(torch.randn(3, 7, 4, generator=generator, dtype=torch.float64), dim=-1)
    teacher = unit(torch.randn(2, 7, 4, generator=generator, dtype=torch.float64), dim=-1)
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    distance = sum(0.5 * (student[s] - teacher[t]).pow(2).sum(-1).mean() for t, s in pairs) / 4
    rates = [0.5 * torch.logdet(torch.eye(4) + 4 / (7 * 0.25) * z.T @ z) for z in student[:2]]
    expected = distance - 2 * (sum(rates) / 2) / 4
    torch.testing.assert_close(dino.simdino_loss(student, teacher, gamma=2.0, eps=0.5).double(), expected, rtol=1e-5,
                               atol=1e-6)  # fmt: skip
    collapsed, spread = torch.ones(3, 7, 4) / 2, student[:1].expand(3, -1, -1)
    assert dino.simdino_loss(collapsed, collapsed[:2]) > dino.simdino_loss(spread, spread[:2])


# -- views and probes --------------------------------------------------------------------------------------------------


def test_crops_are_pieces_of_the_image():
    ramp = torch.linspace(0, 1, 32).expand(200, 1, 32, 32)
    whole = pretrain.random_crops(ramp, 32, (1.0, 1.0), 0.0, torch.Generator())
    torch.testing.assert_close(whole, ramp)
    crops = pretrain.random_crops(ramp, 8, (0.25, 0.25), 0.5, torch.Generator().manual_seed(0))
    widths = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    torch.testing.assert_close(widths.abs(), torch.full((200,), 14 / 31), rtol=1e-4, atol=1e-4)
    assert 70 < (widths < 0).sum() < 130  # mirrored
    assert crops.min() >= 0
    assert crops.max() <= 1
    assert crops[:, 0, 0, 0].std() > 0.1  # at different places
    again = pretrain.random_crops(ramp, 8, (0.25, 0.25), 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(crops, again, rtol=0, atol=0)


def test_probes_find_what_is_there():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=generator)
    features = torch.randn(600, 8, generator=generator) + 4 * torch.eye(8)[labels]
    split = (features[:400], labels[:400], features[400:], labels[400:])
    noise = (features[:400], labels[:400][torch.randperm(400, generator=generator)], *split[2:])
    for probe in (pretrain.knn_accuracy, pretrain.probe_accuracy):
        assert probe(*split) > 0.95
        assert probe(*noise) < 0.6
    # One neighbor, its own copy; and no more neighbors than there are images.
    assert pretrain.knn_accuracy(features, labels, features, labels, k=1) == 1.0
    assert pretrain.knn_accuracy(features[:5], labels[:5], features[:5], labels[:5], k=20) >= 0.4


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(monkeypatch):
    """Sixty images of two kinds instead of the data sets: horizontal or vertical stripes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    stripes = ((torch.arange(8) % 4 < 2) * 200).float()
    images = torch.where(labels[:, None, None] == 0, stripes[None, :, None], stripes[None, None, :]).expand(60, 8, 8)
    images = (images + 50 * torch.rand(60, 8, 8, generator=generator)).byte().numpy()
    data = ImageData("stripes", ["lying", "standing"], Split(images[:40], labels[:40].numpy()),
                     Split(images[40:], labels[40:].numpy()), (0.5,), (0.4,), (8, 8))  # fmt: skip
    monkeypatch.setattr(pretrain, "load", lambda config: data)


def command(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    common = dict(data="mnist5k", dim=16, depth=1, heads=2, patch_size=4, batch_size=8, device="cpu")
    given = [f"--{name.replace('_', '-')}={value}" for name, value in common.items()]
    return module.run(parser.parse_args([*given, *map(str, arguments)]))


@pytest.mark.parametrize("options", [[], ["--simdino"]])
def test_dino_command_resumes_to_the_same_weights(options, digits, tmp_path, monkeypatch):
    options = [*options, "--hidden", 16, "--bottleneck", 8, "--local-crops", 1, "--log-steps", 1]
    options += [] if "--simdino" in options else ["--prototypes", 16]
    command(dino, *options, "--epochs", 2, "--output", tmp_path / "whole")

    stopped = dino.DINOTrainer.after_step

    def stop(self):
        stopped(self)
        if self.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(dino.DINOTrainer, "after_step", stop)
    with pytest.raises(KeyboardInterrupt):
        command(dino, *options, "--epochs", 2, "--checkpoint-seconds", 0, "--output", tmp_path / "cut")
    monkeypatch.setattr(dino.DINOTrainer, "after_step", stopped)
    with pytest.raises(ValueError, match="unfinished run"):
        command(dino, *options, "--epochs", 2, "--output", tmp_path / "cut")
    command(dino, *options, "--epochs", 2, "--resume", tmp_path / "cut")
    whole, cut = (load_model(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    lines = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 11))
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert 0 <= summary["trained"]["knn_accuracy"] <= 1
    assert load_model(tmp_path / "whole" / "backbone.safetensors").num_classes == 0


def test_mae_command_learns_and_draws(digits, tmp_path):
    from PIL import Image

    options = ["--decoder-depth", 1, "--mask-ratio", 0.5, "--crop", 1, "--flip", 0, "--lambd", 0.1]
    command(mae, *options, "--epochs", 12, "--learning-rate", 5e-3, "--output", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trained"]["test_loss"] < 0.5 * summary["untrained"]["test_loss"]
    with Image.open(tmp_path / "reconstruction.png") as picture:
        zoom = 192 // 10  # images of 8 pixels and their frames, each about 192 wide
        assert picture.size == (8 * 10 * zoom, 3 * 10 * zoom)
    assert load_model(tmp_path / "model.safetensors").config["lambd"] == 0.1


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (dino, ["--patch-size", 3], "--patch-size 3 does not divide"),
        (dino, ["--local-size", 5], "--local-size"),
        (dino, ["--teacher-temperature", 0], "--teacher-temperature must be above 0"),
        (mae, ["--mask-ratio", 1], "--mask-ratio"),
        (mae, ["--heads", 3], "--heads 3 does not divide"),
        (mae, ["--epochs", 0], "--epochs"),
    ],
)
def test_wrong_options_are_named(module, options, message, digits, tmp_path):
    with pytest.raises(ValueError, match=message):
        command(module, *options, "--output", tmp_path)


def test_photos():
    pytest.importorskip("skimage")
    images = data.photos(16, seed=0, train=3, test=2)
    assert images.train.images.shape == (3 * len(images.classes), 16, 16, 3)
    assert len(images.test) == 2 * len(images.classes)
    assert {"chelsea", "coffee"} <= set(images.classes)
    assert images.train.images.std() > 20
    assert (data.photos(16, seed=0, train=3, test=2).train.images == images.train.images).all()


def test_missing_photos_say_what_to_install(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-image"):
        data.photos(16, seed=0)
