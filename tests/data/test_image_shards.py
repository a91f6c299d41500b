import argparse
import dataclasses
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from crate_kernels.data import image_shards, images, prepare_images
from crate_kernels.data.batches import Batching, TrainingOrder, evaluation_batches, loader_speed, training_batches
from crate_kernels.data.errors import DataError
from crate_kernels.data.image_shards import ImageManifest, ShardSplit, lanes, shuffle, span
from crate_kernels.data.images import ImageSource
from crate_kernels.data.prepare_images import Settings, index, prepare
from crate_kernels.distributed import launch

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def folder(tmp_path):
    """100 training and 36 test images: the red value is the number of an image, and its class the rest by four."""
    for split, count in (("train", 100), ("val", 36)):
        for i in range(count):
            path = tmp_path / "photos" / split / CLASSES[i % 4] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + i % 3, 18), (i, 100, 7)).save(path)
    return tmp_path / "photos"


def shards_of(folder, images=11, form="tar", resize=None, **options):
    output = folder.parent / "shards"
    settings = Settings(form, images, resize, 0)
    prepare(ImageSource(str(folder)), output, settings, show=lambda line: None, **options)
    return output


def numbers(batches):
    """The numbers of the images in batches, whose labels must fit."""
    found = []
    for pictures, labels in batches:
        assert pictures.dtype == torch.uint8
        assert pictures.shape[1:] == (3, 16, 16)
        assert len(pictures) == len(labels)
        red = pictures[:, 0].float().mean(dim=(1, 2)).round().long()
        assert torch.equal(red % 4, labels)
        found.append(red.tolist())
    return found


def training(data, start=0, shared=False, **options):
    batching = Batching(**dict(batch_size=8, epochs=2, workers=0) | options)
    return numbers(training_batches(data, batching, (16, 16), start, CPU, shared=shared))


