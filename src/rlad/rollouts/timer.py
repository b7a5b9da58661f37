"""How long each part of a piece of work took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timer:
    """Seconds by part. Time of a part within another one counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        key = f"time/{part}/seconds"
        started = time.monotonic()
        counted = sum(self.seconds.values())
        yield
        inner = sum(self.seconds.values()) - counted
        own = time.monotonic() - started - inner
        self.seconds[key] = self.seconds.get(key, 0.0) + own
