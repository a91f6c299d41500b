"""Every script under ``examples/`` runs, reaches its result, and stays short."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def one_thread():
    """Small models run fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name):
    (path,) = [path for path in EXAMPLES if path.stem == name]
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_shorter_than_sixty_lines_and_has_a_test(path):
    assert len(path.read_text().splitlines()) < 60
    assert f'load("{path.stem}")' in Path(__file__).read_text()


def test_train_your_own_images(tmp_path):
    pytest.importorskip("torchvision")
    generator = np.random.default_rng(0)
    for name, axis in (("rows", 0), ("columns", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(40):
            stripes = np.indices((24, 24))[axis] // generator.integers(3, 6) % 2 * 200
            pixels = (stripes[..., None] + generator.integers(0, 56, (24, 24, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    arguments = [str(tmp_path / "images"), "--size", "24", "--epochs", "6", "--output", str(tmp_path / "m.safetensors")]
    assert load("train_your_own_images").main(arguments) >= 0.9
    assert (tmp_path / "m.safetensors").is_file()


def test_fuse_your_own_model(capsys):
    assert load("fuse_your_own_model").main() < 1e-4
    assert "fused 12 modules" in capsys.readouterr().out


def test_generate_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("abc " * 200)
    arguments = [str(tmp_path / "text.txt"), "--steps", "80", "--tokens", "16", "--prompt", "abc "]
    text = load("generate_text").main(arguments)
    assert text.startswith("abc ")
    assert len(text) == 20
    assert set(text) == set("abc ")  # an untrained model would choose among 256 bytes
    assert text in capsys.readouterr().out


def test_write_a_variant(capsys):
    assert load("write_a_variant").main() < 1e-12
    assert "31,690 parameters" in capsys.readouterr().out


def test_operator_in_another_network():
    pytest.importorskip("sklearn")
    assert load("operator_in_another_network").main(epochs=5) > 0.9


def test_huggingface_trainer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    before, after = load("huggingface_trainer").main(["--bytes", "30000", "--output", str(tmp_path)])
    assert after < before - 1.5
    assert (tmp_path / "model.safetensors").is_file()


def test_lightning_trainer(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("mlxtend")
    assert load("lightning_trainer").main(["--epochs", "1", "--output", str(tmp_path)]) > 0.3
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"model"}
