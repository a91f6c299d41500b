import argparse
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crate_kernels.data import prepare_text, text_files, text_shards
from crate_kernels.data.prepare_text import Settings, prepare
from crate_kernels.data.text_files import Format
from crate_kernels.data.text_shards import TextShards, Tokens, WindowOrder
from crate_kernels.models.tokenizers import ByteTokenizer

END = ByteTokenizer.end_of_text


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Do not wait for the disk after each of hundreds of small shards."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def words(seed, count):
    generator = random.Random(seed)
    return " ".join(generator.choice(["sparse", "rate", "reduction", "naïve", "step", "of", "a"]) for _ in range(count))


DOCUMENTS = [words(seed, 5 + 37 * seed % 211) for seed in range(120)]


def settings(part_bytes=1000, validation=0.0, **form):
    return Settings("bytes", Format(**form), validation, part_bytes)


def prepared(folder, paths, chosen, workers=0):
    prepare(text_files.find(paths), folder, chosen, workers, show=lambda line: None)
    return TextShards(folder)


def split_documents(tokens):
    """The documents of a split, as text, in their order."""
    whole = tokens.read(0, len(tokens))
    ends = np.flatnonzero(whole == END)
    assert len(whole) == 0 or ends[-1] == len(whole) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [ByteTokenizer().decode(whole[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def write_lines(path, documents):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": d, "other": 1}, ensure_ascii=False) + "\n" for d in documents)
    return path


def write_arrow(path, documents, stream=True):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"content": documents, "number": list(range(len(documents)))})
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def write_parquet(path, documents):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"content": documents}), path, row_group_size=11)
    return path


@pytest.mark.parametrize("part_bytes", [197, 1000, 10**9])
@pytest.mark.parametrize("kind", ["lines", "lines.gz", "separated", "marked", "stream", "arrow", "parquet"])
def test_every_document_comes_once_and_in_order(tmp_path, kind, part_bytes):
    form = {}
    if kind.startswith("lines"):
        path = write_lines(tmp_path / f"x.json{kind}".replace("jsonlines", "jsonl"), DOCUMENTS)
    elif kind == "parquet":
        path, form = write_parquet(tmp_path / "x.parquet", DOCUMENTS), {"field": "content"}
    elif kind in ("stream", "arrow"):
        path, form = write_arrow(tmp_path / "x.arrow", DOCUMENTS, kind == "stream"), {"field": "content"}
    else:
        path, separator = tmp_path / "x.txt", "\n\n" if kind == "separated" else "<|end|>"
        # Some separators stand twice in a row: there is no document between them.
        path.write_text("".join(d + separator * (1 + i % 3 % 2) for i, d in enumerate(DOCUMENTS)))
        form = {"separator": separator}
    shards = prepared(tmp_path / "out", [path], settings(part_bytes, **form))
    assert split_documents(shards.train) == DOCUMENTS
    manifest = shards.manifest
    assert manifest.total("train", "documents") == len(DOCUMENTS)
    assert manifest.total("train", "bytes") == sum(len(d.encode()) for d in DOCUMENTS)
    assert len(shards.validation) == 0
    assert (len(manifest.train) == 1) == (part_bytes == 10**9 or kind == "lines.gz")
    shards.verify()


def test_a_file_without_separators_is_one_document(tmp_path):
    (tmp_path / "x.txt").write_text("\n".join(DOCUMENTS) + "\n  indented\n\nlast, without a line's end")
    (tmp_path / "empty.txt").touch()
    text = (tmp_path / "x.txt").read_text()
    whole = prepared(tmp_path / "whole", [tmp_path], settings(10**9))
    assert split_documents(whole.train) == [text]
    cut = prepared(tmp_path / "cut", [tmp_path / "x.txt"], settings(1000))
    assert "".join(split_documents(cut.train)) == text
    assert len(split_documents(cut.train)) == len(cut.manifest.train) > 1


def test_cuts_between_excerpts_change_no_byte_pair(tmp_path, monkeypatch):
    pytest.importorskip("regex")
    import regex

    from crate_kernels.models.tokenizers import GPT2_PATTERN

    monkeypatch.setattr(text_files, "EXCERPT", 20)
    text = "def f(x):\n    return x\n\n\nclass  A:\n\n\n    pass \nend\nof\ttext\n\nit's\nover 12\n3\n" * 30
    (tmp_path / "x.py").write_text(text)
    (source,) = text_files.find([tmp_path / "x.py"])
    (((part,),),) = (text_files.cut([source], 10**9),)
    pieces = [piece for piece, _ in text_files.documents(part, Format())]
    assert "".join(pieces) == text
    assert len(pieces) > 30
    assert [match for piece in pieces for match in regex.findall(GPT2_PATTERN, piece)] == regex.findall(
        GPT2_PATTERN, text
    )


