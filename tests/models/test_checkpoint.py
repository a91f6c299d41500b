"""Files of other trainers: the objects that they save beside the weights, and the files that are refused."""

import argparse
import collections
import os
import pathlib

import numpy as np
import pytest
import torch

from crate_kernels.models import CRATE, CheckpointError, checkpoint


def small(**options):
    torch.manual_seed(0)
    return CRATE(**dict(image_size=8, patch_size=4, num_classes=3, dim=8, depth=1, heads=1, dim_head=8) | options)


WEIGHTS = {key: torch.randn_like(value) for key, value in small().upstream_state_dict().items()}

ZIP = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


class Settings(dict):
    """A configuration like those of yacs and easydict: a dictionary with attributes."""


class Hyperparameters:
    def __init__(self):
        self.rate = 1e-3


@ZIP
@pytest.mark.parametrize(
    "extras",
    [
        {"args": argparse.Namespace(lr=1e-3, output=pathlib.Path("out"))},
        {"best_acc1": np.float64(0.7), "epoch": np.int64(3), "history": np.arange(3.0)},
        {"numpy_random_state": np.random.RandomState(0).get_state()},
        {"metrics": collections.defaultdict(list, loss=[1.0])},
        {"config": Settings(rate=1e-3), "hparams": Hyperparameters()},
        {"optimizer_class": torch.optim.AdamW, "activation": torch.nn.functional.gelu},
    ],
    ids=["namespace", "numpy", "random-state", "defaultdict", "own-classes", "functions"],
)
def test_what_trainers_save_beside_the_weights_is_skipped(tmp_path, extras, zipped):
    path = save({"model": WEIGHTS, **extras}, tmp_path / "extras.pth", zipped)
    back = small().load_checkpoint(path).upstream_state_dict()
    assert all(torch.equal(back[key], value) for key, value in WEIGHTS.items())
    assert not any(isinstance(item, tuple) for item in torch.serialization.get_safe_globals())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"checkpoint": w},
        lambda w: {"checkpoint": {"state_dict": w}, "epoch": 3},
        lambda w: {"model_state_dict": w},
        lambda w: {"student": {key: 0 * value for key, value in w.items()}, "teacher": w},
        lambda w: {"teacher": {f"module.backbone.{key}": v for key, v in w.items()} | {"module.head.a": torch.ones(2)}},
        lambda w: Settings(state_dict=collections.OrderedDict(w)),
    ],
    ids=["checkpoint", "nested", "model_state_dict", "teacher", "backbone-and-head", "own-mapping"],
)
def test_wrappers(tmp_path, wrap):
    back = small().load_checkpoint(save(wrap(WEIGHTS), tmp_path / "wrapped.pth")).upstream_state_dict()
    assert all(torch.equal(back[key], value) for key, value in WEIGHTS.items())


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@ZIP
def test_code_in_a_file_does_not_run(tmp_path, capfd, zipped):
    for content in ({"model": WEIGHTS, "x": Harmful(print, "executed")}, {"model": Harmful(print, "executed")}):
        path = save(content, tmp_path / "code.pth", zipped)
        if "x" in content:
            small().load_checkpoint(path)
        else:
            with pytest.raises(CheckpointError, match=r"found model \(an object of builtins\.print, which is not read"):
                small().load_checkpoint(path)
    path = save({"model": WEIGHTS, "x": Harmful(os.system, "echo executed")}, tmp_path / "code.pth", zipped)
    with pytest.raises(CheckpointError, match=r"asks for posix\.system, which no checkpoint needs"):
        small().load_checkpoint(path)
    assert "executed" not in capfd.readouterr().out


def test_what_the_user_has_allowed_is_built(tmp_path):
    path = save({"model": WEIGHTS, "hparams": Hyperparameters()}, tmp_path / "allowed.pth")
    with torch.serialization.safe_globals([Hyperparameters]):
        assert checkpoint._unpickle(path)["hparams"].rate == 1e-3
    assert isinstance(checkpoint._unpickle(path)["hparams"], checkpoint.Skipped)


class Rows(list):
    """torch fills only its own list types."""


@ZIP
def test_refusals_name_the_class_and_say_what_to_do(tmp_path, zipped):
    cases = [
        (Rows([1, 2]), r"asks for \S*test_checkpoint\.Rows\. Save the weights alone.*add_safe_globals\(\["),
        (torch.nn.Linear(2, 2), r"an object of torch\.nn\.modules\.linear\.Linear" if zipped else "a pickled module"),
    ]
    for extra, message in cases:
        with pytest.raises(CheckpointError, match=message) as refused:
            small().load_checkpoint(save({"model": extra}, tmp_path / "refused.pth", zipped))
        assert "weights_only" not in str(refused.value)
        assert "\x1b" not in str(refused.value)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*torch\.jit\.load"):
        small().load_checkpoint(tmp_path / "script.pt")
