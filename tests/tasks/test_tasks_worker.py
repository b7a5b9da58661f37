import os
import signal
import threading
import time
from functools import partial

import pytest

from rlad.tasks.worker import CallFailed, Worker


def square(number: int) -> int:
    return number * number


def sleep_then(seconds: float, value: str) -> str:
    time.sleep(seconds)
    return value


def slow_start(seconds: float) -> None:
    time.sleep(seconds)


def failing_start() -> None:
    os._exit(1)


def process_id() -> int:
    return os.getpid()


@pytest.fixture
def make_worker():
    workers = []

    def make(*args, **kwargs) -> Worker:
        workers.append(Worker(*args, **kwargs))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_one_process_makes_all_calls_and_close_ends_it(make_worker):
    worker = make_worker(process_id, timeout_seconds=5)
    pid = worker.call()
    assert pid != os.getpid()
    assert worker.call() == pid
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert worker.call() != pid  # a call after close starts again


def test_a_timeout_costs_one_call(make_worker):
    worker = make_worker(sleep_then, timeout_seconds=0.3)
    started = time.monotonic()
    with pytest.raises(CallFailed, match=r"no result within 0\.3 seconds"):
        worker.call(60, "never")
    assert time.monotonic() - started < 5
    assert worker.call(0, "next") == "next"


def test_the_time_to_start_does_not_count(make_worker):
    worker = make_worker(square, timeout_seconds=0.2, initializer=partial(slow_start, 0.8))
    assert worker.call(7) == 49


def test_a_process_that_is_killed_between_calls_is_replaced(make_worker):
    worker = make_worker(process_id, timeout_seconds=5)
    pid = worker.call()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)  # long enough for the pool to notice
    assert worker.call() != pid


def test_a_process_that_cannot_start_fails_the_call(make_worker):
    worker = make_worker(square, timeout_seconds=5, initializer=failing_start)
    with pytest.raises(
        CallFailed, match="does not start: a script must call rlad under `if __name__"
    ):
        worker.call(1)


def test_threads_take_turns(make_worker):
    worker = make_worker(square, timeout_seconds=5)
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: worker.call(n)})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: n * n for n in range(8)}
