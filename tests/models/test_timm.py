"""The vision models under timm's registry, features, checkpoints and training functions."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from crate_kernels import models

timm = pytest.importorskip("timm")
timm_registry = pytest.importorskip("crate_kernels.models.timm_registry")

TINY = dict(img_size=16, patch_size=4, dim=32, depth=3, heads=2, dim_head=16)
NAMES = ["crate_tiny_patch16_224", "crate_alpha_base_patch16_224"]


def create(name="crate_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **TINY | options)


def test_every_vision_model_is_registered():
    names = {name for name in models.registry.FACTORIES if "_patch" in name}
    assert names == set(timm.list_models("crate_*"))
    assert {"crate_small_patch16_224", "crate_alpha_large_patch14_224", "crate_mae_base_patch16_224"} <= names
    with torch.device("meta"):
        for name in names:
            model, ours = timm.create_model(name), models.create_model(name)
            assert {k: v.shape for k, v in model.state_dict().items()} == {
                k: v.shape for k, v in ours.state_dict().items()
            }
            assert model.num_classes == model.pretrained_cfg["num_classes"]


@pytest.mark.parametrize("name", NAMES)
def test_timm_arguments_mean_what_timm_means(name):
    model = create(name, num_classes=7, in_chans=1, global_pool="avg", drop_rate=0.0, drop_path_rate=None)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    assert (model.pool, model.num_classes, model.num_features, model.in_chans) == ("mean", 7, 32, 1)
    assert model.default_cfg["classifier"] == "head"
    assert timm.data.resolve_data_config({}, model=model)["mean"] == (0.485, 0.456, 0.406)
    for option in ("drop_rate", "drop_path_rate"):
        with pytest.raises(ValueError, match=option):
            create(name, **{option: 0.1})
    with pytest.raises(ValueError, match="scriptable"):
        create(name, scriptable=True)
    with pytest.raises(ValueError, match=r"^global_pool: expected 'token', 'avg' or '', got 'max'"):
        create(name, global_pool="max")
    with pytest.raises(TypeError, match="not_an_argument"):
        create(name, not_an_argument=1)


@pytest.mark.parametrize("name", NAMES)
def test_classifier_can_be_read_and_replaced(name, tmp_path):
    model, images = create(name, num_classes=7), torch.randn(2, 3, 16, 16)
    assert model.get_classifier() is model.head
    features = model.forward_features(images)
    assert features.shape == (2, 17, 32)
    torch.testing.assert_close(model.head(model.forward_head(features, pre_logits=True)), model(images))
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), model.forward_head(features, pre_logits=True))
    model.reset_classifier(4, "avg")
    model.save(tmp_path / "model.safetensors")
    torch.testing.assert_close(models.load_model(tmp_path / "model.safetensors")(images), model(images))


@pytest.mark.parametrize("name", [*NAMES, "crate_mae_tiny_patch16_224"])
def test_features_only(name):
    autoencoder = "_mae_" in name
    options = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2, decoder_depth=1)
    options = options if autoencoder else TINY
    torch.manual_seed(0)
    whole = timm.create_model(name, **options).eval()
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, out_indices=(0, -2), **options).eval()
    images = torch.randn(2, 3, 16, 16)
    features = model(images)
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [4, 4]
    assert len(model.model.blocks) == 2  # the last layer is not needed
    expected = whole.forward_intermediates(images, [0, 1], intermediates_only=True)
    for feature, wanted in zip(features, expected, strict=True):
        assert feature.shape == (2, 32, 4, 4)
        torch.testing.assert_close(feature, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_load_in_either_layout_and_with_other_classes(name, tmp_path):
    model, images = create(name, num_classes=7).eval(), torch.randn(2, 3, 16, 16)
    for kind, state in (("public", model.upstream_state_dict()), ("native", model.state_dict())):
        path = tmp_path / f"{kind}.pth"
        torch.save(state, path)
        loaded = create(name, num_classes=7, checkpoint_path=str(path)).eval()
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
        overlay = dict(file=str(path), num_classes=7)
        loaded = create(name, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert loaded(images).shape == (2, 3)
        torch.testing.assert_close(loaded.forward_features(images), model.forward_features(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_pooling_in_timms_words(name):
    images = torch.randn(2, 3, 16, 16)
    model = create(name, num_classes=7).eval()
    tokens = model.forward_features(images)
    for word, pooled in (("token", tokens[:, 0]), ("avg", tokens.mean(1)), ("", tokens)):
        model.reset_classifier(7, word)
        assert (model.global_pool, model.num_classes) == (word, 7)
        torch.testing.assert_close(model(images), model.head(model.norm(pooled)))
        model.reset_classifier(0)  # keeps the pooling
        torch.testing.assert_close(model(images), model.norm(pooled))
        assert create(name, num_classes=0, global_pool=word)(images).shape == pooled.shape
    with pytest.raises(ValueError, match=r"^global_pool: expected 'token'"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize("name", NAMES)
def test_a_new_classifier_is_like_its_model(name):
    model = create(name).double().eval()
    model.reset_classifier(0)
    model.reset_classifier(4)
    assert model.head.weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    model = create(name, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    model = create(name, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    torch.manual_seed(0)
    fresh = create(name)
    for (key, filled), built in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.isfinite(filled).all(), key
        if built.numel() > 200:
            assert filled.std().item() == pytest.approx(built.std().item(), rel=0.2), key


@pytest.mark.parametrize("name", [*NAMES, "crate_mae_tiny_patch16_224"])
def test_other_image_sizes(name):
    autoencoder = "_mae_" in name
    options = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, decoder_depth=1)
    options = options if autoencoder else dict(TINY, depth=2)
    model = timm.create_model(name, dynamic_img_size=True, **options).eval()
    images = torch.randn(2, 3, 24, 8)
    before = model.forward_features(images)
    strict = timm.create_model(name, dynamic_img_size=False, **options)
    strict.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="images: 6 x 2 patches, but the model has 4 x 4"):
        strict.forward_features(images)
    strict.requires_grad_(False)
    strict.set_input_size(img_size=(24, 8))
    torch.testing.assert_close(strict.eval().forward_features(images), before)
    assert strict.image_size == (24, 8)
    assert not any(p.requires_grad for p in strict.parameters())
    with pytest.raises(ValueError, match="img_size: 25 x 8 pixels are not a multiple of the patch size 4 x 4"):
        strict.set_input_size(img_size=(25, 8))
    with pytest.raises(ValueError, match="patch_size: is 4 x 4 and cannot change"):
        strict.set_input_size(patch_size=8)
    assert getattr(strict, "_traits", {"img_size": (24, 8)})["img_size"] == (24, 8)  # timm's note, in newer versions


@pytest.mark.parametrize("name", NAMES)
def test_validate_reads_what_train_wrote_for_another_size(name, tmp_path):
    """timm's train.py builds the model without its --img-size; validate.py passes it to a model of fixed size."""
    if not hasattr(timm.models, "resolve_model_input_args"):
        pytest.skip("the validate.py of this version of timm passes no size")
    options = dict(num_classes=2, dim=32, depth=1, heads=2, dim_head=16)
    trained, images = timm.create_model(name, **options).eval(), torch.randn(2, 3, 32, 32)
    torch.save(dict(state_dict=trained.state_dict()), tmp_path / "last.pth.tar")
    again = timm.create_model(**timm.models.resolve_model_input_args(name, dict(img_size=32), **options)).eval()
    timm.models.load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=False)
    assert timm.data.resolve_input_data_config(again, dict(img_size=32))["input_size"] == (3, 32, 32)
    torch.testing.assert_close(again(images), trained(images), rtol=0, atol=0)
    fixed = timm.create_model(name, dynamic_img_size=False, **options)
    with pytest.raises(ValueError, match="requires"):
        timm.data.resolve_input_data_config(fixed, dict(img_size=32))


