"""The layer-wise probe measures what the layers computed, and does not change the model."""

import re

import pytest
import torch

from crate_kernels.analysis import Layerwise, layerwise, plot_layerwise, sparsity, subspace_coding_rate
from crate_kernels.models import CRATE


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CRATE(image_size=8, patch_size=2, num_classes=3, dim=16, depth=3, heads=2, dim_head=8, channels=1)


def test_measures_every_layer_in_one_pass(model):
    images = torch.randn(5, 1, 8, 8)
    measured = layerwise(model, images)
    tokens = model.eval().embed(images)
    for layer, block in enumerate(model.blocks):
        w = block.mssa.project(block.mssa_norm(tokens)).transpose(1, 2)
        tokens = block(tokens)
        torch.testing.assert_close(measured.coding_rate[layer], subspace_coding_rate(w).detach())
        torch.testing.assert_close(measured.sparsity[layer], sparsity(tokens))
    assert measured.coding_rate.shape == measured.sparsity.shape == (3, 5)


def test_restores_the_model(model):
    model.train()
    model.norm.eval()
    layerwise(model, torch.randn(2, 1, 8, 8))
    assert model.training
    assert model.blocks[0].training
    assert not model.norm.training
    assert not any(block._forward_hooks for block in model.blocks)


def test_batches_add_up(model):
    images = torch.randn(6, 1, 8, 8)
    whole, parts = layerwise(model, images), layerwise(model, images[:2]) + layerwise(model, images[2:])
    torch.testing.assert_close(whole.coding_rate, parts.coding_rate)
    assert whole.summary()["sparsity_mean"] == pytest.approx(parts.summary()["sparsity_mean"])
    assert len(whole.summary()["coding_rate_std"]) == 3


def test_needs_crate_layers():
    with pytest.raises(ValueError, match="Linear has no CrateBlock to measure"):
        layerwise(torch.nn.Linear(2, 2), torch.randn(1, 2))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ([9.0, 7.0], [8.0, 5.0], "in every layer, by 1.0 to 2.0 nats: .* falls from 9 nats in the first layer to 7 "),
        ([7.0, 9.0], [6.0, 9.5], "in 1 of 2 layers. .* does not fall .7 to 9 nats."),
        ([7.0], [6.0], "in every layer, by 1.0 nats: it compresses the tokens.$"),
        (
            [67.2, 66.8],
            [67.3, 66.79],
            r"in no layer of 2: this model does not compress its tokens\. R\^c stays at 67 nats from the first",
        ),
    ],
)
def test_the_sentence_below_the_picture_says_what_the_curves_show(before, after, sentence, tmp_path):
    before, after = torch.tensor(before)[:, None], torch.tensor(after)[:, None]
    measured = Layerwise(before, torch.ones_like(before), after)
    assert re.search(sentence, measured.compression())
    assert Layerwise(before, torch.ones_like(before)).compression() == ""
    assert plot_layerwise(measured, tmp_path / "layers.png").is_file()


def test_draws_a_picture(model, tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_layerwise(layerwise(model, torch.randn(2, 1, 8, 8)), tmp_path / "deep" / "layers.png", title="a model")
    assert path.read_bytes().startswith(b"\x89PNG")
