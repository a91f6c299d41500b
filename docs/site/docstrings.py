"""A griffe extension: the docstrings' references (``:func:`name```) and literal blocks (``::``) as Markdown."""

from __future__ import annotations

import contextlib
import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([^`]+)`")


def markdown(obj: griffe.Object, text: str) -> str:
    """``text`` with links in place of roles.

    A full name of this package must have a place in the reference, or the strict build fails. A short name and a name
    of torch become links only if they have one.
    """

    def link(match: re.Match) -> str:
        name = match[1]
        if name.startswith("crate_kernels."):
            return f"[`{name}`][{unshadowed(obj.package, name)}]"
        path = name
        with contextlib.suppress(griffe.GriffeError, KeyError):
            path = obj.resolve(name)
        return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'

    text = re.sub(r"^ *::\n", "\n", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", ROLE.sub(link, text), flags=re.MULTILINE)


def unshadowed(package: griffe.Module, name: str) -> str:
    """The path of the function where a function and the module around it have the same name."""
    last = name.rpartition(".")[2]
    with contextlib.suppress(KeyError):
        found = package[name.partition(".")[2]]
        if found.is_module and last in found.members:
            return f"{name}.{last}"
    return name


class Markdown(griffe.Extension):
    """Rewrite every docstring once the package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        pending: list[griffe.Object] = [pkg]
        while pending:
            obj = pending.pop()
            if obj.docstring is not None:
                obj.docstring.value = markdown(obj, obj.docstring.value)
            pending += [member for member in obj.members.values() if not member.is_alias]
