"""crate-kernels export, as the command line runs it."""

import importlib.util
import json

import pytest

from crate_kernels.cli import main
from crate_kernels.deployment import FORMATS, command
from crate_kernels.models import load_model

from .cases import build, needs


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(command, "ROUNDS", 2)


@pytest.mark.parametrize("kind", [pytest.param("onnx", marks=needs("onnx")), "safetensors"])
def test_a_file_is_written_checked_and_measured(kind, tmp_path, capsys):
    build("crate").save(tmp_path / "run" / "model.safetensors", mean=[0.1] * 3, std=[0.2] * 3)
    path = tmp_path / f"out{FORMATS[kind].suffix}"
    options = ["--format", kind, "--output", str(path), "--batch-size", "3", "--image-size", "24"]
    assert main(["export", str(tmp_path / "run"), *options]) == 0
    said = capsys.readouterr().out
    assert f"{path}: " in said
    assert "images (B, 3, 24, 24) float32, pixels of 0..1 less the mean [0.1, 0.1, 0.1]" in said
    for batch in (1, 3):
        line = next(line for line in said.splitlines() if line.startswith(f"batch {batch}: "))
        assert float(line.split("relative error ")[1].split(",")[0]) < 1e-4
        assert f"in {batch} of {batch}; " in line
    if kind == "safetensors":
        assert load_model(path).config["image_size"] == [24, 24]
    else:
        import onnx

        (entry,) = (entry for entry in onnx.load(path).metadata_props if entry.key == "crate_kernels")
        assert json.loads(entry.value) == {"mean": [0.1] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--output model.onnx", "--output must end in .safetensors with --format safetensors, got model.onnx"),
        ("--output model.safetensors --overwrite", "--output model.safetensors is the checkpoint itself"),
        ("--output old.safetensors", "old.safetensors already exists: give --overwrite, or another --output"),
        ("--output folder.safetensors --overwrite", "--output must be a file, and folder.safetensors is a folder"),
        ("--image-size 9", "--image-size must be a multiple of the patch size 8 x 8, got 9"),
    ],
)
def test_what_cannot_be_written_is_refused(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("crate").save("model.safetensors")
    build("crate").save("old.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "folder.safetensors").mkdir()
    assert main(["export", "model.safetensors", "--format", "safetensors", *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert main(["export", "model.safetensors", "--format=safetensors", "--output=old.safetensors", "--overwrite"]) == 0


@pytest.mark.parametrize("source", [".", "best.safetensors"])
def test_a_file_of_the_run_is_never_replaced(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "best"):
        build("crate").save(f"{name}.safetensors")
    (tmp_path / "options.json").write_text("{}")
    before = (tmp_path / "model.safetensors").read_bytes()
    options = ["--format=safetensors", "--output=model.safetensors", "--overwrite"]
    assert main(["export", source, *options]) == 2
    assert "--output model.safetensors is a file of the run: choose another" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_models_of_text_have_no_images(tmp_path, capsys):
    build("gpt").save(tmp_path / "model.safetensors")
    for option in ("--any-size", "--image-size=16"):
        assert main(["export", str(tmp_path), "--format", "openvino", option]) == 2
        assert f"{option.partition('=')[0]} applies only to models of images" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_reported(tmp_path, capsys, monkeypatch):
    build("crate").save(tmp_path / "model.safetensors")
    wrong = FORMATS["safetensors"].__class__(
        ".safetensors", (), FORMATS["safetensors"].write, lambda path: lambda images: images.new_ones(len(images), 5)
    )
    monkeypatch.setitem(FORMATS, "safetensors", wrong)
    assert main(["export", str(tmp_path), "--format", "safetensors"]) == 2
    assert "the file does not compute what the model computes" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    assert main(["export", str(tmp_path), "--format", "onnx"]) == 2
    assert "--format onnx needs onnx: pip install '.[onnx]' in the source folder" in capsys.readouterr().err
