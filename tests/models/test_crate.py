"""Vision CRATE: sizes, parity between backends, features, and weights in and out of every layout."""

import json

import pytest
import safetensors.torch
import torch

from crate_kernels import models, ops
from crate_kernels.models import CRATE, CheckpointError, create_model, load_model


def small(**options):
    torch.manual_seed(0)
    defaults = dict(image_size=(8, 12), patch_size=(4, 2), num_classes=5, dim=24, depth=3, heads=3, dim_head=8)
    return CRATE(**defaults | options)


IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def reference(model, images):
    """The equations of the paper in plain torch, written apart from the package's operators."""
    p1, p2 = model.patch_embedding.patch_size
    batch, _, height, width = images.shape
    patches = torch.stack(
        [
            images[:, :, r : r + p1, c : c + p2].permute(0, 2, 3, 1).reshape(batch, -1)
            for r in range(0, height, p1)
            for c in range(0, width, p2)
        ],
        dim=1,
    )
    embedding = model.patch_embedding
    x = embedding.norm(embedding.projection(embedding.patch_norm(patches)))
    x = torch.cat([model.cls_token.repeat(batch, 1, 1), x], dim=1) + model.position_embedding
    for block in model.blocks:
        y = block.mssa_norm(x)
        w = y @ block.mssa.projection.weight.T
        heads = []
        for head in w.chunk(block.mssa.heads, dim=-1):
            heads.append((head @ head.transpose(1, 2) / head.shape[-1] ** 0.5).softmax(-1) @ head)
        x = x + block.mssa.output(torch.cat(heads, dim=-1))
        y, weight, step = block.ista_norm(x), block.ista.weight, block.ista.step_size
        x = torch.relu(y + step * (y @ weight - y @ weight.T @ weight) - step * 0.1)
    pooled = x.mean(1) if model.pool == "mean" else x[:, 0]
    return model.head(model.norm(pooled))


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        (models.CRATE_tiny, 6_090_856),
        (models.CRATE_small, 13_116_328),
        (models.CRATE_base, 22_796_008),
        (models.CRATE_large, 77_641_192),
    ],
)
def test_parameter_counts(factory, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in factory(1000).parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "millions"),
    [("crate_tiny_patch8_224", 5.74), ("crate_small_patch8_224", 14.12), ("crate_base_patch8_224", 38.83)],
)
def test_patch8_parameter_counts(name, millions):
    with torch.device("meta"):
        assert round(sum(p.numel() for p in create_model(name).parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("options", [{}, dict(pool="mean", ista=0.7), dict(heads=1, dim_head=24), dict(heads=2)])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_model_equals_the_reference_equations(backend, options):
    model, images = small(**options).double(), IMAGES.double()
    parameters = list(model.parameters())
    with ops.use_backend(backend):
        logits = model(images)
    expected = reference(model, images)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(logits.square().sum(), parameters)
    for got, want in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_training_curves_of_both_backends_agree():
    images = torch.randn(16, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(16) % 5
    curves = []
    for backend in ("reference", "eager"):
        model, losses = small(), []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        with ops.use_backend(backend):
            for _ in range(200):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < 0.2 * curves[0][0]
    torch.testing.assert_close(*curves, rtol=2e-2, atol=2e-3)  # 200 steps amplify float32 rounding


def test_head_and_features():
    model = small().eval()
    tokens = model.forward_features(IMAGES)
    assert tokens.shape == (2, 1 + 2 * 6, 24)
    torch.testing.assert_close(model.forward_head(tokens), model(IMAGES))
    torch.testing.assert_close(model.head(model.forward_head(tokens, pre_logits=True)), model(IMAGES))
    torch.testing.assert_close(small(num_classes=0)(IMAGES), model.forward_head(tokens, pre_logits=True))

    last, maps = model.forward_intermediates(IMAGES)
    assert [m.shape for m in maps] == [(2, 24, 2, 6)] * 3
    torch.testing.assert_close(last, tokens)
    torch.testing.assert_close(maps[-1], tokens[:, 1:].transpose(1, 2).reshape(2, 24, 2, 6))
    ((patches, cls),) = model.forward_intermediates(
        IMAGES, [-2], output_fmt="NLC", return_prefix_tokens=True, norm=True, intermediates_only=True, stop_early=True
    )
    expected = model.norm(model.blocks[1](model.blocks[0](model.embed(IMAGES))))
    torch.testing.assert_close(torch.cat([cls, patches], dim=1), expected)
    assert len(model.forward_intermediates(IMAGES, 2, intermediates_only=True)) == 2
    with pytest.raises(ValueError, match=r"layers: \[3\] do not all lie in -3\.\.2"):
        model.get_attention(IMAGES, 3)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")


def test_attention_maps_explain_the_layer():
    model = small().double().eval()
    images = IMAGES.double()
    for layer in range(3):
        maps = model.get_attention(images, layer)
        assert maps.shape == (2, 3, 13, 13)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 13, dtype=torch.float64))
    torch.testing.assert_close(model.get_last_selfattention(images), model.get_attention(images, -1))
    # The maps and the keys together give back the attention's output.
    mixed = (model.get_last_selfattention(images) @ model.get_last_key(images)).transpose(1, 2).flatten(2)
    block, before = model.blocks[2], model.blocks[1](model.blocks[0](model.embed(images)))
    torch.testing.assert_close(before + block.mssa.output(mixed), block.compress(before))


def test_other_image_sizes_interpolate_positions():
    model = small().eval()
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    positions = models.vision.interpolate_positions(model.position_embedding, (2, 6), (4, 8))
    assert positions.shape == (1, 33, 24)
    torch.testing.assert_close(positions[:, 0], model.position_embedding[:, 0])
    constant = torch.ones_like(model.position_embedding)
    torch.testing.assert_close(
        models.vision.interpolate_positions(constant, (2, 6), (5, 3)), torch.ones(1, 16, 24), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.randn(3, 8, 12), r"expected shape \(B, 3, H, W\), got \(3, 8, 12\)"),
        (torch.randn(1, 1, 8, 12), r"expected shape \(B, 3, H, W\), got \(1, 1, 8, 12\)"),
        (torch.zeros(1, 3, 8, 12, dtype=torch.long), r"images: expected a floating dtype, got torch\.int64"),
        (torch.randn(1, 3, 9, 12), r"9 x 12 pixels are not a multiple of the patch size 4 x 2"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small()(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(image_size=9), "image_size: 9 x 9 pixels are not a multiple of the patch size 4 x 2"),
        (dict(pool="max"), "pool: expected 'cls', 'mean' or '', got 'max'"),
        (dict(patch_size=(4, 2, 2)), "patch_size: expected a positive integer or a pair"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


# -- weights in files ------------------------------------------------------------------------------------------------


def test_the_public_layout_loads_strictly_and_round_trips_bit_for_bit():
    public = small().upstream_state_dict()
    assert list(public)[:3] == ["pos_embedding", "cls_token", "to_patch_embedding.1.weight"]
    for key in (
        "transformer.layers.2.0.norm.weight",
        "transformer.layers.2.0.fn.qkv.weight",
        "transformer.layers.2.0.fn.to_out.0.bias",
        "transformer.layers.2.1.norm.bias",
        "transformer.layers.2.1.fn.weight",
        "mlp_head.0.weight",
        "mlp_head.1.bias",
    ):
        assert key in public
    weights = {key: torch.randn_like(value) for key, value in public.items()}
    model = small()
    model.load_state_dict(weights, strict=True)
    back = model.upstream_state_dict()
    assert list(back) == list(public)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_public_checkpoint_files(tmp_path, prefix):
    torch.manual_seed(5)
    weights = {prefix + k: torch.randn_like(v) for k, v in small().upstream_state_dict().items()}
    optimizer = torch.optim.AdamW(small().parameters()).state_dict()
    path = tmp_path / "checkpoint.pth"
    torch.save(
        {"epoch": 3, "arch": "CRATE", "state_dict": weights, "best_acc1": torch.tensor(1.0), "optimizer": optimizer},
        path,
    )
    back = small().load_checkpoint(path).upstream_state_dict()
    assert all(torch.equal(back[key.removeprefix(prefix)], value) for key, value in weights.items())
    torch.save({"model": weights}, path)
    small().load_checkpoint(path)


def test_native_files(tmp_path):
    model = small(ista=0.4)
    model.save(tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors")
    assert json.dumps(again.config) == json.dumps(model.config)  # pairs come back as lists
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=0, atol=0)
    small(ista=0.4).load_checkpoint(tmp_path / "model.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_checkpoints_that_do_not_fit(tmp_path):
    public = small().upstream_state_dict()
    with pytest.raises(CheckpointError, match=r"missing keys \(1\): mlp_head\.1\.bias"):
        small().load_state_dict({k: v for k, v in public.items() if k != "mlp_head.1.bias"})
    with pytest.raises(CheckpointError, match=r"unexpected keys \(2\): head\.bias, head\.weight"):
        small().load_state_dict(public | {"head.bias": torch.zeros(3), "head.weight": torch.zeros(3, 24)})
    with pytest.raises(
        CheckpointError, match=r"shapes that differ \(2\): mlp_head\.1\.weight: file \(5, 24\), model \(7, 24\)"
    ):
        small(num_classes=7).load_state_dict(public)
    with pytest.raises(CheckpointError, match="belongs to another architecture"):
        small().load_state_dict({"conv1.weight": torch.zeros(3)})
    small().load_state_dict({k: v for k, v in public.items() if "head" not in k}, strict=False)

    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match=r"does not say which model it holds"):
        load_model(foreign)


class Payload:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return print, ("executed",)


def test_unreadable_files(tmp_path, capsys):
    good = tmp_path / "good.safetensors"
    small().save(good)
    for suffix in (".safetensors", ".pth"):
        torch.save(small().state_dict(), tmp_path / "whole.pth")
        source = good if suffix == ".safetensors" else tmp_path / "whole.pth"
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(source.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=r"cut.* is not a readable .* \(1000 bytes; truncated"):
            small().load_checkpoint(cut)
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        small().load_checkpoint(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        small().load_checkpoint(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        small().load_checkpoint(tmp_path / "absent.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    small().save(path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        small(ista=0.9).save(path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_registry():
    with pytest.raises(ValueError, match="unknown model 'vit'; known are crate_tiny_patch16_224"):
        create_model("vit")
    with torch.device("meta"):
        assert create_model("crate_tiny_patch16_224", num_classes=3, depth=1).head.out_features == 3
