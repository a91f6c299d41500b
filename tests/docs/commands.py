"""Check that a shell command in the documentation would be accepted, without running it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest

from crate_kernels import cli

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("apt", "apt-get", "cd", ".", "source")
"""Programs whose arguments are not checked."""


class BadCommand(AssertionError):
    """A command that would be refused. The message gives the reason."""


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, without comments, continuations and variables."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for words in _split(shlex.split(line, comments=True), "&&"):
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
                words = words[1:]
            if words:
                found.append(words)
    return found


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise :class:`BadCommand` if the program, the options or the files of a command would be refused."""
    program, *arguments = words
    if program == "crate-kernels":
        _cli(arguments, monkeypatch)
    elif program == "torchrun":
        _torchrun(arguments, monkeypatch)
    elif program == "python":
        _python(arguments, monkeypatch)
    elif program == "pytest":
        _pytest(arguments)
    elif program == "make":
        _make(arguments)
    elif program == "pip":
        _pip(arguments)
    elif program == ".ci/run":
        pass
    elif program not in ELSEWHERE:
        raise BadCommand(f"unknown program {program!r}; mark the block with <!-- not run: REASON -->")


def _cli(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse with the real parser. The subcommand itself does not run."""
    if not arguments or arguments[0] not in cli.COMMANDS:
        raise BadCommand(f"crate-kernels has no subcommand {arguments[:1]}")
    module = importlib.import_module(cli.COMMANDS[arguments[0]][0])
    monkeypatch.setattr(module, "run", lambda args: 0)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
    if code:
        raise BadCommand(f"crate-kernels {shlex.join(arguments)}: {errors.getvalue()}")


def _torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import get_args_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            parsed = get_args_parser().parse_args(arguments)
    except SystemExit:
        raise BadCommand(f"torchrun {shlex.join(arguments)}: {errors.getvalue()}") from None
    module = ["-m"] if parsed.module else []
    _python([*module, parsed.training_script, *parsed.training_script_args], monkeypatch)


def _python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[:2] == ["-m", "crate_kernels"]:
        _cli(arguments[2:], monkeypatch)
    elif arguments[:2] == ["-m", "pytest"]:
        _pytest(arguments[2:])
    elif arguments[:2] == ["-m", "venv"]:
        return
    elif arguments[:1] == ["-m"]:
        specification = importlib.util.find_spec(arguments[1])
        if specification is None or '__name__ == "__main__"' not in Path(specification.origin).read_text():
            raise BadCommand(f"python -m {arguments[1]}: no such program")
        _known_options(("-m", arguments[1]), arguments[2:])
    else:
        if not (ROOT / arguments[0]).is_file():
            raise BadCommand(f"python {arguments[0]}: no such file; mark the block with <!-- not run: REASON -->")
        _known_options((str(ROOT / arguments[0]),), arguments[1:])


def _known_options(program: tuple[str, ...], arguments: list[str]) -> None:
    """Check that the program's help lists every option of the command."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    if options and (unknown := [option for option in options if option not in _help(program)]):
        raise BadCommand(f"python {' '.join(program)} has no option {', '.join(unknown)}")


@functools.cache
def _help(program: tuple[str, ...]) -> str:
    """What the program prints for ``--help``, in this process: another one would import torch first."""
    name, run = program[-1], runpy.run_module if program[0] == "-m" else runpy.run_path
    path = [str(Path(name).parent), *sys.path]
    with (
        mock.patch.multiple(sys, argv=[name, "--help"], path=path),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(io.StringIO()) as out,
        pytest.raises(SystemExit, match="0"),
    ):
        run(name, run_name="__main__")
    return out.getvalue()


def _pytest(arguments: list[str]) -> None:
    for argument in arguments:
        if "/" in argument and not (ROOT / argument.partition("::")[0]).exists():
            raise BadCommand(f"pytest {argument}: no such file")


def _make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for argument in arguments:
        if "=" not in argument and argument not in targets:
            raise BadCommand(f"make {argument}: no such target")


def _pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments:
        match = re.fullmatch(r"(?:\.|crate_kernels)\[([\w,-]+)\]", argument)
        if match and not set(match[1].split(",")) <= extras.keys():
            raise BadCommand(f"pip install {argument}: no such extra")


def _split(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
