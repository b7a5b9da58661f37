"""Run a function that may hang, raise, die or eat memory in a process of its own, so that it costs
one call and not the run.

This bounds time and memory; it is no sandbox: the process may do what its user may do.
"""

import contextlib
import multiprocessing
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pebble import ProcessPool

MAX_MEMORY_GIB = 4.0
_STARTUP_SECONDS = 120.0
_MAX_REASON_CHARACTERS = 200
_OUT_OF_MEMORY = 77
"""exit code of a process that had no memory left"""


class CallFailed(Exception):
    """A call that gave no result; the message says why in a few words."""


class Worker:
    """A process that calls `function` again and again; it starts with the first call.

    `function`, `initializer` and all arguments must be picklable. `initializer()` runs whenever the
    process starts: imports belong there, since `timeout_seconds` counts the call alone, and
    `max_memory_gib` what calls hold beyond it (Linux; other systems count no such thing). What a
    silent one prints is thrown away: it may hold a model's text; of others it goes to standard
    error. Calls from several threads take turns.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        timeout_seconds: float,
        max_memory_gib: float = MAX_MEMORY_GIB,
        initializer: Callable[[], object] | None = None,
        is_silent: bool = False,
    ) -> None:
        self._function = function
        self._timeout_seconds = timeout_seconds
        self._max_memory_gib = max_memory_gib
        self._initargs = (initializer, int(max_memory_gib * 2**30), is_silent)
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None

    def call(self, *args: Any) -> Any:
        """Call `function(*args)` in the process; `CallFailed` when it raises, dies, takes too long
        or too much memory."""
        with self._lock:
            # A process that died between two calls breaks the pool, which shows only now: once
            # more, with a new pool.
            result = self._call(args) or self._call(args)
        is_value, value = result or (
            False,
            "the process of the verifier does not start: a script must call rlad under `if "
            "__name__ == '__main__':`",
        )
        if not is_value:
            raise CallFailed(value)
        return value

    def _call(self, args: tuple[Any, ...]) -> tuple[bool, Any] | None:
        """Return (True, the value), or (False, why there is none); None where the pool is
        broken."""
        from pebble import ProcessExpired, ProcessPool

        # spawn: a fork would copy the threads' locks and the accelerator state of the training
        # process.
        self._pool = self._pool or ProcessPool(
            max_workers=1,
            initializer=_begin,
            initargs=self._initargs,
            context=multiprocessing.get_context("spawn"),  # pyright: ignore[reportArgumentType]
        )
        # pebble counts the limit from when the call has begun, and ends the process after it. Our
        # own longer wait is for a process that hangs before that, in its imports.
        limit = self._timeout_seconds
        try:
            future = self._pool.schedule(_call_guarded, (self._function, args), timeout=limit)
            return future.result(timeout=limit + _STARTUP_SECONDS)
        except TimeoutError:
            if not future.done():  # hung before the call began, where pebble does not count
                self._stop()
            return False, f"no result within {limit:g} seconds"
        except ProcessExpired as error:
            if error.exitcode == _OUT_OF_MEMORY:
                return False, f"it needs more than {self._max_memory_gib:g} GiB of memory"
            return False, f"the process died with exit code {error.exitcode}"
        except RuntimeError:  # of a broken pool
            self._stop()
            return None

    def _stop(self) -> None:
        pool = self._pool
        self._pool = None
        if pool is not None:
            pool.stop()
            with contextlib.suppress(RuntimeError):
                pool.join()

    def close(self) -> None:
        """End the process. A later call starts a new one."""
        with self._lock:
            self._stop()


# --- in the process -------------------------------------------------------------------------------


def _begin(initializer: Callable[[], object] | None, max_bytes: int, is_silent: bool) -> None:
    # What it prints may be a model's text, which must not reach the terminal; and the standard
    # output is the command's own, which may be JSON.
    if is_silent:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    else:
        os.dup2(2, 1)
    # A process that crashes must not leave its memory on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if initializer is not None:
        initializer()
    _limit_memory(max_bytes)


def _limit_memory(num_bytes: int) -> None:
    """Allow so much more private memory than is held now. Address space that is only reserved, as
    CUDA does, does not count."""
    # RLIMIT_DATA bounds private writable memory, which VmData reports: what imports have taken is
    # added to the limit, and a call that asks for more gets a MemoryError instead of the machine's
    # out-of-memory killer choosing the training process.
    status = Path("/proc/self/status")
    if not status.is_file():
        return
    held = next(line for line in status.read_text().splitlines() if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(held.split()[1]) * 1024 + num_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _call_guarded(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Return (True, result), or (False, what was raised) as plain text: exceptions of the user's
    own may not be picklable."""
    try:
        return True, function(*args)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)  # what it holds may stay held: the next call gets a new process
    except BaseException as error:  # SystemExit too: it must not travel into the run
        text = ""
        with contextlib.suppress(Exception):  # an exception may be unable to say what it is
            text = str(error)
        return False, f"{type(error).__name__}: {text}"[:_MAX_REASON_CHARACTERS]
