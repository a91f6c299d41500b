import argparse
import json
import math

import pytest
import torch

from crate_kernels.data import text_files
from crate_kernels.data.prepare_text import Settings, prepare
from crate_kernels.data.text import ShardCorpus, TextCorpus, python_manual
from crate_kernels.data.text_files import Format
from crate_kernels.models import load_model
from crate_kernels.models.gpt import IGNORED_TARGET
from crate_kernels.models.tokenizers import ByteTokenizer
from crate_kernels.runs import checkpoints
from crate_kernels.training import text
from crate_kernels.training.progress import Report
from crate_kernels.training.text import TextConfig, TextTrainer

SMALL = dict(context=16, dim=16, depth=2, heads=2, batch_size=4, warmup_steps=2)
MODELS = pytest.mark.parametrize("model", ["gpt2", "lm", "bert"])


def train(*arguments):
    small = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    if "bert" not in arguments:  # BERT generates no sample
        small += ["--sample-tokens", "12"]
    parser = argparse.ArgumentParser()
    text.add_arguments(parser)
    return text.run(parser.parse_args([*small, *map(str, arguments)]))


@pytest.fixture(scope="module")
def rhyme(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("The sparse and the dense went up the hill; it's said that the naïve one fell.\n" * 60)
    return path


def corpus(model="gpt2", **options):
    settings = TextConfig(model=model, context=16, dim=16, depth=1, heads=2, batch_size=8, **options)
    return settings, TextCorpus("abc, def! " * 300, ByteTokenizer(), settings.context)


@MODELS
def test_a_run_learns_and_leaves_its_files(tmp_path, rhyme, model, capsys):
    output = tmp_path / "run"
    assert train("--text", rhyme, "--model", model, "--steps", 250, "--learning-rate", 0.02, "--output", output) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["validation"]["loss"] < summary["token_frequencies"]["loss"]
    if model != "bert":  # masked words take longer to learn than this run
        assert summary["validation"]["accuracy"] > summary["token_frequencies"]["accuracy"] + 0.2
    losses = [line["loss"] for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())]
    assert losses[-1] < math.log(320)
    shown = capsys.readouterr().out
    assert (output / "sample.txt").read_text().split("\n")[0] in shown
    assert "of tokens right" in shown
    loaded = load_model(output / "model.safetensors")
    assert loaded.vocab_size == 320
    with torch.no_grad():
        _, loss = loaded(torch.zeros(1, 4, dtype=torch.long), targets=torch.zeros(1, 4, dtype=torch.long))
    assert loss.isfinite()


@MODELS
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, rhyme, model, monkeypatch):
    common = ("--text", rhyme, "--model", model, "--steps", 8, "--dropout", 0.1, "--log-steps", 1)
    train(*common, "--output", tmp_path / "whole")

    class Killed(BaseException):
        pass

    def show(self, step, _):
        if step == 5:
            raise Killed

    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(Report, "show", show)
        with pytest.raises(Killed):
            train(*common, "--output", part, "--checkpoint-seconds", 0)
    with pytest.raises(ValueError, match="unfinished run"):
        train(*common, "--output", part)
    parser = argparse.ArgumentParser()
    text.add_arguments(parser)
    text.run(parser.parse_args(["--resume", str(part)]))
    whole, resumed = (load_model(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "part")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]
    with pytest.raises(ValueError, match="--seed 3 contradicts the run to resume"):
        text.run(parser.parse_args(["--resume", str(part), "--seed", "3"]))


def test_sampled_control_bytes_do_not_reach_the_terminal(tmp_path, rhyme, monkeypatch, capsys):
    monkeypatch.setattr(text.NextToken, "sample", lambda self, model: iter(["red: \x1b[31m", "bell: \x07\n"]))
    assert train("--text", rhyme, "--steps", 1, "--layerwise-steps", 0, "--output", tmp_path / "run") == 0
    assert "red: \u241b[31mbell: \u2407" in capsys.readouterr().out
    assert (tmp_path / "run" / "sample.txt").read_text() == "red: \u241b[31mbell: \u2407\n\n"


