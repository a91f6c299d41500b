"""Every command that reads a run accepts the folder of every training command, finished or interrupted."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from crate_kernels.cli import main
from crate_kernels.models import load_model
from crate_kernels.runs import folder
from crate_kernels.training import classifier
from crate_kernels.training.engine import Engine

pytest.importorskip("timm")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

SMALL = ["--dim=16", "--depth=2", "--heads=2", "--layerwise-steps=0", "--precision=fp32"]
IMAGES = [*SMALL, "--image-size=16", "--patch-size=8", "--batch-size=8", "--epochs=2", "--workers=0"]
TEXT = [*SMALL, "--context=16", "--batch-size=4", "--steps=4"]

RUNS = {
    "crate": ["train", *IMAGES],
    "moving average": ["train", *IMAGES, "--ema=0.5"],
    "alpha": ["train", *IMAGES, "--architecture=alpha"],
    "mae": ["train-mae", *IMAGES, "--decoder-depth=1"],
    "dino": ["train-dino", *IMAGES, "--hidden=8", "--bottleneck=8", "--prototypes=8"],
    "simdino": ["train-dino", *IMAGES, "--hidden=8", "--bottleneck=8", "--simdino"],
    "gpt2": ["train-text", *TEXT, "--sample-tokens=2"],
    "bert": ["train-text", *TEXT, "--model=bert"],
}
VISION = [name for name in RUNS if name not in ("gpt2", "bert")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of images, a text file."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name in ("left", "right"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    (root / "rhyme.txt").write_text("The sparse and the dense went up the hill.\n" * 40)
    return root


@pytest.fixture(scope="module", params=["finished", "interrupted"])
def runs(request, data, tmp_path_factory):
    """Name -> the folder of its run."""
    root = tmp_path_factory.mktemp(request.param)
    step = Engine.train_step

    def interrupted(self, batches):
        step(self, batches)
        if request.param == "interrupted" and self.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", interrupted)
        patch.setattr(classifier, "against_reference", lambda *arguments: {})
        for name, command in RUNS.items():
            source = (
                ["--text", str(data / "rhyme.txt")] if command[0] == "train-text" else ["--data", str(data / "images")]
            )
            code = main([*command, *source, "--output", str(root / name)])
            assert code == (143 if request.param == "interrupted" else 0), name
            assert (root / name / "summary.json").exists() is (request.param == "finished")
    return root


@pytest.mark.parametrize("name", RUNS)
def test_analyze(runs, name, tmp_path):
    assert main(["analyze", str(runs / name), "--samples", "4", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "analysis.json").read_text())
    assert len(record["published"]["coding_rate_mean"]) == 2
    assert record["data"].startswith("4 ")


@pytest.mark.parametrize("name", RUNS)
def test_report(runs, name, tmp_path):
    page = tmp_path / "report.html"
    assert main(["report", str(runs / name), "--samples", "4", "--output", str(page)]) == 0
    text = page.read_text()
    assert "Not measured" not in text
    assert ("The run has not finished" in text) is (runs.name.startswith("interrupted"))
    assert "<h2>Configuration</h2>" in text


@pytest.mark.parametrize("name", RUNS)
def test_segment(runs, name, data, tmp_path, capsys):
    image = str(data / "images" / "left" / "0.png")
    code = main(["segment", image, "--checkpoint", str(runs / name), "--output", str(tmp_path)])
    if name in VISION:
        assert code == 0
        assert (tmp_path / "0_masks.png").is_file()
    else:
        assert code == 2
        assert "which takes no images" in capsys.readouterr().err


@pytest.mark.parametrize("name", RUNS)
def test_export(runs, name, tmp_path, capsys):
    path = tmp_path / "exported.safetensors"
    assert main(["export", str(runs / name), "--format", "safetensors", "--output", str(path)]) == 0
    assert "relative error 0.0e+00" in capsys.readouterr().out
    source, metadata = folder.open_model(runs / name)
    again, kept = folder.open_model(path)
    assert type(again) is type(source)
    assert {"mean", "std"} <= kept.keys() if name in VISION else kept["tokenizer"] == metadata["tokenizer"]


@pytest.mark.parametrize("name", VISION)
def test_weights_are_fine_tuned(runs, name, data, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "against_reference", lambda *arguments: {})
    command = [
        "train",
        "--init",
        str(runs / name),
        "--epochs=1",
        "--batch-size=8",
        "--workers=0",
        "--layerwise-steps=0",
    ]
    output = tmp_path / "run"
    assert (
        main([*command, "--learning-rate=1e-9", "--warmup-epochs=0", "--clip-grad=0.001", "--output", str(output)]) == 0
    )
    source, _ = folder.open_model(runs / name)
    tuned = load_model(output / "model.safetensors")
    assert tuned.num_classes == 2
    for ours, theirs in zip(tuned.blocks, source.blocks, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            tuned.run_blocks(tuned.embed(images)), source.run_blocks(source.embed(images)), rtol=1e-3, atol=1e-3
        )
    config = json.loads((output / "summary.json").read_text())["config"]
    assert (config["dim"], config["depth"], config["data"]) == (16, 2, str(data / "images"))
    # The run resumes without the weights that it started from.
    (output / "summary.json").unlink()
    assert main(["train", "--resume", str(output)]) == 0


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_language_model_starts_no_classifier(runs, name, tmp_path, capsys):
    assert main(["train", "--init", str(runs / name), "--output", str(tmp_path)]) == 2
    assert "which takes no images" in capsys.readouterr().err


def test_no_run_overwrites_another(runs, data, capsys):
    output = str(runs / "crate")
    for name, command in RUNS.items():
        source = ["--text", str(data / "rhyme.txt")] if command[0] == "train-text" else ["--data", str(data / "images")]
        before = {path: path.stat().st_mtime_ns for path in Path(output).iterdir()}
        assert main([*command, *source, "--output", output]) == 2, name
        kind = "a finished run" if runs.name.startswith("finished") else "an unfinished run"
        assert f"{output} holds {kind}: " in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in Path(output).iterdir()} == before


def test_default_folders_differ():
    folders = [kind.resolve(given).output for kind, given in cases()]
    assert len(set(folders)) == len(folders)
    assert folders[0] == "runs/mnist5k"


def cases():
    from crate_kernels.training.classifier import Trainer
    from crate_kernels.training.dino import DINOTrainer
    from crate_kernels.training.mae import MAETrainer
    from crate_kernels.training.text import TextTrainer

    for data in ("mnist5k", "fashion-mnist"):
        yield Trainer, {"data": data}
        yield Trainer, {"data": data, "architecture": "alpha"}
        yield Trainer, {"data": data, "model": "crate_tiny_patch16_224"}
        yield MAETrainer, {"data": data}
        yield DINOTrainer, {"data": data}
        yield DINOTrainer, {"data": data, "simdino": True}
    for model in ("gpt2", "lm", "bert"):
        yield TextTrainer, {"model": model}
