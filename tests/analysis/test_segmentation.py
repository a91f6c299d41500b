"""Segmentation finds planted objects. Files that cannot be segmented are refused with one sentence."""

import numpy as np
import pytest
import torch

from crate_kernels.analysis.images import ImageError, model_input, read_image
from crate_kernels.analysis.segment import result_names, segment
from crate_kernels.analysis.segmentation import (
    attention_mask,
    class_attention,
    connected_part,
    enlarge,
    intersection_over_union,
    keys,
    normalized_cut,
    object_masks,
    principal_components,
)
from crate_kernels.models import CRATE

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CRATE(image_size=16, patch_size=4, num_classes=3, dim=16, depth=2, heads=2, dim_head=8).eval()


def planted(rows, columns, *boxes, width=8, noise=0.03):
    """Patch features: one direction for the background, one for each box (top, left, bottom, right), and noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(rows, columns, dtype=torch.long)
    for number, (top, left, bottom, right) in enumerate(boxes, 1):
        labels[top:bottom, left:right] = number
    features = torch.eye(width)[labels.flatten()] + noise * torch.randn(rows * columns, width, generator=generator)
    return features, labels


def test_attention_is_the_first_row_of_the_maps(model):
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        maps = model.get_attention(images, 0)
    attention = class_attention(model, images, 0)
    assert attention.shape == (2, 2, 4, 6)
    torch.testing.assert_close(attention[:, :, 1, 2], maps[:, :, 0, 1 + 6 + 2])


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_keys_are_the_projected_patches(model, layer):
    images = torch.randn(2, 3, 16, 16)
    found = keys(model, images, layer)
    with torch.no_grad():
        w = model.get_last_key(images) if layer in (1, -1) else None
        if w is None:
            block = model.blocks[0]
            w = block.mssa.project(block.mssa_norm(model.embed(images))).transpose(1, 2)
    torch.testing.assert_close(found, w.transpose(1, 2).flatten(2)[:, 1:])


def test_keys_know_their_layers(model):
    with pytest.raises(ValueError, match=r"layer: expected one of -2\.\.1, got 2"):
        keys(model, torch.randn(1, 3, 16, 16), 2)


def test_threshold_keeps_the_fewest_patches_that_hold_the_mass():
    attention = torch.tensor([[0.05, 0.4], [0.3, 0.05]])  # of 0.8 in all: 0.5, 0.375, and two times 0.0625
    assert attention_mask(attention, 0.45).tolist() == [[False, True], [False, False]]
    assert attention_mask(attention, 0.6).tolist() == [[False, True], [True, False]]
    assert attention_mask(attention, 0.99).all()
    blob = torch.full((2, 8, 8), 0.1)
    blob[1, 2:5, 3:6] = 10.0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 3:6] = True
    assert attention_mask(blob, 0.9)[1].equal(expected)


def test_normalized_cut_is_the_generalized_eigenvector():
    generator = torch.Generator().manual_seed(0)
    affinity = torch.rand(12, 12, generator=generator).double() + 0.01
    affinity = affinity + affinity.T
    x, degrees = normalized_cut(affinity), affinity.sum(1)
    laplacian = torch.diag(degrees) - affinity
    mu = (x @ laplacian @ x) / (x @ (degrees * x))
    torch.testing.assert_close(laplacian @ x, mu * degrees * x, atol=1e-9, rtol=0)
    assert (x @ degrees).abs() < 1e-9  # orthogonal to the constant, the first
    values = torch.linalg.eigvals(torch.diag(1 / degrees) @ laplacian).real.sort().values
    torch.testing.assert_close(mu, values[1])


def test_normalized_cut_separates_two_clusters():
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1])
    affinity = torch.where(labels[:, None] == labels, 1.0, 0.01)
    side = normalized_cut(affinity) > 0
    assert side.equal(labels == 1) or side.equal(labels == 0)


def test_finds_a_planted_object():
    features, labels = planted(8, 10, (2, 3, 6, 7))
    masks = object_masks(features, (8, 10), count=1)
    assert masks[0].equal(labels == 1)


def test_finds_planted_objects_one_after_the_other():
    features, labels = planted(9, 12, (1, 1, 6, 6), (2, 8, 5, 11))
    masks = object_masks(features, (9, 12), count=2)
    assert masks.shape == (2, 9, 12)
    assert not (masks[0] & masks[1]).any()
    assert {tuple(mask.flatten().tolist()) for mask in masks} == {
        tuple((labels == number).flatten().tolist()) for number in (1, 2)
    }


def test_centering_separates_features_with_a_common_part():
    features, labels = planted(8, 8, (2, 2, 5, 6))
    shifted = features + 10
    assert not any(mask.equal(labels == 1) for mask in object_masks(shifted, (8, 8), 1, 0.2))
    assert object_masks(shifted, (8, 8), 1, 0.2, center=True)[0].equal(labels == 1)


def test_equal_patches_have_no_object():
    assert object_masks(torch.ones(16, 4), (4, 4)).shape == (0, 4, 4)


def test_connected_part():
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.bool)
    assert connected_part(mask, 0).int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert connected_part(mask, 11).int().tolist() == [[0, 0, 0, 1]] * 3


def test_components_share_their_axes_between_images():
    features, labels = planted(8, 8, (2, 2, 6, 6), noise=0.01)
    other = features.flip(0)[:40]
    first, second = principal_components([features, other])
    assert first.shape == (64, 3)
    assert second.shape == (40, 3)
    torch.testing.assert_close(first.flip(0)[:40], second)
    inside = first[labels.flatten() == 1, 0]
    outside = first[labels.flatten() == 0, 0]
    assert abs(inside.mean() - outside.mean()) > 0.8


def test_intersection_over_union():
    a = torch.zeros(3, 4, 4, dtype=torch.bool)
    b = a.clone()
    a[0, :2], b[0, 1:3] = True, True
    a[1, 0], b[1, 3] = True, True
    assert intersection_over_union(a, b).tolist() == pytest.approx([1 / 3, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_mask(torch.ones(2, 2), 1.0), "mass: expected a share between 0 and 1, got 1.0"),
        (lambda: normalized_cut(torch.ones(2, 3)), r"affinity: expected shape \(N, N\)"),
        (lambda: object_masks(torch.ones(5, 2), (2, 3)), r"features: expected shape \(6, d\) for a grid of \(2, 3\)"),
        (lambda: principal_components([torch.ones(5, 2)]), "count: .* have no 3 components"),
        (lambda: intersection_over_union(torch.ones(2, 2), torch.ones(2, 2)), "expected bool, got torch.float32"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- files ---------------------------------------------------------------------------------------------------------


def test_any_kind_of_picture_becomes_rgb(tmp_path):
    color = np.full((6, 9, 3), (200, 100, 50), dtype=np.uint8)
    picture = Image.fromarray(color)
    for mode, expected in (("RGB", (200, 100, 50)), ("L", (124,) * 3), ("P", (200, 100, 50)), ("CMYK", (200, 100, 50))):
        path = tmp_path / (f"{mode}.tif" if mode == "CMYK" else f"{mode}.png")
        picture.convert(mode).save(path)
        read = np.asarray(read_image(path, 3))
        assert read.shape == (6, 9, 3)
        assert np.abs(read[0, 0].astype(int) - expected).max() <= 26  # a palette and CMYK are coarse
    alpha = np.dstack([color, np.zeros((6, 9), dtype=np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png", 3)).min() == 255
    assert read_image(tmp_path / "RGB.png", 1).mode == "L"


def test_pictures_that_cannot_be_read(tmp_path):
    with pytest.raises(ImageError, match=r"nothing\.png: no such image file"):
        read_image(tmp_path / "nothing.png", 3)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ImageError, match=r"text\.png is not a readable image"):
        read_image(tmp_path / "text.png", 3)
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"cut\.png is not a readable image"):
        read_image(tmp_path / "cut.png", 3)
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match="more than eight bits"):
        read_image(tmp_path / "deep.png", 3)
    with pytest.raises(ImageError, match="the model takes 4"):
        read_image(tmp_path / "deep.png", 4)


def test_input_keeps_the_shape_and_is_normalized(model):
    picture = Image.new("RGB", (301, 150), (255, 0, 51))
    image = model_input(picture, model, {"mean": [0.5, 0.5, 0.2], "std": [0.5, 0.5, 1.0]})
    assert image.shape == (1, 3, 16, 32)
    torch.testing.assert_close(image[0, :, 3, 5], torch.tensor([1.0, -1.0, 0.0]))
    assert model_input(picture, model, {}, size=61).shape == (1, 3, 60, 124)


def test_mixed_sizes_in_one_call(model):
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((40, 20), (16, 16), (3, 50))]
    results = segment(model, {}, pictures, size=16)
    assert [result.grid for result in results] == [(4, 8), (4, 4), (67, 4)]
    for result in results:
        assert result.components.shape == (*result.grid, 3)
        assert result.attention_masks.shape == result.attention.shape


def test_results_of_files_with_one_name_do_not_collide():
    assert result_names(["a/x.png", "b/x.jpg", "x_2.png"]) == ["x", "x_2", "x_2_2"]


def test_enlarge():
    assert enlarge(torch.ones(2, 3, 4, 5, dtype=torch.bool), (8, 9)).shape == (2, 3, 8, 9)
