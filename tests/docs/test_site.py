"""The documentation site: the API reference has every public name, and the menu has every page."""

import importlib
import importlib.util
import inspect
import re

import pytest
import yaml

from .pages import ROOT

PACKAGES = ["crate_kernels", "crate_kernels.ops", "crate_kernels.models", "crate_kernels.fusion",
            "crate_kernels.analysis", "crate_kernels.deployment", "crate_kernels.distributed"]  # fmt: skip
"""Packages whose every exported function and class is documented."""

MODULES = ["crate_kernels.nn", "crate_kernels.graphs", "crate_kernels.models.generation",
           "crate_kernels.models.tokenizers",
           "crate_kernels.models.huggingface", "crate_kernels.models.timm_registry",
           "crate_kernels.analysis.segmentation", "crate_kernels.data.images", "crate_kernels.data.batches",
           "crate_kernels.data.text", "crate_kernels.data.text_shards"]  # fmt: skip
"""Modules that are documented as a whole."""

PAGES = {path: path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md"))}
DIRECTIVES = [name for text in PAGES.values() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]


def exported(module):
    """Name -> function or class of this project that a module or package offers."""
    members = vars(importlib.import_module(module)).items()
    return {
        name: value
        for name, value in members
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith("crate_kernels")
    }


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def documented():
    """The functions and classes with their own directive.

    A directive that names a module documents the module, even if a function has the same name.
    """
    found = []
    for name in DIRECTIVES:
        if not is_module(name):
            module, _, member = name.rpartition(".")
            found.append(getattr(importlib.import_module(module), member))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_function_and_class_is_in_the_reference(package):
    places = documented()
    missing = [name for name, value in exported(package).items() if not any(value is place for place in places)]
    assert not missing, f"docs/api has no directive for {package}: {', '.join(missing)}"


@pytest.mark.parametrize("module", MODULES)
def test_public_modules_are_in_the_reference(module):
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    assert module in DIRECTIVES
    for name, value in exported(module).items():
        assert value.__doc__, f"{module}.{name} has no docstring, so the reference would leave it out"


def test_every_directive_names_something_that_exists():
    modules = [name for name in DIRECTIVES if is_module(name)]
    assert sorted(modules) == sorted(MODULES)
    assert len(documented()) == len(DIRECTIVES) - len(modules)
    assert len(set(DIRECTIVES)) == len(DIRECTIVES)


def test_every_page_is_in_the_menu():
    menu = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert menu == pages | {"index.md", "contributing.md", "changelog.md", "api/cli.md"}
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text())["strict"]
