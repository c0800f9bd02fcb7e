"""SIGTERM and Ctrl-C: finish the step, save, and say how to go on."""

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """Training was asked to stop by a signal, and its state is saved.

    Args:
        signum: The signal.
        step: Updates done.
        epoch: Finished epochs.
    """

    def __init__(self, signum: int, step: int, epoch: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}, in epoch {epoch + 1}")
        self.signum = signum


class SignalWatch:
    """Remembers the first signal; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}

    def remove(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == signum:
            raise SystemExit(128 + signum)  # Lightning would make exit code 1 of a KeyboardInterrupt
        self.received = signum
