"""Handles SIGTERM and Ctrl-C. Training finishes the step, saves, and prints how to resume. All else stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal stopped the run. Its saved files are complete. No `Exception`, so `except Exception` does not catch it.

    Args:
        signum: The signal.
        step: Updates done; None outside training.
        epoch: Number of finished epochs.
    """

    def __init__(self, signum: int, step: int | None = None, epoch: int = 0) -> None:
        place = "" if step is None else f" after step {step}, in epoch {epoch + 1}"
        super().__init__(f"stopped by {signal.Signals(signum).name}{place}")
        self.signum = signum
        self.everywhere = step is not None  # in training all ranks stop in the same step


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Makes a signal raise `Interrupted` at once, instead of the exit codes and tracebacks of Lightning's handlers.

    Raises:
        Interrupted: A signal came.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only in the main thread
        yield
        return
    process = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # Ctrl-C also reaches workers, but their parent ends them
            raise Interrupted(signum)

    before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class SignalWatch:
    """Records the first signal. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def remove(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == signum:
            raise Interrupted(signum)
        self.received = signum
