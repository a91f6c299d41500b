"""The segmentation score uses exact masks, the models' own attention, and settings chosen on validation images."""

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("PIL")

from crate_kernels.analysis import segmentation_score as scoring

SIZES = (24, 4, 5, 16, 2, 2)


def composites(size=24):
    disc = np.hypot(*np.mgrid[-20:20, -20:20]) < 18
    red = np.zeros((40, 40, 4), dtype=np.uint8)
    red[disc] = (255, 0, 0, 255)
    red[~disc] = (0, 255, 0, 0)  # the color of transparent pixels must not be seen
    return scoring.Composites([red, red[:, :20]], [np.full((60, 80, 3), (0, 0, 255), dtype=np.uint8)], size)


def test_masks_are_exact_and_images_repeat_with_the_seed():
    images, labels, masks = composites().batch(30, np.random.default_rng(0))
    pixels = (images + 1) * 127.5
    assert (pixels[:, 1] < 1).all()
    assert ((pixels[:, 0] > 127.5) == masks).float().mean() > 0.995  # half-covered pixels may round either way
    assert set(labels.tolist()) == {0, 1}
    assert 0.05 < masks.float().mean() < 0.5
    again = composites().batch(30, np.random.default_rng(0))
    assert torch.equal(images, again[0])
    assert torch.equal(masks, again[2])


def test_equal_sizes():
    parameters = [
        sum(p.numel() for p in build(48, 6, 100, 128, 4, 4).parameters())
        for build in (scoring.build_crate, scoring.build_vit)
    ]
    assert parameters[0] == pytest.approx(parameters[1], rel=0.1)


def test_attention_of_timms_vit_is_its_own():
    torch.manual_seed(0)
    model = scoring.build_vit(*SIZES).eval()
    seen = []
    model.blocks[1].attn.fused_attn = False
    model.blocks[1].attn.attn_drop.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    images = torch.randn(3, 3, 24, 24)
    attention, keys = scoring.attention_and_keys(model, images, 1)
    torch.testing.assert_close(attention.flatten(2), seen[0][:, :, 0, 1:])
    assert keys.shape == (3, 36, 8)


def test_score_chooses_on_validation_and_reports_on_test():
    torch.manual_seed(0)
    model = scoring.build_crate(*SIZES).eval()
    validation = composites().batch(6, np.random.default_rng(1))
    test = composites().batch(5, np.random.default_rng(2))
    scores = scoring.score(model, validation, test)
    assert list(scores) == list(scoring.METHODS)
    for method, entry in scores.items():
        masks = scoring.masks_for(model, test[0], method, entry["setting"])
        iou = scoring.intersection_over_union(masks, test[2])
        assert entry["miou"] == pytest.approx(iou.mean().item())
        on_validation = [
            scoring.intersection_over_union(make(), validation[2]).mean().item()
            for _, make in scoring.candidates(model, validation[0], method)
        ]
        assert entry["validation_miou"] == pytest.approx(max(on_validation))


def test_a_model_that_knows_the_masks_gets_the_bound(monkeypatch):
    test = composites().batch(8, np.random.default_rng(2))
    patches = torch.nn.functional.avg_pool2d(test[2].float()[:, None], 4)

    def perfect(model, images, layer):
        heat = (patches > 0.5).float()[: len(images)] + 1e-6
        return heat, heat.flatten(2).mT

    monkeypatch.setattr(scoring, "attention_and_keys", perfect)
    model = scoring.build_crate(*SIZES).eval()
    scores = scoring.score(model, test, test)
    bound = scoring.bounds(test, 4)
    assert scores["attention, best head"]["miou"] >= bound["truth in patches"] - 0.1
    assert scores["attention, best head"]["miou"] > 2 * bound["whole image"]


def test_training_learns_and_repeats():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = scoring.build_crate(24, 4, 2, 16, 2, 2)
        scoring.train(model, composites(), 3, 4, 1e-3, 0)
        runs.append(model.head.weight.detach().clone())
    assert not model.training
    assert torch.equal(*runs)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match="0 usable cut-outs; install the Debian package tuxpaint-stamps-default"):
        scoring.read_stamps(tmp_path)
