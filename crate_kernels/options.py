"""Options of the commands: dataclass fields with help text, range, and the condition under which they apply."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

LARGEST = 2**31 - 1
"""Largest integer that an option accepts by default."""

GROUPS = ("options", "data", "model", "optimization", "machine", "ranks and memory", "measurement", "output")
"""The headings of the help, in order."""

METAVARS = {"int": "N", "float": "X", "str": "TEXT"}

PATHS = {
    "data": "NAME_OR_PATH", "root": "PATH", "text": "PATH", "init": "PATH", "output": "PATH", "results": "PATH",
    "classes": "PATH", "index": "PATH_OR_URL",
}  # fmt: skip
"""What the help prints as the value of an option with one of these names, in every command."""

Condition = tuple[str, Callable[[Any], bool]]
"""Condition under which an option applies: a text for the user, and a function of the settings."""


def option(
    default: Any,
    text: str,
    group: str = "options",
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: Iterable[str] | None = None,
    only: Condition | None = None,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: None stands for "not set".
        text: one line of help.
        group: heading of the option in the help.
        least, above, most, below: the range of a number.
        choices: the values of a word.
        only: the condition under which the option applies. Otherwise it is refused.
    """
    limits = dict(least=least, above=above, most=most, below=below)
    choices = None if choices is None else tuple(choices)
    return dataclasses.field(
        default=default, metadata=dict(help=text, group=group, limits=limits, choices=choices, only=only)
    )


def fields(kind: Any) -> list[dataclasses.Field]:
    """The fields of a dataclass that are options. Other fields are recorded, but have no command-line argument."""
    return [field for field in dataclasses.fields(kind) if field.metadata]


def flag(name: str) -> str:
    """The option's name on the command line."""
    return "--" + name.replace("_", "-")


def type_name(field: dataclasses.Field) -> str:
    """``"int"``, ``"float"``, ``"str"`` or ``"bool"``."""
    return str(field.type).removesuffix(" | None")


# -- checks ------------------------------------------------------------------------------------------------------------


def check(settings: Any, given: Iterable[str] = ()) -> None:
    """Raise ValueError for a value that an option does not accept; the message names the option and its range.

    Args:
        settings: a dataclass of options.
        given: names of the options that the user gave. Those that do not apply are refused.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None:
            check_value(field, value)
    given = set(given)
    for field in fields(settings):
        only = field.metadata["only"]
        if field.name in given and only is not None and not only[1](settings):
            raise ValueError(f"{flag(field.name)} applies only {only[0]}")


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Check one value, which is not None."""
    name, kind, limits = flag(field.name), type_name(field), field.metadata["limits"]
    if kind == "str":
        choices = field.metadata["choices"]
        if choices is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value}")
        if not value:
            raise ValueError(f"{name} must not be empty")
        if "\0" in value or not _is_utf8(value):
            raise ValueError(f"{name} must be UTF-8 text without zero bytes, got {value!r}")
    elif kind == "float" and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    elif kind == "int" and limits["most"] is None and limits["below"] is None and abs(value) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got {value}")
    if kind in ("int", "float") and not within(value, limits):
        raise ValueError(f"{name} must {range_in_words(limits)}, got {value}")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def within(value: float, limits: Mapping[str, float | None]) -> bool:
    """Whether a number lies in a range."""
    return not (
        (limits["least"] is not None and value < limits["least"])
        or (limits["above"] is not None and value <= limits["above"])
        or (limits["most"] is not None and value > limits["most"])
        or (limits["below"] is not None and value >= limits["below"])
    )


def range_in_words(limits: Mapping[str, float | None]) -> str:
    """``"lie in 0..1"`` and the like, after "must"."""
    least, above, most, below = (limits[name] for name in ("least", "above", "most", "below"))
    if least is not None and most is not None:
        return f"lie in {least}..{most}"
    parts = [
        f"{word} {bound}"
        for word, bound in (("at least", least), ("above", above), ("at most", most), ("below", below))
        if bound is not None
    ]
    return "be " + " and ".join(parts)


def check_output_file(path: Path) -> None:
    """Raise ValueError if ``path``, the value of ``--output`` or its default, cannot become a file."""
    if path.is_dir():
        raise ValueError(f"--output must be a file, and {path} is a folder")
    if above := next((parent for parent in path.parents if parent.is_file()), None):
        raise ValueError(f"--output {path} is in no folder: {above} is a file")


DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device(value: str) -> None:
    """Raise ValueError for a misspelled or missing device."""
    import torch

    if not DEVICE.fullmatch(value):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {value}")
    if value.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(value.partition(":")[2] or 0) >= count:
            raise ValueError(f"--device {value} is not there: torch sees {count} CUDA devices")


# -- the command line --------------------------------------------------------------------------------------------------


def add_arguments(
    parser: argparse.ArgumentParser, kind: type, variants: Mapping[str, Any] | None = None, needed: str = ""
) -> None:
    """Add an argument for each option of ``kind``. Missing arguments are not in the parsed namespace.

    Args:
        variants: settings whose defaults the help shows. The label "" is the bare command; other labels are data sets,
            models and so on.
        needed: required arguments, in the form of the usage line.
    """
    variants = {"": kind()} if variants is None else variants
    parser.usage = " ".join(filter(None, ("%(prog)s", needed, "[options]")))
    groups: dict[str, Any] = {GROUPS[0]: parser}  # argparse's own group, with --help, has this title
    for field in sorted(fields(kind), key=lambda field: GROUPS.index(field.metadata["group"])):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        keywords: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%")}
        if type_name(field) == "bool":
            keywords["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
        else:
            keywords["type"] = {"int": int, "float": float, "str": str}[type_name(field)]
            keywords["choices"] = field.metadata["choices"]
            usual = PATHS.get(field.name, METAVARS[type_name(field)])
            keywords["metavar"] = "NAME" if keywords["choices"] else usual
            if keywords["choices"] and not all(choice in keywords["help"] for choice in keywords["choices"]):
                keywords["help"] += f": {', '.join(keywords['choices'])}"
            keywords["help"] += default_in_words(field.name, variants).replace("%", "%%")
        groups[title].add_argument(flag(field.name), dest=field.name, default=argparse.SUPPRESS, **keywords)


def default_in_words(name: str, variants: Mapping[str, Any]) -> str:
    """``" (default 30; cifar10: 100)"``: the default of the bare command, and the variants that differ from it."""
    values = {label: getattr(settings, name) for label, settings in variants.items()}
    usual = values.pop("")
    others: dict[Any, list[str]] = {}
    for label, value in values.items():
        if value not in (usual, label):
            others.setdefault(value, []).append(label)
    parts = [] if usual is None else [f"default {usual}"]
    parts += [f"{', '.join(labels)}: {'none' if value is None else value}" for value, labels in others.items()]
    return f" ({'; '.join(parts)})" if parts else ""


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The options of ``kind`` that are on the command line, with their values."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names}


def parse(args: argparse.Namespace, kind: type) -> Any:
    """The checked options of ``kind``: values from the command line, and defaults for all others."""
    options = given(args, kind)
    settings = kind(**options)
    check(settings, options)
    return settings