def test_a_resized_model_is_saved_and_rebuilt(tmp_path):
    model, images = create(num_classes=3).eval(), torch.randn(1, 3, 24, 8)
    model.set_input_size((24, 8))
    model.save(tmp_path / "model.safetensors")
    again = models.load_model(tmp_path / "model.safetensors").eval()
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*NAMES, "crate_mae_tiny_patch16_224"])
def test_weight_decay_leaves_out_tokens_and_positions(name):
    from timm.optim import create_optimizer_v2

    options = dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, decoder_depth=1)
    model = timm.create_model(name, **options if "_mae_" in name else dict(TINY, depth=1))
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= names.keys()
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    without = {key for key, p in names.items() if p.requires_grad and id(p) not in decayed}
    ndim_1 = {key for key, p in names.items() if p.ndim <= 1}
    assert without == ndim_1 | {key for key in ("cls_token", "mask_token", "position_embedding") if key in names}


@pytest.mark.parametrize("name", NAMES)
def test_intermediate_features_by_name(name):
    model, images = create(name).eval(), torch.randn(2, 3, 16, 16)
    last, features = model.forward_intermediates(images, [0, 2], return_prefix_tokens=True)
    named = model.forward_intermediates(images, [0, 2], return_prefix_tokens=True, output_dict=True)
    assert list(named) == ["image_intermediates", "image_intermediates_prefix", "image_features"]
    torch.testing.assert_close(named["image_features"], last, rtol=0, atol=0)
    for (maps, prefix), i in zip(features, (0, 1), strict=True):
        assert torch.equal(maps, named["image_intermediates"][i])
        assert torch.equal(prefix, named["image_intermediates_prefix"][i])
    alone = model.forward_intermediates(images, [0, 2], intermediates_only=True, output_dict=True)
    assert list(alone) == ["image_intermediates"]
    (tokens,) = model.get_intermediate_layers(images, 1)
    torch.testing.assert_close(tokens, last[:, 1:], rtol=0, atol=0)
    ((maps, prefix),) = model.get_intermediate_layers(images, [2], reshape=True, return_prefix_tokens=True, norm=True)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), model.norm(last[:, 1:]))
    torch.testing.assert_close(prefix, model.norm(last[:, :1]))


