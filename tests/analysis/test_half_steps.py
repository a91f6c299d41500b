"""Half-steps of every family are measured at the right points, and with the right meaning."""

import json

import pytest
import torch

from crate_kernels.analysis import coding_rate, effective_rank, half_steps, layerwise, subspace_coding_rate
from crate_kernels.analysis.command import measure, table
from crate_kernels.analysis.layerwise import layerwise_compression
from crate_kernels.models import CRATE, CrateAlpha, CrateBert, CrateGPT, CrateMAE
from crate_kernels.nn import CrateBlock

VISION = dict(image_size=8, patch_size=2, dim=16, depth=2, heads=2, dim_head=8, channels=1, num_classes=3)


def build(family):
    torch.manual_seed(0)
    images, tokens = torch.randn(5, 1, 8, 8), torch.randint(0, 40, (5, 12))
    mae = dict(img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=2)
    gpt = dict(block_size=12, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
    return {
        "crate": lambda: (CRATE(**VISION), images),
        "alpha": lambda: (CrateAlpha(**VISION), images),
        "mae": lambda: (
            CrateMAE(**mae, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2), images,
        ),
        "gpt2": lambda: (CrateGPT(**gpt), tokens),
        "lm": lambda: (CrateGPT(**gpt, overcomplete=True), tokens),
        "bert": lambda: (CrateBert(vocab_size=64, max_length=12, dim=16, depth=2, heads=2), tokens),
    }[family]()  # fmt: skip


@pytest.mark.parametrize("family", ["crate", "alpha", "mae", "gpt2", "lm", "bert"])
def test_every_family(family):
    model, batch = build(family)
    model.train()
    measured = measure(model, batch, eps=0.1, lam=0.1)
    assert model.training
    names = ["encoder 1", "encoder 2", "decoder 1", "decoder 2"] if family == "mae" else ["layer 1", "layer 2"]
    assert measured.layers == names
    for values in measured.values.values():
        assert values.shape == (len(measured.layers), 3, 5)
        assert values.isfinite().all()
    # The tokens that leave a layer enter the next one.
    for name in ("nonzero", "coding_rate", "effective_rank"):
        torch.testing.assert_close(measured.values[name][0, 2], measured.values[name][1, 0])
    json.dumps(measured.summary())
    assert table(measured).count("\n") == len(measured.layers)


def test_values_at_each_point_are_those_of_the_layer():
    model, images = build("crate")
    measured = half_steps(model, images, eps=0.2, lam=0.3)
    z = model.eval().embed(images)
    for i, block in enumerate(model.blocks):
        points = [z, block.compress(z), block(z)]
        for j, tokens in enumerate(points):
            w = block.mssa.project(block.mssa_norm(tokens)).transpose(1, 2)
            compressed = subspace_coding_rate(w, 0.2)
            rate = coding_rate(torch.nn.functional.normalize(tokens, dim=-1), 0.2)
            count = (tokens != 0).flatten(1).sum(1)
            expected = {
                "subspace_coding_rate": compressed, "coding_rate": rate, "nonzero": count / tokens[0].numel(),
                "effective_rank": effective_rank(tokens), "objective": rate - compressed - 0.3 * count,
            }  # fmt: skip
            for name, value in expected.items():
                torch.testing.assert_close(measured.values[name][i, j], value.detach(), msg=name)
        z = points[-1]


def test_the_published_convention_is_the_quick_probe():
    model, images = build("crate")
    published = half_steps(model, images).published()
    quick, more = layerwise(model, images), layerwise_compression(model, images)
    for measured in (quick, more):
        torch.testing.assert_close(published.coding_rate, measured.coding_rate)
        torch.testing.assert_close(published.sparsity, measured.sparsity)
    torch.testing.assert_close(published.compressed_rate, more.compressed_rate)
    assert not quick.compressed_rate.numel()


def test_attention_with_its_own_subspaces_compresses():
    """With W_out = Uᵀ the attention half pulls the tokens of a cluster together: R^c must fall."""
    torch.manual_seed(0)
    block = CrateBlock(16, heads=2, dim_head=8)
    basis = torch.linalg.qr(torch.randn(16, 16)).Q
    with torch.no_grad():
        block.mssa.projection.weight.copy_(basis)
        block.mssa.output.weight.copy_(3 * basis.T)
        block.mssa.output.bias.zero_()
    clusters = 2 * torch.randn(4, 3, 16).repeat_interleave(10, dim=1)
    measured = half_steps(block, clusters + torch.randn(4, 30, 16))
    before, after, _ = measured.values["subspace_coding_rate"][0]
    assert (after < 0.9 * before).all()


def test_lengths_reach_the_layers():
    model, tokens = build("bert")
    lengths = torch.tensor([12, 3, 5, 7, 12])
    model.eval()
    measured = half_steps(model, tokens, lengths)
    layers = []
    model.blocks[0].register_forward_hook(lambda block, arguments, output: layers.append((arguments[0], output)))
    with torch.no_grad():
        model(tokens, lengths)
        (z, output) = layers[0]
        between = model.blocks[0].compress(z, lengths)
    torch.testing.assert_close(measured.values["effective_rank"][0, 1], effective_rank(between))
    torch.testing.assert_close(measured.values["effective_rank"][0, 2], effective_rank(output))


def test_no_layers():
    with pytest.raises(ValueError, match="Linear has no CrateBlock to measure"):
        half_steps(torch.nn.Linear(2, 2), torch.randn(1, 2))