def test_next_token_batches():
    settings, data = corpus()
    task = text.NextToken(settings, data)
    batch, weight = task.batch(0, slice(None))
    assert weight == 1
    assert torch.equal(batch["idx"][:, 1:], batch["targets"][:, :-1])
    assert ByteTokenizer().decode(batch["idx"][0].tolist()) in "abc, def! " * 5
    windows = [b["idx"] for b in task.validation()]
    assert torch.cat(windows).shape == (300 // 17, 16)


def test_masked_batches():
    settings, data = corpus("bert", whole_words=True)
    batch, _ = text.MaskedToken(settings, data).batch(0, slice(None))
    idx, lengths, targets = batch["idx"], batch["lengths"], batch["targets"]
    beyond = torch.arange(16) >= lengths[:, None]
    assert len(lengths.unique()) > 1
    assert (idx[:, 0] == 256).all()
    assert (idx[beyond] == 256).all()
    assert (targets[beyond] == IGNORED_TARGET).all()
    assert ((targets != IGNORED_TARGET).sum(1) >= 1).all()
    assert (idx == data.mask_token).any()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    lines = "\n".join(f"{i} is sparse; {i * i} is dense." for i in range(700))
    (folder / "lines.txt").write_text(lines)
    settings = Settings("bytes", Format(separator="\n"), 0.1, 3000)
    prepare(text_files.find([folder / "lines.txt"]), folder / "out", settings, show=lambda line: None)
    return folder / "out"


@MODELS
def test_ranks_read_different_windows_of_shards_and_together_those_of_one(shards, model):
    settings = TextConfig(model=model, context=16, dim=16, depth=1, heads=2, batch_size=6)
    data = ShardCorpus(shards, settings.context, seed=3)
    task = text.TASKS[model](settings, data)
    size, stride = (17, 16) if model != "bert" else (15, 15)
    for number in (0, 7):
        whole, weight = task.batch(number, slice(None))
        assert weight == 1
        parts, weights = zip(*(task.batch(number, slice(2 * r, 2 * r + 2)) for r in range(3)), strict=True)
        assert sum(weights) == pytest.approx(3)
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name
    windows = data.windows(7, slice(None), 6, size, stride, torch.Generator())
    if model != "bert":
        assert torch.equal(torch.cat([whole["idx"], whole["targets"][:, -1:]], dim=1), windows)
    starts = data.orders[size, stride].starts(0, 6 * 20)
    tokens = data.shards.train.read(0, data.training_tokens)
    assert windows[0].tolist() == tokens[starts[42] : starts[42] + size].tolist()
    assert len(set(starts)) == 120


def test_training_on_shards_resumes_in_the_middle_of_an_epoch(tmp_path, shards, monkeypatch, capsys):
    small = ("--text", shards, "--steps", 8, "--log-steps", 1, "--layerwise-steps", 0)
    train(*small, "--output", tmp_path / "whole")
    shown = capsys.readouterr().out
    manifest = json.loads((shards / "manifest.json").read_text())
    tokens = sum(shard["tokens"] for shard in manifest["train"])
    assert f"{tokens:,} training and" in shown
    saved = checkpoints.save_run

    def killed(folder, state):
        path = saved(folder, state)
        if state["step"] == 5:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_run", killed)
        with pytest.raises(KeyboardInterrupt):
            train(*small, "--output", tmp_path / "part", "--checkpoint-seconds", 0)
    train("--resume", tmp_path / "part")
    whole, resumed = (load_model(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_shards_name_their_tokenizer_and_are_named_when_they_do_not_fit(tmp_path, shards):
    settings = TextTrainer.resolve({"text": str(shards)})
    assert settings.tokenizer == "bytes"
    with pytest.raises(ValueError, match="was made with the tokenizer bytes, not with gpt2"):
        train("--text", shards, "--tokenizer", "gpt2", "--output", tmp_path)
    with pytest.raises(
        ValueError, match=r"more than --context 8000\. In crate-kernels prepare-text: Raise --validation"
    ):
        train("--text", shards, "--context", 8000, "--output", tmp_path)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        train("--text", tmp_path, "--output", tmp_path / "run")


def test_a_model_is_judged_on_the_text_that_was_set_aside(tmp_path, shards):
    settings = TextConfig(context=16, dim=16, depth=1, heads=2, batch_size=8)
    data = ShardCorpus(shards, 16, seed=0)
    trainer = TextTrainer(settings, tmp_path, torch.device("cpu"), data)
    tokens = data.shards.train.read(0, data.training_tokens)
    assert torch.equal(data.counts(), torch.bincount(torch.from_numpy(tokens.astype(int)), minlength=320))
    windows = torch.cat([batch["idx"] for batch in trainer.task.validation()])
    held = data.shards.validation.read(0, data.validation_tokens)
    assert windows[0].tolist() == held[:16].tolist()
    assert windows[1].tolist() == held[17:33].tolist()
    frequency = (data.counts() + 1).double() / (data.counts() + 1).sum()
    targets = torch.cat([torch.from_numpy(held[i + 1 : i + 17].astype(int)) for i in range(0, len(held) - 16, 17)])
    assert trainer.baseline()["loss"] == pytest.approx(-frequency[targets].log().mean().item())


def test_baseline_is_the_entropy_of_frequencies(tmp_path):
    settings, data = corpus()
    trainer = TextTrainer(settings, tmp_path, torch.device("cpu"), data)
    baseline = trainer.baseline()
    # Two of ten characters are spaces, the other eight are different: log(10)·0.8 + log(5)·0.2.
    assert baseline["loss"] == pytest.approx(0.8 * math.log(10) + 0.2 * math.log(5), abs=0.15)
    assert baseline["accuracy"] == pytest.approx(0.2, abs=0.02)
    assert trainer.evaluate()["loss"] == pytest.approx(math.log(320), rel=0.1)


def test_the_manual_is_there():
    manual = python_manual()
    assert len(manual) > 300_000
    assert 'The "assert" statement' in manual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "3"], "--heads 3 does not divide --dim 16"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--dropout", "1"], "--dropout must lie in 0..0.99"),
        (["--context", "4000"], r"rhyme\S*: \S+ of \S+ tokens .* there must be more than --context 4000"),
        (["--learning-rate", "-1"], "--learning-rate must be above 0"),
    ],
)
def test_errors_are_sentences(tmp_path, rhyme, arguments, message):
    with pytest.raises(ValueError, match=message):
        train("--text", rhyme, "--output", tmp_path, *arguments)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff\xe0" * 100)
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        train("--text", tmp_path / "picture", "--output", tmp_path)
    with pytest.raises(FileNotFoundError):
        train("--text", tmp_path / "missing", "--output", tmp_path)
