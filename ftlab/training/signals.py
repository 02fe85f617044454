"""SIGTERM and Ctrl-C: stop at the next safe point, or at once where nothing can be lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopSignal"]


class Interrupted(BaseException):
    """The run was asked to stop; `exit_code` is 128 + the signal's number.

    Like KeyboardInterrupt no Exception, so that code which turns any failure into a message does not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopSignal:
    """Catches SIGTERM and SIGINT while it is entered.

    Inside `deferred` the first signal is only noted in `received`; a second one, or one outside, raises Interrupted.
    Inside `ignored` every signal is only noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = self._ignoring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first = self.received is None
        self.received = signum
        if not (self._ignoring or (self._deferring and first)):
            raise Interrupted(signum)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a signal instead of raising; the caller looks at `received` at its safe points."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `deferred`: raise again, also for a signal already noted. For work that a restart simply repeats."""
        before, self._deferring = self._deferring, False
        try:
            if self.received is not None:
                raise Interrupted(self.received)
            yield
        finally:
            self._deferring = before

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Finish this whatever comes; for the last writes of a run."""
        self._ignoring = True
        try:
            yield
        finally:
            self._ignoring = False
