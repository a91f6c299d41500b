"""Files of JSON lines with a ``step`` in each. They never contain steps after the run's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..distributed import launch
from ..models.checkpoint import naming, write_atomically


def read_records(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; none if there is no such file.

    A process that is killed while it writes leaves at most one incomplete line, the last.
    """
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """The metrics of a run. Only rank 0 writes.

    Args:
        path: the file.
        step: the present step of the run. Later lines are dropped, because the resumed run repeats these steps.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if not launch.is_main():
            return
        kept = [line for line in read_records(path) if line["step"] <= step] if step else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, **values) -> None:
        if launch.is_main():
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
