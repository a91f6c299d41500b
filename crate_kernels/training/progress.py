"""Progress of a run: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..terminal import printable


class Report:
    """A run's progress, of ``total`` steps: ``with Report(total) as report``."""

    LINE_SECONDS = 10.0

    def __init__(self, total: int, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.total = total
        self.live = self.console.is_terminal
        self.last_line = time.monotonic()
        self.bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.description}"),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        self.bar.stop()

    def line(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def show(self, step: int, text: str) -> None:
        """Update the progress: the bar at once, plain lines from time to time."""
        if self.live:
            self.bar.update(self.task, completed=step, description=text)
        elif time.monotonic() - self.last_line >= self.LINE_SECONDS:
            self.last_line = time.monotonic()
            self.line(f"{100 * step / self.total:3.0f} %  {text}")


def clock(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss`` under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
