"""Every module imports only from its own and lower layers, and there are no import cycles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "crate_kernels"

LAYERS = (
    {"version", "agreement", "extras", "timing", "options", "terminal", "user_cache"},
    {"ops"},
    {"nn", "selftest", "graphs"},
    {"data", "distributed", "models", "fusion", "runs"},
    {"training", "analysis", "bench", "deployment", "collect_env"},
    {"cli", "__main__"},
)
"""Modules and packages of the top level, the lowest layer first. A layer imports from itself and from lower layers."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module. A package has its own name."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a module imports, including imports in functions and for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *(node.module or "").split(".")]).rstrip(".")
            # ``from a import b`` imports the module a.b if there is one, else a name of the module a.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return (found & known.keys()) - {name}


KNOWN = modules()
GRAPH = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}


def unit(name: str) -> str:
    """The top-level module or package that contains a module. "" is the package itself."""
    return [*name.split("."), ""][1]


def layer(name: str) -> int:
    return next((i for i, members in enumerate(LAYERS) if unit(name) in members), -1)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A cycle of a graph, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_module_has_a_layer():
    assert not [name for name in KNOWN if unit(name) and layer(name) < 0]
    assert all(any((ROOT / f"{name}{end}").exists() for end in ("", ".py")) for members in LAYERS for name in members)


@pytest.mark.parametrize("name", [name for name in KNOWN if unit(name)])
def test_imports_go_down(name):
    upward = {target for target in GRAPH[name] if not unit(target) or layer(target) > layer(name)}
    assert not upward


def test_no_module_is_imported_in_a_circle():
    assert not circle(GRAPH)


def test_no_package_is_imported_in_a_circle():
    packages: dict[str, set[str]] = {}
    for name, targets in GRAPH.items():
        if unit(name):
            packages.setdefault(unit(name), set()).update(unit(target) for target in targets)
    for name, targets in packages.items():
        targets.discard(name)
    assert not circle(packages)


def test_the_rules_can_fail(tmp_path):
    root = tmp_path / "house"
    for path, text in {
        "__init__.py": "", "low/__init__.py": "from .a import x as x\n", "low/a.py": "from . import b\n",
        "low/b.py": "def f():\n    from .. import high\n", "high.py": "import house.low.a\n",
    }.items():  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    known = modules(root)
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert graph == {
        "house": set(), "house.low": {"house.low.a"}, "house.low.a": {"house.low.b"}, "house.low.b": {"house.high"},
        "house.high": {"house.low.a"},
    }  # fmt: skip
    assert set(circle(graph)) == {"house.low.a", "house.low.b", "house.high"}
