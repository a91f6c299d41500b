"""The probe measures only on its steps, keeps its file complete, and does not change the run."""

import pytest
import torch

from crate_kernels.analysis import LayerwiseProbe, layerwise
from crate_kernels.analysis.probe import read_records
from crate_kernels.models import CRATE


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CRATE(
        image_size=8, patch_size=2, num_classes=3, dim=16, depth=2, heads=2, dim_head=8, channels=1, dropout=0.5
    )


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value


def test_measures_the_first_samples_on_its_steps(model, tmp_path):
    writer, images = Writer(), torch.randn(8, 1, 8, 8)
    probe = LayerwiseProbe(tmp_path / "run" / "probe.jsonl", every=5, samples=3, writer=writer)
    model.train()
    state = torch.get_rng_state()
    measured = [probe.step(step, model, images) is not None for step in range(11)]
    assert measured == [step % 5 == 0 for step in range(11)]
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = layerwise(model, images[:3]).summary()
    assert [record["step"] for record in read_records(probe.path)] == [0, 5, 10]
    assert read_records(probe.path)[-1]["coding_rate_mean"] == pytest.approx(expected["coding_rate_mean"])
    assert writer.scalars["sparsity/layer_02", 10] == pytest.approx(expected["sparsity_mean"][1])
    assert probe.values("sparsity_std").shape == (3, 2)


def test_a_resumed_run_measures_the_steps_after_its_checkpoint_again(model, tmp_path):
    path, images = tmp_path / "probe.jsonl", torch.randn(4, 1, 8, 8)
    first = LayerwiseProbe(path, every=1)
    for step in (1, 2, 3, 4):
        first.step(step, model, images)
    path.write_text(path.read_text() + '{"step": 5, "cod')  # killed while writing
    resumed = LayerwiseProbe(path, every=1)
    for step in (3, 4, 5):
        resumed.step(step, model, images)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]


def test_picture(model, tmp_path):
    pytest.importorskip("matplotlib")
    probe = LayerwiseProbe(every=1)
    with pytest.raises(ValueError, match="not measured anything"):
        probe.plot(tmp_path / "probe.png")
    for step in (0, 1):
        probe.step(step, model, torch.randn(2, 1, 8, 8))
    assert probe.plot(tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments():
    with pytest.raises(ValueError, match="every and samples: expected at least 1, got 0 and 16"):
        LayerwiseProbe(every=0)