def test_the_split_depends_on_each_document_alone(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", DOCUMENTS + DOCUMENTS)
    one = prepared(tmp_path / "one", [path], settings(500, validation=0.25))
    train, validation = split_documents(one.train), split_documents(one.validation)
    assert 2 * 15 < len(validation) < 2 * 45
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(DOCUMENTS + DOCUMENTS)
    backwards = write_lines(tmp_path / "y.jsonl", DOCUMENTS[::-1])
    other = prepared(tmp_path / "other", [backwards], settings(10**9, validation=0.25))
    assert set(split_documents(other.validation)) == set(validation)


def test_excerpts_of_a_long_document_are_set_aside_with_boundaries(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "EXCERPT", 100)
    lines = [f"{i} {words(i, 6)}" for i in range(400)]
    (tmp_path / "x.txt").write_text("\n".join(lines) + "\n")
    shards = prepared(tmp_path / "out", [tmp_path / "x.txt"], settings(10**9, validation=0.2))
    runs = split_documents(shards.train) + split_documents(shards.validation)
    # Each run is a piece of consecutive lines, and no line is in two of them.
    for run in runs:
        numbers = [int(line.split()[0]) for line in run.splitlines()]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert sorted(line for run in runs for line in run.splitlines()) == sorted(lines)
    assert 0.05 < len(shards.validation) / (len(shards.train) + len(shards.validation)) < 0.4


def test_processes_change_nothing(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    alone = prepared(tmp_path / "alone", [path], settings(2000, validation=0.1))
    several = prepared(tmp_path / "several", [path], settings(2000, validation=0.1), workers=2)
    assert alone.manifest == several.manifest
    assert np.array_equal(alone.counts(), several.counts())
    train = alone.train.read(0, len(alone.train))
    assert np.array_equal(alone.counts(), np.bincount(train, minlength=257))
    assert not (tmp_path / "several" / "parts").exists()


def test_a_killed_preparation_resumes(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    whole = prepared(tmp_path / "whole", [path], settings(2000))
    encode, calls = ByteTokenizer.encode_array, []

    def killed(self, text):
        calls.append(text)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode_array", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "part", [path], settings(2000))
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        TextShards(tmp_path / "part")
    with pytest.raises(ValueError, match="unfinished shards of other files or settings"):
        prepared(tmp_path / "part", [path], settings(2000, validation=0.5))
    resumed = prepared(tmp_path / "part", [path], settings(2000))
    assert resumed.manifest == whole.manifest
    assert len(calls) < 60 + 80  # of 120 documents, those of finished parts are not tokenized again
    assert sorted(os.listdir(tmp_path / "part")) == sorted(os.listdir(tmp_path / "whole"))
    lines = []
    prepare(text_files.find([path]), tmp_path / "part", settings(2000), show=lines.append)
    assert "already complete" in lines[0]
    with pytest.raises(ValueError, match="shards of other files or settings"):
        prepared(tmp_path / "part", [path], settings(3000))


def descendants(pid):
    """The processes that a process started, and those that they started."""
    found, parents = [], [pid]
    while parents:
        for task in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            children = [int(child) for child in task.read_text().split()]
            found, parents = found + children, parents + children
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists the processes as Linux does")
def test_the_processes_of_a_killed_preparation_end_with_it_and_it_resumes(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", DOCUMENTS * 400)
    chosen = [str(path), "--part-size", "0.2", "--validation", "0.1", "--output"]
    assert command(*chosen, tmp_path / "whole", "--workers", "0") == 0
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    call = [sys.executable, "-m", "crate_kernels", "prepare-text", *chosen, tmp_path / "part", "--workers", "2"]
    process = subprocess.Popen(call, env=environment)
    while process.poll() is None and not list((tmp_path / "part" / "parts").glob("*.json")):
        time.sleep(0.01)
    assert process.poll() is None
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert command(*chosen, tmp_path / "part", "--workers", "0") == 0
    assert TextShards(tmp_path / "part").manifest == TextShards(tmp_path / "whole").manifest
    TextShards(tmp_path / "part").verify()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_reads_cross_shards_and_stay_within_bounds(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(text_shards, "OPEN_SHARDS", 2)
    sizes, shards, first = [5, 1, 7, 3], [], 0
    for number, size in enumerate(sizes):
        np.arange(first, first + size).astype(dtype).tofile(tmp_path / f"{number}.bin")
        shards.append(text_shards.Shard(f"{number}.bin", size, 1, size, ""))
        first += size
    tokens = Tokens(tmp_path, tuple(shards), dtype)
    assert len(tokens) == 16
    for start in range(17):
        for count in range(17 - start):
            assert tokens.read(start, count).tolist() == list(range(start, start + count))
            assert len(tokens._open) <= 2
    assert tokens.windows(np.array([3, 0]), 4).tolist() == [[3, 4, 5, 6], [0, 1, 2, 3]]
    with pytest.raises(IndexError):
        tokens.read(10, 7)
    os.truncate(tmp_path / "3.bin", 4)
    with pytest.raises(ValueError, match=r"3\.bin has become shorter"):
        tokens.read(13, 3)


def test_an_epoch_reads_every_window_once_whatever_the_ranks():
    order = WindowOrder(tokens=1000, size=17, stride=16, seed=4)
    assert order.per_epoch == (1000 - 17 - 15) // 16 + 1
    seen = []
    for rank_part in np.array_split(np.arange(2 * order.per_epoch), 7):
        seen.append(order.starts(int(rank_part[0]), len(rank_part)))
    seen = np.concatenate(seen)
    assert np.array_equal(seen, order.starts(0, 2 * order.per_epoch))
    for epoch in (seen[: order.per_epoch], seen[order.per_epoch :]):
        assert np.array_equal(np.diff(np.sort(epoch)), np.full(order.per_epoch - 1, 16))
        assert epoch.min() < 16
        assert epoch.max() + 17 <= 1000
    assert not np.array_equal(seen[: order.per_epoch], seen[order.per_epoch :])
    assert WindowOrder(32, 17, 16, 0).per_epoch == 1
    with pytest.raises(ValueError, match="31 tokens do not fill a window of 17"):
        WindowOrder(31, 17, 16, 0)


def test_damage_is_named(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    shards = prepared(tmp_path / "out", [path], settings(10**9))
    shard = tmp_path / "out" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00000\.bin is damaged"):
        shards.verify()
    shard.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="but the manifest says"):
        TextShards(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="damaged or not a manifest"):
        TextShards(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="this version reads format 1"):
        TextShards(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "the line at byte 14 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"title": "b"}\n', "the line at byte 14 has no text in the field 'text'"),
        ("x.txt", b"abc\nab\xff\xd8", "is not UTF-8 text: byte 6"),
        ("x.arrow", b"no table", "truncated or not an Arrow file"),
        ("x.parquet", b"no table", "truncated or not a Parquet file"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, name, content, message):
    if "able" in message or "file" in message:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        prepared(tmp_path / "out", [tmp_path / name], settings())
    assert name in str(raised.value)


def test_columns_and_inputs_that_are_missing_are_named(tmp_path):
    path = write_arrow(tmp_path / "x.arrow", DOCUMENTS)
    with pytest.raises(ValueError, match="no column 'text'; its columns are content, number"):
        prepared(tmp_path / "out", [path], settings())
    with pytest.raises(ValueError, match="there is no file or folder"):
        text_files.find([tmp_path / "missing"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="has no files with the endings"):
        text_files.find([tmp_path / "folder"])
    with pytest.raises(ValueError, match="begins as it ends"):
        Format(separator="aba")


def test_a_folder_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": DOCUMENTS})
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    shards = prepared(tmp_path / "out", [tmp_path / "saved"], settings(10**9))
    assert split_documents(shards.train) == DOCUMENTS


def test_a_data_set_that_datasets_loads(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    path = write_lines(tmp_path / "x.jsonl", DOCUMENTS)
    load = datasets.load_dataset

    def local(name, configuration, split):
        assert (name, configuration) == ("corpus", "small")
        return load("json", data_files={"train": str(path)}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    sources = text_files.dataset("corpus", "small", "train")
    prepare(sources, tmp_path / "out", settings(10**9), show=lambda line: None)
    assert split_documents(TextShards(tmp_path / "out").train) == DOCUMENTS
    with pytest.raises(ValueError, match="give a whole split"):
        text_files.dataset("corpus", "small", "train[:50%]")


def command(*arguments):
    parser = argparse.ArgumentParser()
    prepare_text.add_arguments(parser)
    return prepare_text.run(parser.parse_args([str(a) for a in arguments]))


def test_the_command(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("\n\n".join(DOCUMENTS))
    output = tmp_path / "out"
    assert command(tmp_path / "x.txt", "--separator", r"\n\n", "--validation", "0.2", "--output", output) == 0
    shown = capsys.readouterr().out
    shards = TextShards(output)
    assert sorted(split_documents(shards.train) + split_documents(shards.validation)) == sorted(DOCUMENTS)
    assert f"train: {len(shards.train):,} tokens" in shown
    assert "No text fell" not in capsys.readouterr().err
    assert command("--verify", "--output", output) == 0


def test_the_command_warns_of_shards_without_validation(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("a")
    assert command(tmp_path / "x.txt", "--validation", "0", "--output", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert "train: 2 tokens, 1 document, 1 byte of text in 1 shard\n" in said.out
    assert "No text fell into the validation split. Raise --validation, or split the text with --separator." in said.err
    assert "train-text" not in said.out  # it refuses shards without validation
