"""Training on several ranks equals training on one rank, for every command. A checkpoint resumes on any number of
ranks."""

import itertools
import os
import resource

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("timm")
pytest.importorskip("rich")

from crate_kernels.data import batches as data
from crate_kernels.data.images import ImageData, Split
from crate_kernels.distributed import launch, sharded_files, sharding
from crate_kernels.models import CheckpointError
from crate_kernels.runs import checkpoints

from .ranks import run_on_ranks
from .trainers import RUNS, follow

# Rounding errors in float64, increased by an optimizer that divides by the size of the gradient.
CLOSE = dict(rtol=1e-11, atol=1e-12)
BF16 = dict(precision="bf16", double=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of 60 images in two classes, and a text."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name in ("dark", "light"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(30):
            pixels = generator.integers(0, 200, (16, 16, 3)) + (55 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name / f"{i:02}.png")
    (root / "text").write_text("The sparse and the dense went up the hill; it's said that the naïve one fell.\n" * 60)
    return str(root / "images"), str(root / "text")


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """Every run on one rank: complete, and with a checkpoint after half of it in ``folder / name``."""
    folder = tmp_path_factory.mktemp("alone")
    results = {name: follow(name, source, folder / "whole" / name) for name in RUNS}
    for name in ("classifier", "dino"):
        follow(name, source, folder / name, stop=3)
    results["bf16"] = follow("classifier", source, folder / "bf16", **BF16)["losses"]
    full = follow("classifier", source, folder / "fp32", **BF16 | dict(precision="fp32"))["losses"]
    assert results["bf16"] != pytest.approx(full, rel=1e-6)
    return folder, results


def assert_same(got, expected):
    """Compare losses, metrics, layer-wise measurements and weights."""
    count = len(got["losses"])
    torch.testing.assert_close(got["losses"], expected["losses"][-count:], **CLOSE)
    for metrics in ("before", "after"):
        assert got[metrics] == pytest.approx(expected[metrics], rel=1e-11)
    layers = got["layers"] or []
    for ours, theirs in zip(layers, expected["layers"][len(expected["layers"]) - len(layers) :], strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("coding_rate_mean", "sparsity_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6)
    # Only rank 0 has all of them.
    assert got["weights"].keys() == (expected["weights"].keys() if launch.is_main() else set())
    for name, value in got["weights"].items():
        torch.testing.assert_close(value, expected["weights"][name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


def on_two_ranks(source, folder, expected, output):
    for parallel, name in itertools.product(("ddp", "fsdp"), RUNS):
        got = follow(name, source, output / parallel / name, parallel)
        assert got["sharded"] == (parallel == "fsdp")
        assert bool(got["layers"]) == (launch.is_main() or got["sharded"])
        assert_same(got, expected[name])
    got = follow("gpt2", source, output / "again", "fsdp", activation_checkpointing=True)
    assert_same(got, expected["gpt2"])
    for parallel in ("ddp", "fsdp"):
        losses = follow("classifier", source, output / "bf16" / parallel, parallel, **BF16)["losses"]
        assert losses == pytest.approx(expected["bf16"], rel=2**-8)  # a rounding of bfloat16
    for parallel, name in itertools.product(("ddp", "fsdp"), ("classifier", "dino")):  # from 1 to 2
        assert_same(follow(name, source, output / "from1" / parallel, parallel, resume=folder / name), expected[name])
    for name in ("classifier", "dino"):
        follow(name, source, output / f"half-{name}", "fsdp", stop=3)
    a_full_disk(output / "full")
    refusals(source, output)
    pieces()


def a_full_disk(folder):
    """One of two ranks has a full disk. The previous checkpoint stays, and rank 0 prints one sentence."""
    model = torch.nn.Linear(300, 300)
    sharding.shard([model], torch.device("cpu"))
    folder.mkdir(exist_ok=True)
    checkpoints.save_run(folder, {"step": 1, "model": model.state_dict()})
    before = (folder / "last-00000001" / ".metadata").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if launch.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    said = OSError if launch.is_main() else SystemExit
    with pytest.raises(said) as error:
        checkpoints.save_run(folder, {"step": 2, "model": model.state_dict()})
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if launch.is_main():
        assert "the checkpoint of step 2 could not be written" in str(error.value)
        assert "File too large" in str(error.value)
        assert "last-00000001, is complete" in str(error.value)
        assert os.listdir(folder) == ["last-00000001"]
        assert (folder / "last-00000001" / ".metadata").read_bytes() == before
    dist.barrier()
    checkpoints.save_run(folder, {"step": 3, "model": model.state_dict()})
    dist.barrier()
    assert os.listdir(folder) == ["last-00000003"]


def refusals(source, output):
    for options, message in (
        (dict(batch_size=7, mixup=0.0), "2 ranks do not divide it"),
        (dict(batch_size=6, epochs=1), "must be a multiple of 4"),
        (dict(compile=True), "leave one of them out"),
    ):
        with pytest.raises(ValueError, match=message):
            follow("classifier", source, output / "refused", "fsdp", **options)


def pieces():
    """The functions from which the trainers are built."""
    rank, ranks = launch.rank(), launch.size()
    # Every sample belongs to one rank. Numbers that are drawn for all samples are divided among the ranks.
    assert [launch.gather(torch.arange(n)[launch.share(n)]).tolist() for n in (1, 2, 5)] == [
        list(range(n)) for n in (1, 2, 5)
    ]
    whole = torch.rand(3, 2 * ranks, 5, generator=torch.Generator().manual_seed(7))
    mine = launch.rand(3, 2, 5, dim=1, generator=torch.Generator().manual_seed(7))
    assert torch.equal(mine, whole[:, 2 * rank : 2 * rank + 2])
    # The gradient of a term that couples the batch, averaged over the ranks, is that of one process.
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    everything, part = x.clone().requires_grad_(), x[launch.share(4)].clone().requires_grad_()
    (everything.T @ everything).logdet().backward()
    joined = launch.concatenate(part, dim=0)
    (joined.T @ joined).logdet().backward()
    torch.testing.assert_close(part.grad / ranks, everything.grad[launch.share(4)])

    # If one rank fails, all ranks stop, and rank 0 prints the reason.
    def only_on_rank_one():
        with launch.together():
            if rank == 1:
                raise ValueError("no such file here")

    with pytest.raises(RuntimeError if rank == 0 else SystemExit) as error:
        only_on_rank_one()
    assert str(error.value) == ("rank 1: no such file here" if rank == 0 else "2")
    assert launch.agree(lambda: 17 if rank == 0 else None) == 17
    assert launch.largest(7 * rank) == 7
    assert launch.largest(-rank) == 0


def on_four_ranks(source, halves, expected, output):
    for name in ("classifier", "dino"):  # from 2 to 4
        got = follow(name, source, output / "from2" / name, "fsdp", resume=halves / f"half-{name}")
        assert_same(got, expected[name])
    assert_same(follow("bert", source, output / "bert", "ddp"), expected["bert"])
    assert_same(follow("mae", source, output / "mae", "fsdp"), expected["mae"])


def test_every_command_takes_the_same_course_on_two_and_four_ranks(source, alone, tmp_path):
    folder, expected = alone
    run_on_ranks(2, on_two_ranks, source, folder, expected, tmp_path)
    run_on_ranks(4, on_four_ranks, source, tmp_path, expected, tmp_path / "four")
    for name in ("classifier", "dino"):  # from 2 to 1
        half = tmp_path / f"half-{name}"
        assert [path.name for path in half.glob("last*")] == ["last-00000003"]
        assert_same(follow(name, source, half, resume=half), expected[name])
        assert [path.name for path in half.glob("last*")] == ["last.pt"]


def test_a_sharded_checkpoint_executes_no_code_and_must_be_complete(source, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "should-not-exist"),)

    run_on_ranks(1, write_a_sharded_state, tmp_path)
    path = tmp_path / "last-00000007"
    state = checkpoints.load(path)
    torch.testing.assert_close(
        checkpoints.restore(state, lambda keys: None)["model"]["weight"].sum(), torch.tensor(45.0)
    )
    shard = next(path.glob("*.distcp"))
    content, contents = shard.read_bytes(), (path / ".metadata").read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="last-00000007 is damaged or incomplete"):
        checkpoints.restore(state, lambda keys: None)
    shard.unlink()
    with pytest.raises(ValueError, match="last-00000007 is damaged or incomplete"):
        checkpoints.restore(state, lambda keys: None)
    shard.write_bytes(content)
    import pickle

    for evil in (pickle.dumps(Code()), contents[:-20]):
        (path / ".metadata").write_bytes(evil)
        with pytest.raises(ValueError, match="last-00000007 is damaged or incomplete"):
            checkpoints.restore(state, lambda keys: None)
    assert not (tmp_path / "should-not-exist").exists()
    (path / "state.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint of a run"):
        checkpoints.load(path)


def write_a_sharded_state(folder):
    model = torch.nn.Linear(10, 1, bias=False)
    model.weight.data.copy_(torch.arange(10.0))
    sharding.shard([model], torch.device("cpu"))
    checkpoints.save_run(folder, {"step": 7, "model": model.state_dict()})


def test_the_newer_checkpoint_counts(tmp_path):
    """A run that was killed between the write of a checkpoint and the removal of the previous one has two
    checkpoints."""
    checkpoints.save_run(tmp_path, {"step": 5})
    (tmp_path / "last-00000009").mkdir()
    assert checkpoints.find(tmp_path) == tmp_path / "last.pt"  # that folder holds nothing
    checkpoints.save(tmp_path / "last-00000009" / checkpoints.PART, {"step": 9})
    assert checkpoints.find(tmp_path) == tmp_path / "last-00000009"
    checkpoints.save(tmp_path / "last.pt", {"step": 12})
    assert checkpoints.find(tmp_path) == tmp_path / "last.pt"
    (tmp_path / ".last-00000020.tmp").mkdir()
    checkpoints.remove_leftovers(tmp_path)
    checkpoints.save_run(tmp_path, {"step": 13})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert sharded_files.disk_error(ValueError()) is None


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
def test_the_parts_of_a_batch_are_the_batch(mirrored, augmented):
    generator = np.random.default_rng(0)
    split = Split(generator.integers(0, 256, (20, 12, 12), dtype=np.uint8), np.arange(20))
    digits = ImageData("digits", list("ab"), split, split, (0.5,), (0.5,), (12, 12))
    options = dict(crop=0.5, flip=0.5) if augmented else dict(crop=1.0, flip=0.0)
    batching = data.Batching(8, workers=0, **options)
    transform = data._transform(digits, batching, (12, 12), training=True) if augmented else None
    item = 3, np.arange(20)[4:12]

    def batch(part):
        return data.Batches(split, transform, (12, 12), 1, part)[item]

    whole, labels, *_ = batch(np.arange)
    parts = [lambda n, r=rank: data.part_of_rank(n, r, 2, mirrored) for rank in (0, 1)]
    positions = [part(8) for part in parts]
    assert sorted(np.concatenate(positions)) == list(range(8))
    if mirrored:
        assert all((own + own[::-1] == 7).all() for own in positions)
    for part, own in zip(parts, positions, strict=True):
        images, mine, *_ = batch(part)
        assert torch.equal(images, whole[own])
        assert torch.equal(mine, labels[own])
