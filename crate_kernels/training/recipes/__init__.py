"""Recipes: the options of a training command in a file, as a paper gives them. ``--recipe NAME_OR_FILE``.

::

    command = "train"                # the command the options are of
    data = "ImageNet-1K"             # what it reads, to be given with --data (train-text: --text)
    parameters = 22_796_008          # trained parameters of the full-size model
    source = "arXiv 2306.01129"
    [model]                          # the full size
    [training]                       # optimizer, schedule, augmentation: at every size
    [smoke]                          # --smoke takes these instead of [model], and over [training]

The keys in the tables are the command's options with underscores. What the command line gives goes before the file.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPES = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,)}
"""Type of an option -> the types its value in a file may have."""


@dataclass(frozen=True)
class Recipe:
    """The content of a file; see above."""

    command: str
    data: str
    parameters: int
    source: str
    model: dict[str, Any]
    training: dict[str, Any]
    smoke: dict[str, Any]

    def options(self, smoke: bool = False) -> dict[str, Any]:
        """The options of the run: of the full size, or of the small one that only shows that the recipe works."""
        return self.training | (self.smoke if smoke else self.model)


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.toml"))


def read(name: str) -> Recipe:
    """The recipe of that name, or in the file at that path.

    Raises:
        ValueError: there is none, or the file is no recipe.
    """
    path = Path(__file__).with_name(f"{name}.toml") if name in names() else Path(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--recipe {name}: no such file, nor one of {', '.join(names())}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error
    fields = {field.name: str(field.type) for field in dataclasses.fields(Recipe)}
    if content.keys() != fields.keys():
        differ = sorted(content.keys() ^ fields.keys())
        raise ValueError(f"{path} must have the keys {', '.join(fields)} and no others; see {', '.join(differ)}")
    for key, value in content.items():
        expected = dict if fields[key].startswith("dict") else TYPES[fields[key]]
        if not isinstance(value, expected):
            raise ValueError(f"{path}: {key} must be of type {fields[key]}, got {value!r}")
    return Recipe(**content)


def options(name: str, command: str, kind: type, smoke: bool = False) -> dict[str, Any]:
    """The options that a recipe gives to ``command``, whose settings are the dataclass ``kind``.

    Raises:
        ValueError: the recipe is for another command, has an unknown option, or gives an option a wrong value.
    """
    recipe = read(name)
    if recipe.command != command:
        raise ValueError(f"--recipe {name} is a recipe of crate-kernels {recipe.command}, not of {command}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for table in (recipe.model, recipe.training, recipe.smoke):
        for key, value in table.items():
            if key not in fields:
                raise ValueError(f"--recipe {name}: {key} is not an option of crate-kernels {command}")
            expected = str(fields[key].type).removesuffix(" | None")
            # Python accepts a bool as an int. The author of a file probably did not mean that.
            if not isinstance(value, TYPES[expected]) or isinstance(value, bool) != (expected == "bool"):
                raise ValueError(f"--recipe {name}: {key} must be of type {expected}, got {value!r}")
            choices = fields[key].metadata.get("choices")
            if choices is not None and value not in choices:
                raise ValueError(f"--recipe {name}: {key} must be one of {', '.join(choices)}, got {value!r}")
    return recipe.options(smoke)
