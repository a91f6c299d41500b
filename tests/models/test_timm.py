"""The vision models under timm's registry, features, checkpoints and training functions."""

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
    with pytest.raises(ValueError, match="pool"):
        create(name, global_pool="map")


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

    model = create(num_classes=2)
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