def as_rank(monkeypatch, rank, ranks):
    monkeypatch.setattr(launch, "rank", lambda: rank)
    monkeypatch.setattr(launch, "size", lambda: ranks)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_shards_hold_every_image_once_and_shuffled(folder, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    output = shards_of(folder, form=form)
    data = images.load(ImageSource(str(output)))
    assert data.classes == list(CLASSES)
    assert (len(data.train), len(data.test)) == (100, 36)
    stored = [sample for shard in data.train.shards for sample in data.train.read(shard)]
    assert all(sample.label == Image.open(io.BytesIO(sample.content)).getpixel((0, 0))[0] % 4 for sample in stored)
    originals = sorted(path.read_bytes() for path in (folder / "train").rglob("*.png"))
    assert sorted(sample.content for sample in stored) == originals
    first = [sample.label for sample in data.train.read(data.train.shards[0])]
    assert first != sorted(first)
    prepare_images.verify(str(output))
    assert sorted(sum(numbers(evaluation_batches(data, Batching(8, workers=0), (16, 16), CPU)), [])) == list(range(36))  # noqa: RUF017


def test_the_order_does_not_depend_on_loader_processes_and_resumes_anywhere(folder):
    data = images.load(ImageSource(str(shards_of(folder))))
    options = dict(flip=0.5, crop=0.5)
    batching = Batching(8, epochs=2, workers=0, **options)
    whole = list(training_batches(data, batching, (16, 16), 0, CPU))
    assert len(whole) == 2 * TrainingOrder(100, batching).per_epoch == 24
    for start, workers in ((7, 0), (0, 2), (13, 3)):
        again = dataclasses.replace(batching, workers=workers)
        rest = list(training_batches(data, again, (16, 16), start, CPU))
        assert len(rest) == 24 - start
        for (pictures, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(pictures, expected)
            assert torch.equal(labels, expected_labels)
    other = dataclasses.replace(batching, seed=1)
    assert not torch.equal(next(training_batches(data, other, (16, 16), 0, CPU))[1], whole[0][1])


@pytest.mark.parametrize(("ranks", "size"), [(1, 10), (2, 10), (3, 4), (4, 30)])
def test_ranks_read_different_images(folder, monkeypatch, ranks, size):
    data = images.load(ImageSource(str(shards_of(folder, images=size))))
    epochs = [[], []]
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        found = training(data, batch_size=12, shared=True)
        assert len(found) == 16
        assert all(len(batch) == 12 // ranks for batch in found)
        for epoch in range(2):
            epochs[epoch] += [number for batch in found[8 * epoch : 8 * epoch + 8] for number in batch]
    for epoch in epochs:
        assert len(epoch) == 96
        assert len(set(epoch)) == 96
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_an_evaluation_reads_every_image_once_in_equally_many_batches(folder, monkeypatch, ranks):
    data = images.load(ImageSource(str(shards_of(folder, images=10))))
    seen, counts = [], set()
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        for workers in (0, 2):
            found = numbers(evaluation_batches(data, Batching(8, workers=workers), (16, 16), CPU, shared=True))
            counts.add(len(found))
        seen += [number for batch in found for number in batch]
    assert sorted(seen) == list(range(36))
    assert len(counts) == 1


def test_lanes_and_their_pieces():
    assert [lanes(n, 1) for n in (1, 2, 3, 15, 16, 1000)] == [1, 2, 2, 8, 16, 16]
    assert [lanes(n, 8) for n in (3, 8, 100)] == [1, 1, 8]
    sizes, order = [3, 0, 5, 1], [2, 3, 1, 0]
    whole = [(shard, i) for shard in order for i in range(sizes[shard])]
    for first in range(10):
        for last in range(first, 10):
            pieces = span(order, sizes, first, last)
            assert [(shard, i) for shard, begin, end in pieces for i in range(begin, end)] == whole[first:last]


def test_the_buffer_is_bounded_in_images_and_in_bytes():
    taken = []

    def samples():
        for i in range(100):
            taken.append(i)
            yield image_shards.Sample(str(i), bytes(10), 0)

    for most, size, bound in ((7, 10**9, 7), (10**9, 50, 6)):
        taken.clear()
        ahead, order = 0, []
        for sample in shuffle(samples(), most, size, np.random.default_rng(0)):
            order.append(int(sample.name))
            ahead = max(ahead, len(taken) - len(order) + 1)
        assert sorted(order) == list(range(100)) != order
        assert ahead == bound


def broken_shards(folder):
    """Shards with an image that is cut off, one without a class, one of a class that is none, and a torn shard."""
    output = shards_of(folder, images=25)
    path = output / "train-00001.tar"
    with tarfile.open(path) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}
    names = [name for name in members if name.endswith(".png")]
    members[names[3]] = members[names[3]][:30]
    del members[names[5].replace(".png", ".cls")]
    members[names[8].replace(".png", ".cls")] = b"9"
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    torn = output / "train-00002.tar"
    torn.write_bytes(torn.read_bytes()[:5000])
    return output, [names[i].removesuffix(".png") for i in (3, 5, 8)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_samples_are_counted_and_named_and_others_take_their_places(folder, workers, capsys):
    output, names = broken_shards(folder)
    data = images.load(ImageSource(str(output)))
    found = training(data, epochs=3, workers=workers)
    assert all(len(batch) == 8 for batch in found)
    sentences = list(data.broken.found)
    assert len(sentences) == 4
    for name, reason in zip(names, ("its format is not known", "it has no class", "its label is 9"), strict=True):
        (sentence,) = (s for s in sentences if name in s)
        assert reason in sentence
    assert any("train-00002.tar is not a readable image: it ends after" in s for s in sentences)
    assert capsys.readouterr().err.count("broken: ") == 4


def test_a_limit_makes_broken_samples_fatal(folder):
    output, _ = broken_shards(folder)
    for most in (0, 2):
        data = images.load(ImageSource(str(output)))
        with pytest.raises(DataError, match="not a readable image" + (".*--max-broken is 2" if most else "")):
            training(data, epochs=3, max_broken=most)


def test_broken_samples_do_not_shift_a_resumed_run(folder):
    output, _ = broken_shards(folder)
    data = images.load(ImageSource(str(output)))
    whole = training(data, epochs=2)
    assert training(images.load(ImageSource(str(output))), start=9, epochs=2) == whole[9:]


def test_broken_test_images_are_left_out(folder):
    output = shards_of(folder, images=12)
    path = output / "test-00000.tar"
    content = bytearray(path.read_bytes())
    content[512:540] = bytes(28)  # of the first member
    path.write_bytes(content)
    data = images.load(ImageSource(str(output)))
    found = numbers(evaluation_batches(data, Batching(8, workers=0), (16, 16), CPU))
    assert sum(map(len, found)) == 35
    assert len(data.broken) == 1


def test_a_batch_of_nothing_but_broken_images_and_a_missing_shard_are_fatal(folder):
    output = shards_of(folder, images=50)
    data = images.load(ImageSource(str(output)))
    (output / "train-00001.tar").unlink()
    with pytest.raises(DataError, match=r"the shard \S*train-00001\.tar is missing"):
        training(data)
    empty = dataclasses.replace(data.train, classes=0)
    with pytest.raises(DataError, match=r"all images of a batch are broken; the first: .* but there are 0 classes"):
        training(dataclasses.replace(data, train=dataclasses.replace(empty, shards=empty.shards[:1])))


def test_the_images_of_webdataset(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    output = shards_of(folder)
    urls = [str(path) for path in sorted(output.glob("train-*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
    assert sorted(image.getpixel((0, 0))[0] for image, _ in read) == list(range(100))
    assert all(image.getpixel((0, 0))[0] % 4 == label for image, label in read)
    for split, count in (("train", 40), ("val", 12)):
        (tmp_path / "theirs" / split).mkdir(parents=True)
        pattern = str(tmp_path / "theirs" / split / "%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=10, verbose=0) as writer:
            for i in range(count):
                picture = Image.new("RGB", (20, 20), (i, 0, 0))
                label = {"json": {"label": i % 4}} if i % 2 else {"cls": i % 4}
                writer.write({"__key__": f"sample{i:03}", "png": picture} | label)
    manifest = index(str(tmp_path / "theirs"), tmp_path / "described", list(CLASSES), show=lambda line: None)
    assert [shard.images for shard in manifest.train] == [10] * 4
    data = images.load(ImageSource(str(tmp_path / "described")))
    assert sorted(set(sum(training(data, epochs=3), []))) == list(range(40))  # noqa: RUF017
    tested = numbers(evaluation_batches(data, Batching(8, workers=0), (16, 16), CPU))
    assert sorted(sum(tested, [])) == list(range(12))  # noqa: RUF017


def test_the_tables_of_datasets(folder):
    datasets = pytest.importorskip("datasets")
    output = shards_of(folder, form="parquet")
    files = [str(path) for path in sorted(output.glob("train-*.parquet"))]
    loaded = datasets.Dataset.from_parquet(files, cache_dir=str(folder.parent / "cache"))
    assert loaded.features["label"].names == list(CLASSES)
    assert sorted(row["image"].getpixel((0, 0))[0] for row in loaded) == list(range(100))


def test_shards_behind_a_url(folder):
    fsspec = pytest.importorskip("fsspec")
    output, system = shards_of(folder), fsspec.filesystem("memory")
    try:
        system.put(str(output), "/bucket/photos", recursive=True)
        data = images.load(ImageSource("memory://bucket/photos"))
        here = images.load(ImageSource(str(output)))
        assert training(data) == training(here)
        manifest = index("memory://bucket/photos", folder.parent / "described", None, show=lambda line: None)
        assert sum(shard.images for shard in manifest.train) == 100
        assert training(images.load(ImageSource(str(folder.parent / "described")))) == training(here)
        with pytest.raises(DataError, match="there is no memory://bucket/nothing/manifest"):
            images.load(ImageSource("memory://bucket/nothing"))
    finally:
        system.rm("/bucket", recursive=True)
    processes = images.load(ImageSource(f"file://{output}"))
    assert training(processes, workers=2) == training(here)


def test_a_killed_preparation_resumes_with_any_number_of_processes(folder, monkeypatch):
    whole = ImageManifest.read(str(shards_of(folder)))
    (folder.parent / "shards").rename(folder.parent / "whole")
    write, calls = prepare_images._write_tar, []

    def killed(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_images, "_write_tar", killed)
        with pytest.raises(KeyboardInterrupt):
            shards_of(folder)
    with pytest.raises(DataError, match=r"there is no .*manifest"):
        ImageManifest.read(str(folder.parent / "shards"))
    with pytest.raises(ValueError, match="unfinished shards of other files or settings"):
        shards_of(folder, images=12)
    assert ImageManifest.read(str(shards_of(folder, workers=2))) == whole
    assert sorted(os.listdir(folder.parent / "shards")) == sorted(os.listdir(folder.parent / "whole"))
    with pytest.raises(DataError, match="holds shards of other images or settings"):
        shards_of(folder, images=12)


def test_large_images_are_reduced_and_broken_ones_left_out(folder):
    Image.new("RGB", (300, 200), (8, 0, 0)).save(folder / "train" / "ant" / "large.png")
    (folder / "train" / "bee" / "001.png").write_bytes(b"no image")
    output = shards_of(folder, resize=50)
    manifest = ImageManifest.read(str(output))
    assert sum(shard.images for shard in manifest.train) == 100
    (sentence,) = manifest.broken
    assert "bee/001.png is not a readable image" in sentence
    split = ShardSplit(str(output), manifest.train, 4)
    sizes = [Image.open(io.BytesIO(s.content)).size for shard in split.shards for s in split.read(shard)]
    assert sorted(sizes)[-1] == (75, 50)


def test_digits_go_through_shards_unchanged(fashion_root, tmp_path):
    source = ImageSource("fashion-mnist", str(fashion_root))
    prepare(source, tmp_path / "shards", Settings("tar", 8, None, 0), show=lambda line: None)
    one, other = images.load(source), images.load(ImageSource(str(tmp_path / "shards")))
    assert (one.mean, one.std, one.image_size, one.classes) == (other.mean, other.std, other.image_size, other.classes)

    def content(data):
        pictures, labels = zip(*evaluation_batches(data, Batching(8, workers=0), (28, 28), CPU), strict=True)
        return sorted(
            (int(y), x.numpy().tobytes()) for x, y in zip(torch.cat(pictures), torch.cat(labels), strict=True)
        )

    assert content(one) == content(other)
    assert "streamed by 1 ranks" in other.fingerprint
    with pytest.raises(DataError, match="already consists of shards"):
        prepare(ImageSource(str(tmp_path / "shards")), tmp_path / "again", Settings("tar", 8, None, 0))


def test_the_speed_of_the_loader_counts_images(folder, monkeypatch):
    data = images.load(ImageSource(str(shards_of(folder))))
    clock = iter(range(1000))
    monkeypatch.setattr("crate_kernels.data.batches.time.perf_counter", lambda: next(clock))
    assert loader_speed(data, Batching(8, workers=0), (16, 16), seconds=1000) == 8
    assert loader_speed(data, Batching(50, workers=2), (16, 16), seconds=1000) == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged or not a manifest"),
        ('{"format": 1}', "damaged or not a manifest"),
        ('{"format": 7}', "reads format 1"),
    ],
)
def test_a_damaged_manifest_is_named(folder, content, message):
    output = shards_of(folder)
    (output / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        images.load(ImageSource(str(output)))


def test_the_command(folder, tmp_path, capsys):
    def command(*arguments):
        parser = argparse.ArgumentParser()
        prepare_images.add_arguments(parser)
        return prepare_images.run(parser.parse_args([str(a) for a in arguments]))

    (folder / "train" / "bee" / "001.png").write_bytes(b"no image")
    output = tmp_path / "out"
    assert command(folder, "--shard-images", 40, "--workers", 0, "--output", output) == 0
    shown = capsys.readouterr().out
    assert "train: 99 images in 3 shards" in shown
    assert "1 broken images were left out" in shown
    with pytest.raises(DataError, match="1 images are broken, and --max-broken is 0"):
        command(folder, "--shard-images", 40, "--workers", 0, "--output", output, "--max-broken", 0)
    assert command("--verify", "--output", output) == 0
    (tmp_path / "names").write_text("\n".join(CLASSES) + "\n")
    (output / "manifest.json").unlink()
    assert command("--index", output, "--classes", tmp_path / "names", "--output", output) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["classes"] == list(CLASSES)
    assert [shard["file"] for shard in manifest["train"]] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    (output / "test-00000.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"test-00000\.tar is damaged"):
        command("--verify", "--output", output)
