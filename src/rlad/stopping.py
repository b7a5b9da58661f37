"""Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal: the first signal asks the run to stop at the next
safe point, the second stops it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(BaseException):
    """The end of a run at a safe point after a signal: no weight is half updated there.

    Like `KeyboardInterrupt` it is not an `Exception`, so that no library handles it as its own
    failure and continues.
    """

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)


class Stop:
    """The signal that has come, until the run asks for it with `check`."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_at_once = False

    def check(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        if self._signal is not None:
            raise StopRequested(self._signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal raise immediately inside the block, for work that may be left half done,
        such as loading models."""
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Catch SIGINT, SIGTERM, SIGHUP and SIGUSR1 (Slurm's warning) inside the block (main thread
        only), where they are not ignored."""

        def remember(number: int, frame: FrameType | None) -> None:
            self._signal = number
            restore()  # a second signal acts as it did before
            if self._is_at_once:
                raise StopRequested(number)

        def restore() -> None:
            for each, handler in former.items():
                signal.signal(each, handler)

        former = {
            each: handler
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
            if (handler := signal.getsignal(each)) is not signal.SIG_IGN
        }
        try:
            for each in former:
                signal.signal(each, remember)
            yield
        finally:
            restore()
