"""CRATE-alpha: sizes, the equations, and weights in its own layout and in CLIPA's."""

import pytest
import torch

from crate_kernels import models
from crate_kernels.models import CheckpointError, CrateAlpha, create_model, load_model

from .parity import assert_backends_agree, assert_same, attention, outputs_and_gradients

IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def small(**options):
    torch.manual_seed(0)
    defaults = dict(image_size=(8, 12), patch_size=(4, 2), num_classes=5, dim=16, depth=2, heads=2, dim_head=8)
    return CrateAlpha(**defaults | options)


def reference(model, images):
    """CRATE-alpha written out in plain torch."""
    x = model.patch_embedding.projection(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.position_embedding
    for block in model.blocks:
        x = x + attention(block.mssa_norm(x), block.mssa)
        y, D, D1, eta, lam = block.ista_norm(x), block.ista.D, block.ista.D1, 0.1, 0.1
        z1 = torch.relu(eta * y @ D - eta * lam)
        z2 = torch.relu(z1 - eta * (z1 @ D.T - y) @ D - eta * lam)
        x = x + z2 @ D1.T
    return model.head(model.norm(x[:, 0]))


@pytest.mark.parametrize(("size", "parameters"), [("base", 72_328_936), ("large", 253_650_920)])
def test_parameter_counts(size, parameters):
    with torch.device("meta"):
        model = getattr(models, f"CRATE_alpha_{size}")(1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_huge_has_heads_of_width_80():
    with torch.device("meta"):
        model = models.CRATE_alpha_huge()
    assert model.blocks[0].mssa.projection.weight.shape == (1280, 1280)
    assert model.blocks[0].mssa.heads == 16
    assert (len(model.blocks), model.patch_embedding.patch_size) == (32, (14, 14))


@pytest.mark.parametrize("options", [{}, dict(heads=4, dim_head=5), dict(clipa=True)])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_model_equals_the_reference_equations(backend, options):
    model = small(**options).double()
    actual = outputs_and_gradients(model, lambda m: m(IMAGES.double()), backend)
    assert_same(actual, outputs_and_gradients(model, lambda m: reference(m, IMAGES.double())))


def test_backends_agree():
    assert_backends_agree(small(pool="mean"), lambda m: m(IMAGES.double()))


def test_norms():
    model = small()
    assert {block.mssa_norm.eps for block in model.blocks} | {block.ista_norm.eps for block in model.blocks} == {1e-6}
    assert model.norm.eps == 1e-5
    assert small(clipa=True).norm.eps == 1e-6


def test_public_layout_round_trip():
    model = small()
    public = model.upstream_state_dict()
    expected = {"pos_embedding", "cls_token", "conv1.weight", "conv1.bias"}
    expected |= {f"mlp_head.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    for i in range(2):
        layer = f"transformer.layers.{i}"
        expected |= {f"{layer}.{half}.norm.{name}" for half in (0, 1) for name in ("weight", "bias")}
        expected |= {f"{layer}.0.fn.qkv.weight", f"{layer}.0.fn.to_out.0.weight", f"{layer}.1.fn.D", f"{layer}.1.fn.D1"}
    assert public.keys() == expected
    other = small(depth=2)
    torch.nn.init.zeros_(other.cls_token)
    other.load_state_dict(public)
    exported = other.upstream_state_dict()
    assert all(torch.equal(exported[k], public[k]) for k in public)
    del public["transformer.layers.1.1.fn.D1"]
    with pytest.raises(CheckpointError, match=r"missing keys \(1\): transformer.layers.1.1.fn.D1"):
        other.load_state_dict(public)


def clipa_checkpoint(dim=16, out=5, depth=2, patches=12):
    """A checkpoint as CLIPA's code writes it: attention as three stacked copies, and a text tower beside it."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    state = {
        "visual.class_embedding": random(dim),
        "visual.positional_embedding": random(patches + 1, dim),
        "visual.proj": random(dim, out),
        "visual.conv1.weight": random(dim, 3, 4, 2),
        "visual.ln_post.weight": 1 + random(dim),
        "visual.ln_post.bias": random(dim),
        "logit_scale": random(1)[0],
        "transformer.resblocks.0.attn.in_proj_weight": random(24, 8),
        "token_embedding.weight": random(9, 8),
    }
    for i in range(depth):
        block = f"visual.transformer.resblocks.{i}"
        for norm in ("ln_1", "ln_2"):
            state[f"{block}.{norm}.weight"], state[f"{block}.{norm}.bias"] = 1 + random(dim), random(dim)
        state[f"{block}.attn.in_proj_weight"] = random(dim, dim).repeat(3, 1)
        state[f"{block}.attn.out_proj.weight"] = random(dim, dim)
        state[f"{block}.mlp.c_fc"], state[f"{block}.mlp.c_proj"] = random(dim, 4 * dim), random(dim, 4 * dim)
    return state


def test_clipa_vision_tower_round_trip(tmp_path):
    state = clipa_checkpoint()
    model = small(clipa=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "clipa.pth")
    model.load_checkpoint(tmp_path / "clipa.pth")
    exported = model.upstream_state_dict()
    assert exported.keys() == {key for key in state if key.startswith("visual.")}
    assert all(torch.equal(exported[key], state[key]) for key in exported)

    # The image embedding by torch's own attention layer, which the checkpoint's code uses.
    x = torch.nn.functional.conv2d(IMAGES, state["visual.conv1.weight"], stride=(4, 2)).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(2, 1, 16), x], 1) + state["visual.positional_embedding"]
    for i in range(2):
        block = {
            k.split(f"resblocks.{i}.")[1]: v for k, v in state.items() if f"visual.transformer.resblocks.{i}." in k
        }
        layer = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
        layer.load_state_dict({k.removeprefix("attn."): v for k, v in block.items() if k.startswith("attn.")})
        y = torch.nn.functional.layer_norm(x, (16,), block["ln_1.weight"], block["ln_1.bias"], 1e-6)
        x = x + layer(y, y, y, need_weights=False)[0]
        y = torch.nn.functional.layer_norm(x, (16,), block["ln_2.weight"], block["ln_2.bias"], 1e-6)
        D = block["mlp.c_fc"]
        z1 = torch.relu(0.1 * y @ D - 0.01)
        x = x + torch.relu(z1 - 0.1 * (z1 @ D.T - y) @ D - 0.01) @ block["mlp.c_proj"].T
    y = torch.nn.functional.layer_norm(
        x[:, 0], (16,), state["visual.ln_post.weight"], state["visual.ln_post.bias"], 1e-6
    )
    torch.testing.assert_close(model(IMAGES), y @ state["visual.proj"], rtol=1e-4, atol=1e-5)


def test_clipa_attention_must_be_one_projection():
    state = clipa_checkpoint()
    state["visual.transformer.resblocks.1.attn.in_proj_weight"][20, 3] += 1
    with pytest.raises(CheckpointError, match=r"resblocks.1.attn.in_proj_weight: its three parts differ"):
        small(clipa=True).load_state_dict(state)


def test_clipa_missing_and_unexpected_keys_are_named():
    state = clipa_checkpoint()
    del state["visual.proj"]
    state["visual.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"visual\.proj.*visual\.extra"):
        small(clipa=True).load_state_dict(state)


def test_saved_file_rebuilds_the_model(tmp_path):
    for model in (small(), small(clipa=True)):
        model.save(tmp_path / "alpha.safetensors")
        again = load_model(tmp_path / "alpha.safetensors")
        torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=0, atol=0)


def test_registered_names_take_constructor_arguments():
    model = create_model("crate_alpha_base_patch16_224", depth=1, num_classes=3)
    assert model.head.weight.shape == (3, 768)
