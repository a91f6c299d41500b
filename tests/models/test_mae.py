"""CRATE-MAE: sizes, the equations, masking, loss, pictures and weights."""

import numpy as np
import pytest
import torch

from crate_kernels import models
from crate_kernels.models import CheckpointError, CrateMAE, load_model
from crate_kernels.models.mae import sincos_positions

from .parity import assert_backends_agree, assert_same, attention, outputs_and_gradients

UNUSED = ("unused_",)
IMAGES = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(3, 12, generator=torch.Generator().manual_seed(2))


def small(**options):
    torch.manual_seed(0)
    defaults = dict(img_size=(8, 12), patch_size=(4, 2), in_chans=2, embed_dim=16, depth=2, num_heads=2)
    return CrateMAE(**defaults | dict(decoder_depth=3, lambd=0.05) | options)


def reference(model, noise=NOISE, ratio=0.75):
    """Masked autoencoding written out in plain torch, patch by patch."""
    images = IMAGES.double()
    patches = torch.stack(
        [images[:, :, r : r + 4, c : c + 2].permute(0, 2, 3, 1).flatten(1) for r in (0, 4) for c in range(0, 12, 2)], 1
    )
    conv = model.patch_embedding.projection
    x = patches @ conv.weight.permute(2, 3, 1, 0).reshape(-1, 16) + conv.bias
    order = noise.argsort(dim=1)
    mask = torch.zeros(3, 12, dtype=images.dtype)
    for sample in range(3):
        mask[sample, order[sample, int(12 * (1 - ratio)) :]] = 1
    x = x * (1 - mask[..., None]) + model.mask_token * mask[..., None]
    x = torch.cat([model.cls_token.expand(3, 1, 16), x], dim=1) + model.position_table
    for block in model.blocks:
        x = x + attention(block.mssa_norm(x), block.mssa)
        y, weight = block.ista_norm(x), block.ista.weight
        x = torch.relu(y + 0.1 * (y @ weight - y @ weight.T @ weight) - 0.1 * block.ista.lambd)
    x = model.norm(x)
    for block in model.decoder_blocks:
        y = block.dictionary_norm(x) @ block.dictionary.weight.T
        x = y - attention(block.mssa_norm(y), block.mssa)
    prediction = model.prediction(model.decoder_norm(x))[:, 1:]
    target = patches
    if model.norm_pix_loss:
        target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    loss = ((prediction - target) ** 2).mean(-1)[mask.bool()].mean()
    return loss, prediction, mask


@pytest.mark.parametrize(
    ("size", "trainable", "total"),
    [
        ("tiny", 11_404_032, 11_555_328),
        ("small", 25_178_880, 25_405_824),
        ("base", 44_335_872, 44_638_464),
        ("large", 153_871_104, 154_274_560),
    ],
)
def test_parameter_counts(size, trainable, total):
    with torch.device("meta"):
        model = getattr(models, f"mae_crate_{size}")()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("options", [{}, dict(norm_pix_loss=True), dict(num_heads=1, decoder_num_heads=4)])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_model_equals_the_reference_equations(backend, options):
    model = small(**options).double()
    actual = outputs_and_gradients(model, lambda m: m(IMAGES.double(), noise=NOISE)[:2], backend)
    assert_same(actual, outputs_and_gradients(model, lambda m: reference(m)[:2]), UNUSED)
    torch.testing.assert_close(model(IMAGES.double(), noise=NOISE)[2], reference(model)[2])


def test_backends_agree():
    assert_backends_agree(small(), lambda m: m(IMAGES.double(), 0.5, NOISE)[:2], UNUSED)


def test_initialization():
    torch.manual_seed(0)
    model = CrateMAE(img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=4, decoder_depth=1)
    encoder, decoder = model.blocks[0], model.decoder_blocks[0]
    for weight, bound in (
        (encoder.mssa.projection.weight, (6 / 256) ** 0.5),  # xavier-uniform
        (decoder.mssa.output.weight, (6 / 256) ** 0.5),
        (model.prediction.weight, (6 / (128 + 192)) ** 0.5),
        (model.patch_embedding.projection.weight, (6 / (128 + 192)) ** 0.5),
        (encoder.ista.weight, (6 / 128) ** 0.5),  # kaiming-uniform
        (decoder.dictionary.weight, (6 / 128) ** 0.5),
    ):
        assert 0.98 * bound < weight.abs().max() <= bound
    assert not encoder.mssa.output.bias.any()
    assert not model.prediction.bias.any()
    assert 0.01 < model.mask_token.std() < 0.03
    assert encoder.ista.lambd == 0.5
    assert (encoder.ista_norm.eps, model.norm.eps, model.decoder_norm.eps) == (1e-5, 1e-6, 1e-6)


def test_position_table():
    table = sincos_positions((2, 3), 8)[0].double().numpy()
    assert not table[0].any()
    for row in range(2):
        for column in range(3):
            angles = [np.array([1.0, 0.01]) * coordinate for coordinate in (column, row)]
            expected = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)])
            np.testing.assert_allclose(table[1 + row * 3 + column], expected, atol=1e-7)


