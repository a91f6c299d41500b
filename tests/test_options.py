"""The options of every command. A command line either runs, or prints one sentence to stderr and exits with code 2."""

import argparse
import dataclasses
import importlib
import math
import re
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crate_kernels import cli, options, selftest, user_cache

pytest.importorskip("timm")

from crate_kernels.analysis import command as analyze
from crate_kernels.analysis import report, segment
from crate_kernels.bench import command as bench
from crate_kernels.bench import tune
from crate_kernels.data import prepare_images, prepare_text
from crate_kernels.deployment import command as export
from crate_kernels.distributed import plan
from crate_kernels.training import command as training
from crate_kernels.training.classifier import Trainer
from crate_kernels.training.config import DATA_DEFAULTS
from crate_kernels.training.dino import DINOTrainer
from crate_kernels.training.mae import MAETrainer
from crate_kernels.training.text import TextTrainer


@dataclasses.dataclass
class NoOptions:
    """The options of a command that has only flags."""


COMMANDS = {
    "train": ([], Trainer.options),
    "train-mae": ([], MAETrainer.options),
    "train-dino": ([], DINOTrainer.options),
    "train-text": ([], TextTrainer.options),
    "prepare-text": (["a.txt", "--output=x"], prepare_text.Options),
    "prepare-images": (["photos", "--output=x"], prepare_images.Options),
    "analyze": (["runs/x"], analyze.Settings),
    "report": (["runs/x"], report.Settings),
    "segment": (["a.png", "--checkpoint", "runs/x"], segment.Settings),
    "export": (["runs/x"], export.Settings),
    "bench": ([], bench.Settings),
    "plan": ([], plan.PlanOptions),
    "tune": ([], tune.Settings),
    "selftest": ([], NoOptions),
}
"""Command -> its required arguments, and its options."""


@pytest.fixture(autouse=True)
def no_work(monkeypatch, tmp_path):
    """Remove the work of every command. Only reading and checking the options is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "execute", lambda *arguments: 0)
    monkeypatch.setattr(analyze, "analyze", lambda *arguments: 0)
    monkeypatch.setattr(report, "write", lambda *arguments: 0)
    monkeypatch.setattr(segment, "segment_files", lambda *arguments: 0)
    monkeypatch.setattr(plan, "report", lambda *arguments: "")
    monkeypatch.setattr(tune, "tune", lambda *arguments: None)
    monkeypatch.setenv(user_cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(export, "export", lambda *arguments: 0)
    monkeypatch.setattr(prepare_text, "write", lambda *arguments: 0)
    monkeypatch.setattr(prepare_images, "write", lambda *arguments: 0)
    monkeypatch.setattr(selftest, "run", lambda *arguments: 0)
    monkeypatch.setattr("crate_kernels.bench.predict.text", lambda *arguments: "")
    for name in ("measure", "render", "compare"):
        monkeypatch.setattr(bench, name, lambda *arguments: 0)


def outcome(arguments, capsys):
    """The exit code, and the lines written to stderr."""
    capsys.readouterr()
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err.splitlines()


WORDS = st.one_of(
    st.integers(-3, 1000).map(str),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.sampled_from(["", " ", "nan", "-inf", "1e400", "0x10", "١٢", "cuda", "cuda:7", "tpu", "auto", "bf16", "gpt2",
                     "none", "{", "{x}", "{dim.x}", "{0}", "%", "%(prog)s", "a,b", ",", "1,2", "0", "/dev/null", "..",
                     "\udc80",
                     "\x1b[31m", "--", "-1"]),
    st.text(st.characters(exclude_characters="\0"), max_size=12),
)  # fmt: skip


def words_of(field):
    """Values of an option: any text, and values that it accepts."""
    choices = field.metadata["choices"]
    return WORDS if choices is None else st.one_of(st.sampled_from(choices), WORDS)


def test_every_command_is_tried():
    assert {*COMMANDS, "info"} == set(cli.COMMANDS)  # info takes no options
    assert not arguments_of("info")


def arguments_of(command):
    """The optional arguments of a command's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    return [action for action in parser._actions if action.option_strings]


