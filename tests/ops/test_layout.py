"""The import rule of the operators' folders."""

import ast
from pathlib import Path

import pytest

from crate_kernels.ops import backends

OPS = Path(backends.__file__).parent
IMPLEMENTATIONS = backends.BACKENDS
FILES = sorted(path for path in OPS.glob("*/*.py") if path.stem in IMPLEMENTATIONS)


def imported(path: Path) -> list[str]:
    """Absolute names of all imports in the file ``path``, with relative imports resolved."""
    package = ["crate_kernels", *path.relative_to(OPS.parent).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_implementation_imports_no_other_backend_and_not_the_reference(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[:2] == ["crate_kernels", "ops"] and len(parts) > 3 and parts[3] in IMPLEMENTATIONS:
            # The same backend of another operator is allowed: ista_block/eager.py uses ista_step/eager.py.
            assert parts[3] == path.stem, f"{path} imports {name}"
            assert parts[2] != path.parent.name


def test_the_rule_sees_relative_imports():
    names = imported(OPS / "ista_block" / "eager.py")
    assert "crate_kernels.ops.ista_step.eager" in names