def test_masking_is_reproducible_and_of_the_right_size():
    model = small()
    for ratio, hidden in ((0.75, 9), (0.5, 6), (0.0, 0), (1.0, 12), (0.7, 9)):
        assert model.random_mask(IMAGES, ratio).sum(1).tolist() == [hidden] * 3
    torch.manual_seed(3)
    first = model(IMAGES)
    torch.manual_seed(3)
    torch.testing.assert_close(model(IMAGES), first, rtol=0, atol=0)
    torch.testing.assert_close(model(IMAGES, noise=NOISE), model(IMAGES, noise=NOISE), rtol=0, atol=0)
    assert (model.random_mask(IMAGES) != model.random_mask(IMAGES)).any()
    assert model(IMAGES, mask_ratio=0.0)[0] == 0


def test_hidden_pixels_do_not_reach_the_prediction():
    model = small()
    _, prediction, mask = model(IMAGES, noise=NOISE)
    hidden = model.patch_embedding.unflatten(mask[..., None].expand(-1, -1, 16), (2, 6))
    torch.testing.assert_close(model(IMAGES + 5 * hidden, noise=NOISE)[1], prediction, rtol=0, atol=0)
    assert (model(IMAGES + 5 * (1 - hidden), noise=NOISE)[1] != prediction).any()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_keeps_what_was_seen(norm_pix_loss):
    model = small(norm_pix_loss=norm_pix_loss)
    mask = model.random_mask(IMAGES, noise=NOISE)
    hidden = model.patch_embedding.unflatten(mask[..., None].expand(-1, -1, 16), (2, 6)).bool()
    seen, reconstruction = model.reconstruct(IMAGES, noise=NOISE)
    assert not seen[hidden].any()
    torch.testing.assert_close(seen[~hidden], IMAGES[~hidden])
    torch.testing.assert_close(reconstruction[~hidden], IMAGES[~hidden])
    # A model that predicted its target exactly would give the images back.
    model.forward = lambda *arguments: (None, model.target(IMAGES), mask)
    torch.testing.assert_close(model.reconstruct(IMAGES, noise=NOISE)[1], IMAGES)


def test_public_layout_round_trip(tmp_path):
    model = small()
    public = model.upstream_state_dict()
    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed", "patch_embed.proj.weight"}
    expected |= {"decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight", "decoder_pred.bias", "norm.bias"}
    for i in range(2):
        prefix = f"blocks.{i}.layers.0"
        expected |= {f"{prefix}.0.{k}" for k in ("norm.weight", "fn.qkv.weight", "fn.to_out.0.bias")}
        expected |= {f"{prefix}.1.{k}" for k in ("norm.bias", "fn.weight")}
        prefix = f"decoder_blocks.{i}.layers.0"
        expected |= {f"{prefix}.0.fn.weight", f"{prefix}.1.fn.qkv.weight", f"{prefix}.1.fn.to_out.0.weight"}
    assert expected <= public.keys()
    assert len(public) == len(model.state_dict())

    torch.save({"model": {f"module.{k}": v for k, v in public.items()}, "epoch": 3}, tmp_path / "public.pth")
    other = small().requires_grad_(False)
    for p in other.parameters():
        p.fill_(7)
    other.load_checkpoint(tmp_path / "public.pth")
    exported = other.upstream_state_dict()
    assert exported.keys() == public.keys()
    assert all(torch.equal(exported[k], public[k]) for k in public)
    del public["decoder_pos_embed"]
    with pytest.raises(CheckpointError, match="decoder_pos_embed"):
        other.load_state_dict(public)


def test_saved_file_rebuilds_the_model(tmp_path):
    model = small(norm_pix_loss=True)
    model.save(tmp_path / "mae.safetensors")
    again = load_model(tmp_path / "mae.safetensors")
    torch.testing.assert_close(again(IMAGES, noise=NOISE), model(IMAGES, noise=NOISE), rtol=0, atol=0)


def test_features_of_whole_images():
    model = small()
    tokens = model.forward_features(IMAGES)
    last, features = model.forward_intermediates(IMAGES, [-1], norm=True, output_fmt="NLC", return_prefix_tokens=True)
    torch.testing.assert_close(model.norm(last), tokens)
    torch.testing.assert_close(torch.cat([features[0][1], features[0][0]], 1), tokens)
    torch.testing.assert_close(model.forward_head(tokens), tokens[:, 0])
    maps = model.get_last_selfattention(IMAGES)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 13))
    larger = model.forward_features(torch.randn(1, 2, 16, 24))
    assert larger.shape == (1, 49, 16)
    assert larger.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(decoder_embed_dim=8), "decoder_embed_dim"),
        (dict(img_size=9), "img_size: 9 x 9 pixels are not a multiple of the patch size"),
        (dict(embed_dim=18), "multiple of 4"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_wrong_inputs_are_named():
    model = small()
    with pytest.raises(ValueError, match=r"noise: expected shape \(3, 12\)"):
        model(IMAGES, noise=NOISE[:, :5])
    with pytest.raises(ValueError, match="mask_ratio"):
        model(IMAGES, mask_ratio=75)
    with pytest.raises(ValueError, match="images"):
        model(IMAGES[:, :1])
