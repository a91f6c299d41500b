"""Ctrl-C and SIGTERM during a run: the step in progress is finished and saved, then the process ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from ..distributed import launch


class Interrupted(KeyboardInterrupt):
    """A signal ends the run.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        """The exit code that shells expect."""
        self.reported = False
        """Whether the user was told how to resume, so that nothing more is to be said."""


class Interrupts:
    """Handles the signals: ``with Interrupts() as interrupts``.

    A signal raises :class:`Interrupted` immediately. Within :meth:`deferred` it is only recorded in ``received``, and
    the training loop ends after its step. A second signal ends a single process at once. Under
    torchrun a signal may come twice, from the terminal and from torchrun, so there the second one is ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record a signal that arrives in the block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self.received = bool(self.received), number
        if repeated and launch.launched():
            return
        if repeated or not self._deferred:
            raise Interrupted(number)
