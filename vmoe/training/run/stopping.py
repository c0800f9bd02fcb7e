"""SIGTERM and Ctrl-C: in training, finish the step, save, and say how to go on; before and after it, stop at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A run was asked to stop by a signal; what it had saved is whole. No Exception: what catches any mistake must not
    catch this.

    Args:
        signum: The signal.
        step: Updates done; None outside training.
        epoch: Finished epochs.
    """

    def __init__(self, signum: int, step: int | None = None, epoch: int = 0) -> None:
        place = "" if step is None else f" after step {step}, in epoch {epoch + 1}"
        super().__init__(f"stopped by {signal.Signals(signum).name}{place}")
        self.signum = signum
        self.everywhere = step is not None  # all processes stop in the same step


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """A signal raises `Interrupted`, wherever it comes: not Lightning's handlers' exit codes and tracebacks.

    Raises:
        Interrupted: a signal came.
    """
    if threading.current_thread() is not threading.main_thread():  # where Python takes no handler
        yield
        return
    process = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # Ctrl-C also comes to workers, which their parent ends
            raise Interrupted(signum)

    before = {signum: signal.signal(signum, stop) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class SignalWatch:
    """Remembers the first signal; a second Ctrl-C interrupts at once."""

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
