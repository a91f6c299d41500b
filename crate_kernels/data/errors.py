"""Errors about data, in one sentence each."""

from __future__ import annotations

import sys
from collections.abc import Iterable

SHOWN = 10
"""Number of broken images that are named. Further ones are only counted."""


class DataError(ValueError):
    """Data that cannot be used. The message names the file or folder and what is expected there."""


class Broken:
    """The broken images that this rank has found, each one once.

    Attributes:
        found: one sentence for each image.
    """

    def __init__(self):
        self.found: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.found)

    def note(self, sentences: Iterable[str], most: int | None) -> None:
        """Count broken images, and name the first ones.

        Raises:
            DataError: there are more than ``most``.
        """
        for sentence in sentences:
            if sentence in self.found:
                continue
            self.found[sentence] = None
            if most is not None and len(self) > most:
                more = f"; these are {len(self)}, and --max-broken is {most}" if most else ""
                raise DataError(sentence + more)
            if len(self) <= SHOWN:
                print(f"broken: {sentence}" + ("; no more are named" if len(self) == SHOWN else ""), file=sys.stderr)
