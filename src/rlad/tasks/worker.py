"""Run a function that may hang, raise or die in a process of its own, so that it costs one call and not the run."""

import contextlib
import math
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessPool

_STARTUP_SECONDS = 120.0
_MAX_REASON_CHARACTERS = 200


class CallFailed(Exception):
    """The call gave no result; the message says why in a few words."""


class Worker:
    """One process that calls `function` again and again; it starts with the first call.

    `function`, `initializer` and all arguments must be picklable. `initializer(*initargs)` runs whenever the process
    starts: imports belong there, since `timeout_seconds` counts the call alone. Calls from several threads take turns.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        timeout_seconds: float,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
    ) -> None:
        if not 0 < timeout_seconds < math.inf:
            raise ValueError(f"timeout_seconds is {timeout_seconds}; give a positive number of seconds, for example 5.")
        self._function, self._timeout_seconds = function, timeout_seconds
        self._initializer, self._initargs = initializer, initargs
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None

    def call(self, *args: Any) -> Any:
        """`function(*args)` in the process; raises CallFailed when it raises, dies or takes too long."""
        with self._lock:
            try:
                is_value, result = self._call(args)
            except BrokenProcessPool:
                # A process that died between two calls breaks the pool, which shows only now: once more, with a new pool.
                try:
                    is_value, result = self._call(args)
                except BrokenProcessPool as error:
                    raise CallFailed("the process of the verifier does not start") from error
        if not is_value:
            raise CallFailed(result)
        return result

    def _call(self, args: tuple[Any, ...]) -> tuple[bool, Any]:
        pool = self._pool or self._start()
        try:
            future = pool.schedule(_call_guarded, (self._function, args), timeout=self._timeout_seconds)
        except RuntimeError as error:
            self._stop()
            raise BrokenProcessPool from error
        try:
            return future.result(timeout=self._timeout_seconds + _STARTUP_SECONDS)
        except TimeoutError as error:
            if not future.done():  # hung before the call began, where pebble does not count
                self._stop()
            raise CallFailed(f"no result within {self._timeout_seconds:g} seconds") from error
        except ProcessExpired as error:
            raise CallFailed(f"the process died with exit code {error.exitcode}") from error
        except BrokenProcessPool:
            self._stop()
            raise

    def _start(self) -> ProcessPool:
        # spawn: a fork would copy the threads' locks and the accelerator state of the training process.
        self._pool = ProcessPool(
            max_workers=1,
            initializer=self._initializer,
            initargs=self._initargs,
            context=multiprocessing.get_context("spawn"),  # pyright: ignore[reportArgumentType]
        )
        return self._pool

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            with contextlib.suppress(RuntimeError):
                pool.join()

    def close(self) -> None:
        """End the process. A later call starts a new one."""
        with self._lock:
            self._stop()


def _call_guarded(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    """(True, result), or (False, what was raised) as plain text: exceptions of the user's own may not be picklable."""
    try:
        return True, function(*args)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: they must not travel into the run
        text = ""
        with contextlib.suppress(Exception):  # an exception may be unable to say what it is
            text = str(error)
        return False, f"{type(error).__name__}: {text}"[:_MAX_REASON_CHARACTERS]
