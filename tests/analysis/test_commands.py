"""The commands analyze, segment and report, on small models and real data."""

import argparse
import base64
import importlib
import json
import re

import numpy as np
import pytest
import torch

from crate_kernels.models import CRATE, CheckpointError, CrateGPT

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")
pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")


def run(module, *arguments):
    command = importlib.import_module(f"crate_kernels.analysis.{module}")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def save_vision(path, **options):
    torch.manual_seed(0)
    sizes = dict(image_size=28, patch_size=7, num_classes=10, dim=16, depth=2, heads=2, dim_head=8, channels=1)
    CRATE(**sizes | options).save(path, data="mnist5k", mean=[0.1307], std=[0.3081], test_accuracy=0.5)


def save_language(path):
    torch.manual_seed(0)
    model = CrateGPT(block_size=16, vocab_size=320, n_layer=2, n_head=2, n_embd=16)
    model.save(path, tokenizer="bytes")


def test_analyze_a_folder(tmp_path, capsys):
    save_vision(tmp_path / "model.safetensors")
    assert not run("command", tmp_path, "--samples", 8)
    record = json.loads((tmp_path / "analysis.json").read_text())
    assert record["data"] == "8 test images of mnist5k, 28 x 28"
    assert [layer["layer"] for layer in record["layers"]] == ["layer 1", "layer 2"]
    first = record["layers"][0]
    assert first["subspace_coding_rate"]["before the layer"]["mean"] == pytest.approx(
        record["published"]["coding_rate_mean"][0]
    )
    assert first["nonzero"]["after its second half"]["mean"] == pytest.approx(record["published"]["sparsity_mean"][0])
    assert first["coherence"]["random_subspaces"] == 0.5
    for name in ("layerwise.png", "half_steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "layer 2" in capsys.readouterr().out


def test_analyze_text(tmp_path):
    save_language(tmp_path / "gpt.safetensors")
    text = tmp_path / "text.txt"
    output = tmp_path / "out"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    assert not run("command", tmp_path / "gpt.safetensors", "--text", text, "--samples", 5, "--output", output)
    record = json.loads((output / "analysis.json").read_text())
    assert record["data"] == f"5 pieces of 16 tokens (bytes) of {text}"


def test_analyze_refuses(tmp_path):
    save_vision(tmp_path / "vision.safetensors")
    save_language(tmp_path / "language.safetensors")
    empty = tmp_path / "empty.txt"
    empty.touch()
    for arguments, error, message in (
        ((empty,), CheckpointError, r"not a readable checkpoint .* of another format\)$"),
        (
            (tmp_path / "language.safetensors", "--text", empty),
            ValueError,
            r"^\S*empty\.txt: 0 of 0 tokens .* must be more than the model's window of 16$",
        ),
        ((tmp_path / "none.safetensors",), FileNotFoundError, "no checkpoint at"),
        ((tmp_path,), CheckpointError, "is not the folder of a training run"),
        ((tmp_path / "vision.safetensors", "--text", "x"), ValueError, "reads images, not text"),
        ((tmp_path / "language.safetensors", "--data", "mnist5k"), ValueError, "reads text, not images"),
        ((tmp_path / "vision.safetensors", "--data", tmp_path / "nowhere"), ValueError, "no folder"),
        ((tmp_path / "vision.safetensors", "--samples", 0), ValueError, "--samples must lie in 1..1000000, got 0"),
        ((tmp_path / "vision.safetensors", "--eps", 0), ValueError, "--eps must"),
        ((tmp_path / "vision.safetensors", "--model", "crate_tiny_patch16_224"), CheckpointError, "leave --model out"),
    ):
        with pytest.raises(error, match=message):
            run("command", *arguments)
    save_vision(tmp_path / "color.safetensors", channels=3)
    with pytest.raises(CheckpointError, match=r"records mean \[0\.1307\] for a model of 3 channels"):
        run(
            "segment",
            tmp_path / "x.png",
            "--checkpoint",
            write_image(tmp_path / "x.png") and tmp_path / "color.safetensors",
        )


def write_image(path, size=(60, 40)):
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_segment(tmp_path, capsys):
    save_vision(tmp_path / "model.safetensors")
    pictures = [write_image(tmp_path / "a.png"), write_image(tmp_path / "b.jpg", (30, 70))]
    assert not run("segment", *pictures, "--checkpoint", tmp_path, "--output", tmp_path / "out")
    for name, size in (("a", (60, 40)), ("b", (30, 70))):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with Image.open(tmp_path / "out" / f"{name}_masks.png") as labels:
            assert labels.size == size
            assert labels.mode == "L"
            assert np.asarray(labels).max() <= 3
    assert "4 x 6 patches" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^--size must be at least 14 for this model, two patches, got 13$"):
        run("segment", *pictures, "--checkpoint", tmp_path, "--size", 13)


def test_segment_refuses_a_model_of_text(tmp_path):
    save_language(tmp_path / "language.safetensors")
    with pytest.raises(ValueError, match="holds a CrateGPT, which takes no images"):
        run("segment", write_image(tmp_path / "a.png"), "--checkpoint", tmp_path / "language.safetensors")


def test_report(tmp_path, capsys):
    save_vision(tmp_path / "model.safetensors")
    summary = {
        "test_accuracy": 0.9123, "best": {"accuracy": 0.92, "epoch": 3}, "training_seconds": 12.3, "device": "cpu",
        "config": {"dim": 16, "auto_augment": "<script>"}, "versions": {"torch": "9.9"},
        "speed": {"fp32": {"forward": {"images_per_second": 20, "reference_images_per_second": 10, "ratio": 2.0}}},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "loss": 1 / step, "test_loss": 2 / step, "accuracy": 0.5} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')
    with pytest.raises(ValueError, match=r"^--output must be a file, and \S* is a folder$"):
        run("report", tmp_path, "--output", tmp_path)
    with pytest.raises(ValueError, match=r"^--output \S* is in no folder: \S*summary\.json is a file$"):
        run("report", tmp_path, "--output", tmp_path / "summary.json" / "report.html")
    assert not run("report", tmp_path, "--samples", 6)
    page = (tmp_path / "report.html").read_text()
    for text in ("91.23 %", "92.00 %", "12 s", "9.9", "Layer by layer", "Attention of the class token", "2.00"):
        assert text in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # nothing outside the file
    images = re.findall(r"data:image/(\S+);base64,([^\"]+)", page)
    assert [kind for kind, _ in images] == ["svg+xml", "svg+xml", "png"]
    assert all(len(base64.b64decode(content)) > 1000 for _, content in images)


def test_report_without_data_or_summary(tmp_path):
    save_language(tmp_path / "best.safetensors")
    torch.manual_seed(0)
    CRATE(image_size=8, patch_size=4, num_classes=2, dim=8, depth=1, heads=1, dim_head=8).save(
        tmp_path / "best.safetensors", data="/nowhere/at/all"
    )
    assert not run("report", tmp_path, "--output", tmp_path / "deep" / "page.html")
    page = (tmp_path / "deep" / "page.html").read_text()
    assert "has not finished" in page
    assert "Not measured: no folder /nowhere/at/all" in page
    with pytest.raises(FileNotFoundError, match="give the folder of a training run"):
        run("report", tmp_path / "nothing")