@pytest.mark.parametrize("command", COMMANDS)
def test_any_command_line_is_a_run_or_one_sentence(command, capsys):
    needed, kind = COMMANDS[command]
    fields = {field.name: field for field in options.fields(kind)}
    known = arguments_of(command)
    assert fields.keys() <= {action.dest for action in known}

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.data())
    def check(data):
        arguments = [command, *needed]
        for action in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True)):
            name = data.draw(st.sampled_from(action.option_strings))
            if action.nargs == 0:
                arguments.append(name)
            elif isinstance(action.nargs, int):
                arguments += [name, *(data.draw(WORDS) for _ in range(action.nargs))]
            else:
                value = data.draw(words_of(fields[action.dest]) if action.dest in fields else WORDS)
                arguments.append(f"{name}={value}")
        code, said = outcome(arguments, capsys)
        assert code in (0, 2), arguments
        assert len(said) == (1 if code else 0), (arguments, said)
        if code:
            assert said[0].startswith(("crate-kernels: ", f"crate-kernels {command}: "))
            assert not any(unicodedata.category(c) == "Cc" for c in said[0])

    check()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_out_of_its_range_is_refused_by_name(command, capsys):
    needed, kind = COMMANDS[command]
    for field in options.fields(kind):
        if options.type_name(field) not in ("int", "float"):
            continue
        limits = field.metadata["limits"]
        wrong = [limits["least"] - 1] if limits["least"] is not None else []
        wrong += [limits["above"]] if limits["above"] is not None else []
        wrong += (
            [limits["most"] + 1]
            if limits["most"] is not None
            else [10**12]
            if options.type_name(field) == "int"
            else []
        )
        wrong += ["nan", "inf", "-inf"] if options.type_name(field) == "float" else []
        for value in wrong:
            code, said = outcome([command, *needed, f"{options.flag(field.name)}={value}"], capsys)
            assert code == 2, (field.name, value)
            assert options.flag(field.name) in said[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_unknown_word_is_refused_with_the_known_ones(command, capsys):
    needed, kind = COMMANDS[command]
    for field in options.fields(kind):
        if field.metadata["choices"] is None:
            continue
        code, (said,) = outcome([command, *needed, f"{options.flag(field.name)}=nonsense"], capsys)
        assert code == 2
        assert options.flag(field.name) in said
        assert all(str(choice) in said for choice in field.metadata["choices"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --root x", "--root applies only with --data fashion-mnist or cifar10"),
        ("train --new-head", "--new-head applies only with --init"),
        ("train --model crate_tiny_patch16_224 --architecture alpha", "--architecture applies only without --model"),
        ("train --device tpu", "--device must be auto, cpu, cuda or cuda:N, got tpu"),
        ("train --optimizer magic", "--optimizer must be one of timm's, "),
        ("train --optimizer sgd --beta2 0.9", "--beta2 applies only with an optimizer that has it"),
        ("train --auto-augment nonsense", "--auto-augment must be a policy of timm's, such as rand-m9-mstd0.5"),
        ("train --learning-rate nan", "--learning-rate must be a finite number, got nan"),
        ("train --tensorboard --layerwise-steps 0", "--tensorboard applies only with --layerwise-steps above 0"),
        ("train --overwrite --resume", "--overwrite replaces a run and --resume continues it"),
        ("train --init nowhere", "no checkpoint at nowhere"),
        ("train-dino --gamma 0.5", "--gamma applies only with --simdino"),
        ("train-dino --simdino --prototypes 8", "--prototypes applies only without --simdino"),
        ("train-dino --local-crops 0 --local-size 8", "--local-size applies only with --local-crops above 0"),
        ("train-mae --dim 6 --heads 2", "--dim must be a multiple of 4"),
        ("train-text --whole-words", "--whole-words applies only with --model bert"),
        ("train-text --model bert --temperature 1", "--temperature applies only with --model gpt2 or lm"),
        ("train-text --temperature -1", "--temperature must be at least 0, got -1.0"),
        ("train-text --top-p 0", "--top-p must be above 0 and at most 1, got 0.0"),
        ("analyze x --text a --data b", "--text applies only without --data"),
        ("export x --format safetensors --any-size", "--any-size applies only with --format onnx, openvino or aoti"),
        ("bench --batches 0", "--batches must be whole numbers from 1 to 1048576, got 0"),
        ("bench --quick --sizes tiny", "--sizes applies only with --suite models or all, and without --quick"),
        ("bench --suite models --operators ista_step", "--operators applies only with --suite operators or all"),
        ("bench --sizes gigantic", "--sizes: unknown gigantic; known are tiny, small, base, large"),
        ("prepare-text a.txt", "--output is required"),
        ("prepare-text --output x", "give files or folders to read, or a --dataset"),
        ("prepare-text a.txt --output x --verify", "--verify accepts no files"),
        ("prepare-text --output x --verify --validation 0.1", "--validation applies only without --verify"),
        ("prepare-text a.txt --output x --dataset-split test", "--dataset-split applies only with --dataset"),
        (r"prepare-text a.txt --output x --separator \x", r"--separator \x: truncated \xXX escape"),
        (r"prepare-text a.txt --output x --separator aba", "--separator 'aba' begins as it ends"),
        ("prepare-images photos", "--output is required"),
        ("prepare-images --output x", "give a folder or the name of a data set, or existing shards with --index"),
        ("prepare-images photos --output x --classes names", "--classes applies only with --index"),
        ("prepare-images photos --output x --root y", "--root applies only with fashion-mnist or cifar10"),
        ("prepare-images --index y --output x --resize 64", "--resize applies only without --verify and --index"),
        ("prepare-images --output x --verify --seed 1", "--seed applies only without --verify and --index"),
        ("plan --model crate_base --context 64", "--context applies only with a language model"),
        ("plan --model crate_gpt2_base --image-size 224", "--image-size applies only with a vision model"),
        ("plan --gpus 3", "--batch-size 1024 is the batch of all ranks together: 3 ranks do not divide it"),
        ("bench --relative", "--relative applies only with --compare"),
        ("bench --report --seconds 3", "--seconds applies only without --report, --dispatch, --predict and --compare"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused(arguments, message, capsys):
    code, (said,) = outcome(arguments.split(), capsys)
    assert code == 2
    assert message in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_defaults_that_will_be_used(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    headings = re.findall(r"^[a-z ]+:$", shown, re.MULTILINE)
    assert "options:" in headings
    assert len(headings) == len(set(headings))
    text = " ".join(shown.split())
    for name in (field.name for field in options.fields(COMMANDS[command][1])):
        assert options.flag(name) in text
    if command == "segment":
        assert "segment IMAGE [IMAGE ...] --checkpoint PATH [options]" in text
        assert "crate_mae_base_patch16_224" in text
        assert "gpt2" not in text
    if command == "train-mae":
        # Lines may break after a hyphen.
        assert "a patch (default 8; mnist5k, fashion-mnist: 7; cifar10: 4)" in text.replace("- ", "-")
    if command in ("train-mae", "train-dino"):
        for name, defaults in DATA_DEFAULTS.items():
            trainer = MAETrainer if command == "train-mae" else DINOTrainer
            assert trainer.resolve({"data": name}).patch_size == defaults["patch_size"]  # it divides the images
    if command == "train":
        assert "after the warm-up (default 0.003; alpha: 0.004; cifar10, photos: 0.001; folders: 0.0003)" in text
        assert "what the head reads: cls, mean (default mean; cifar10, folders: cls)" in text
        for name, defaults in DATA_DEFAULTS.items():
            assert dataclasses.asdict(Trainer.resolve({"data": name})) | defaults == dataclasses.asdict(
                Trainer.resolve({"data": name})
            )


def test_ranges_in_words():
    def words(**limits):
        return options.range_in_words(dict.fromkeys(("least", "above", "most", "below")) | limits)

    assert words(least=1) == "be at least 1"
    assert words(least=0, most=1) == "lie in 0..1"
    assert words(above=0, most=1) == "be above 0 and at most 1"
    assert words(above=0, below=1) == "be above 0 and below 1"
    assert not options.within(0, dict(least=None, above=0, most=None, below=None))
    assert options.within(math.pi, dict(least=3, above=None, most=None, below=4))
