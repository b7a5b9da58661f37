"""Run a function that may hang, raise, die or use too much memory in a separate process, so that a
failure costs one call instead of the run.

Time and memory are limited. This is not a sandbox: the process has all rights of its user.
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
    """The error of a call without a result. The message says briefly why."""


class Worker:
    """A process that runs the calls of `function`. It starts with the first call.

    `function`, `initializer` and all arguments must be picklable. `initializer()` runs whenever the
    process starts. Imports belong there, since `timeout_seconds` limits only the call, and
    `max_memory_gib` only the memory that calls use in addition (on Linux; other systems have no
    such limit). The output of a silent worker is discarded, since it may contain a model's text;
    that of others goes to standard error. Calls from several threads run one after another.
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
        """Call `function(*args)` in the process. Raises `CallFailed` if it raises, dies, or needs
        too much time or memory."""
        with self._lock:
            # If the process died between two calls, the pool is broken, which is noticed only now.
            # Try once more with a new pool.
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
        """Return (True, the value) or (False, the reason why there is none); None if the pool is
        broken."""
        from pebble import ProcessExpired, ProcessPool

        # A fork would copy the locks of threads and the accelerator state of the training process.
        self._pool = self._pool or ProcessPool(
            max_workers=1,
            initializer=_begin,
            initargs=self._initargs,
            context=multiprocessing.get_context("spawn"),  # pyright: ignore[reportArgumentType]
        )
        # pebble counts the limit from the start of the call, and then ends the process. The longer
        # wait here is for a process that hangs before that, in its imports.
        limit = self._timeout_seconds
        try:
            future = self._pool.schedule(_call_guarded, (self._function, args), timeout=limit)
            return future.result(timeout=limit + _STARTUP_SECONDS)
        except TimeoutError:
            if not future.done():  # it hung before the call, where pebble does not count
                self._stop()
            return False, f"no result within {limit:g} seconds"
        except ProcessExpired as error:
            if error.exitcode == _OUT_OF_MEMORY:
                return False, f"it needs more than {self._max_memory_gib:g} GiB of memory"
            return False, f"the process died with exit code {error.exitcode}"
        except RuntimeError:  # the pool is broken
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
    # The output may be a model's text, which must not reach the terminal. Standard output belongs
    # to the command, and may be JSON.
    if is_silent:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    else:
        os.dup2(2, 1)
    # A crash must not write a core dump to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if initializer is not None:
        initializer()
    _limit_memory(max_bytes)


def _limit_memory(num_bytes: int) -> None:
    """Limit private memory to the amount used now plus `num_bytes`. Address space that is only
    reserved, as by CUDA, does not count."""
    # RLIMIT_DATA limits private writable memory, which VmData reports. The memory of imports is
    # added to the limit. A call that needs more gets a MemoryError; otherwise the system's
    # out-of-memory killer might end the training process.
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
    """Return (True, result) or (False, the error as text). A user's exceptions may not be
    picklable."""
    try:
        return True, function(*args)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)  # memory may stay in use, so the next call gets a new process
    except BaseException as error:  # including SystemExit, which must not reach the run
        text = ""
        with contextlib.suppress(Exception):  # str() of an exception may raise
            text = str(error)
        return False, f"{type(error).__name__}: {text}"[:_MAX_REASON_CHARACTERS]