@pytest.mark.parametrize("name", NAMES)
def test_pruned_models_keep_their_features_and_train(name):
    model, images = create(name).eval(), torch.randn(2, 3, 16, 16)
    wanted = model.forward_intermediates(images, intermediates_only=True)
    for layer in range(3):
        pruned = copy.deepcopy(model)
        kept = pruned.prune_intermediate_layers([layer], prune_norm=True)
        (feature,) = pruned.forward_intermediates(images, kept, intermediates_only=True)
        torch.testing.assert_close(feature, wanted[layer], rtol=0, atol=0)
        pruned.train().forward_features(images).sum().backward()
        assert all(p.grad is not None for p in pruned.parameters())
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers([2], prune_head=False)
    torch.testing.assert_close(whole(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_layers_give_the_same(name):
    model, images = create(name).eval(), torch.randn(2, 3, 16, 16)
    plain = model.forward_intermediates(images)
    model.set_grad_checkpointing(True)
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    again = model.forward_intermediates(images)
    for a, b in zip([plain[0], *plain[1]], [again[0], *again[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    again[0].sum().backward()
    assert len(calls) == 6


@pytest.mark.parametrize("name", NAMES)
def test_features_by_torch_fx(name):
    from timm.models import get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor

    model, images = create(name, num_classes=7).eval(), torch.randn(2, 3, 16, 16)
    extractor = create_feature_extractor(
        model, return_nodes=["blocks.0", "blocks.2", "head"], tracer_kwargs=dict(leaf_modules=get_notrace_modules())
    )
    for size in ((2, 3, 16, 16), (1, 3, 8, 24)):  # traced once, for any size
        images = torch.randn(*size)
        got = extractor(images)
        last, features = model.forward_intermediates(images, output_fmt="NLC")
        torch.testing.assert_close(got["head"], model(images), rtol=0, atol=0)
        torch.testing.assert_close(got["blocks.2"], last, rtol=0, atol=0)
        torch.testing.assert_close(got["blocks.0"][:, 1:], features[0], rtol=0, atol=0)


def test_an_autoencoder_has_no_classes():
    with pytest.raises(ValueError, match="no classifier"):
        timm.create_model("crate_mae_tiny_patch16_224", num_classes=10)


@pytest.fixture
def folder(tmp_path):
    """Two classes of noisy images, red or blue."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            (tmp_path / split / f"class{label}").mkdir(parents=True)
            for i in range(16):
                image = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                image[:, :, 2 * label] += 120
                Image.fromarray(image).save(tmp_path / split / f"class{label}" / f"{i}.png")
    return tmp_path


def test_timm_training_loop(folder, tmp_path):
    """What timm's train.py does with a model, through the same functions."""
    from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad

    model = create(
        pretrained=False, in_chans=3, num_classes=2, drop_rate=0.0, drop_path_rate=None, drop_block_rate=None,
        global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
    )  # fmt: skip
    model.set_grad_checkpointing(True)
    config = resolve_data_config(dict(img_size=16), model=model)
    loaders = {
        split: create_loader(
            create_dataset("", root=str(folder), split=split),
            input_size=(3, 16, 16), batch_size=8, is_training=split == "train", no_aug=True, use_prefetcher=False,
            num_workers=0, mean=config["mean"], std=config["std"], crop_pct=1.0, persistent_workers=False,
        )
        for split in ("train", "val")
    }  # fmt: skip
    optimizer = create_optimizer_v2(model, opt="adamw", lr=4e-3, weight_decay=0.05, layer_decay=0.9)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) == 5  # embedding, three layers, norm and head
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=6, warmup_epochs=0)
    ema, mixup, criterion = ModelEmaV3(model, decay=0.5), Mixup(0.1, num_classes=2), SoftTargetCrossEntropy()
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    for epoch in range(6):
        model.train()
        for images, labels in loaders["train"]:
            images, target = mixup(images, labels)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(images)
            loss = criterion(output.float(), target)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(timm.models.model_parameters(model), value=1.0)
            optimizer.step()
            ema.update(model)
        scheduler.step(epoch + 1)
    saver.save_checkpoint(epoch, metric=1.0)
    again = create(num_classes=2)
    timm.models.load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=False)
    for candidate in (model, again):
        candidate.eval()
        with torch.no_grad():
            correct = [accuracy(candidate(images), labels)[0].item() for images, labels in loaders["val"]]
        assert np.mean(correct) > 90


def test_scripts_run_with_the_models_registered(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm\nassert __name__ == '__main__'\nprint(sys.argv[1:], len(timm.list_models(sys.argv[1])))"
    )
    command = [sys.executable, "-m", "crate_kernels.models.timm_registry", str(script), "crate_alpha_*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "['crate_alpha_*'] 5"
