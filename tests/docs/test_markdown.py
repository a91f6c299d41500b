"""The README and the guides: every code block works, and every link leads somewhere."""

import ast
import importlib
import json
import tomllib
import traceback
from dataclasses import replace

import pytest
import torch

from crate_kernels.models import gpt, tokenizers
from crate_kernels.models.bert import CrateBert

from . import commands
from .pages import PAGES, ROOT, anchors, blocks, links

ALL = [block for page in PAGES for block in blocks(page)]
PYTHON = [page for page in PAGES if any(b.language == "python" and b.not_run is None for b in blocks(page))]
SHELL = [block for block in ALL if block.language == "sh"]


@pytest.fixture
def one_layer(monkeypatch):
    """The language models of the pages with one layer, so that their blocks run in seconds."""
    make_gpt, make_bert = gpt.CrateGPT.__init__, CrateBert.__init__

    def small_gpt(self, config=None, **options):
        make_gpt(self, replace(config or gpt.CrateGPTConfig(**options), n_layer=1))

    def small_bert(self, **options):
        make_bert(self, **options | dict(depth=1))

    monkeypatch.setattr(gpt.CrateGPT, "__init__", small_gpt)
    monkeypatch.setattr(CrateBert, "__init__", small_bert)
    monkeypatch.setitem(tokenizers.TOKENIZERS, "gpt2", tokenizers.ByteTokenizer)  # GPT-2's ranks may be missing


@pytest.mark.parametrize("page", PYTHON)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch, one_layer):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__docs__"}
    for block in blocks(page):
        if block.language != "python" or block.not_run is not None:
            continue
        run(block.setup, f"{block} (setup)", 1, namespace)
        run(block.text, page, block.line, namespace)


def run(code, name, line, namespace):
    """Run ``code``; a failure names the line of the page."""
    try:
        exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        pytest.fail(f"{name}, line {lines[0] if lines else line}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python" and b.not_run is not None], ids=str)
def test_python_blocks_that_are_not_run_are_valid_and_import_what_exists(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("block", [b for b in SHELL if b.not_run is None], ids=str)
def test_shell_commands_would_be_accepted(block, monkeypatch):
    found = commands.commands(block.text)
    assert found, f"{block} holds no command"
    for words in found:
        commands.check(words, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "crate-kernels fly",
        "crate-kernels train --no-such-option",
        "torchrun --nproc-per-node 2 -m crate_kernels train --epochs many",
        "python -m crate_kernels.ops",
        "python no_such_file.py",
        "python -m pytest tests/no_such_folder",
        "make coffee",
        "pip install 'crate_kernels[everything]'",
        "some-other-program",
    ],
)
def test_the_check_of_shell_commands_can_fail(command, monkeypatch):
    (words,) = commands.commands(command)
    with pytest.raises(commands.BadCommand):
        commands.check(words, monkeypatch)


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_names_a_language_that_is_checked(block):
    if block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "json":
        json.loads(block.text)
    else:
        # tests/deployment/test_formats.py compiles the only C++ block.
        assert block.language in ("python", "sh", "text", "cpp"), f"{block}: language {block.language!r}"
    if block.not_run is not None:
        assert len(block.not_run.split()) > 2, f"{block}: say why the block is not run"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(page):
        if target.startswith(("https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (PAGES[page].parent / file).resolve() if file else PAGES[page]
        assert path.exists(), f"{page}: {target} does not exist"
        assert path.is_relative_to(ROOT), f"{page}: {target} lies outside of the repository"
        if anchor:
            assert anchor in anchors(path), f"{page}: {file or page} has no heading #{anchor}"
