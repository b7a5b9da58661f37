"""The run directory as the other ranks have it: they read, and rank 0 writes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlad.runs.directory import RunDirectory


class FollowersRun(RunDirectory):
    """Every way of writing does nothing."""

    def require_free(self, *, overwrite: bool) -> None:
        pass

    def clear(self) -> None:
        pass

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def delete(self, name: str) -> None:
        pass

    def write(self, name: str, content: str | bytes) -> None:
        pass

    def append(self, name: str, row: dict[str, Any]) -> None:
        pass

    def forget_after(self, step: int) -> None:
        pass

    def set_aside_after(self, checkpoint: Path) -> None:
        pass

    def keep(self, *, last: int, best: int) -> None:
        pass

    def write_checkpoint(
        self, step: int, write: Callable[[Path], None], *, run_digest: str, with_rollouts: bool = False
    ) -> None:
        write(self.path)  # its share of the folder that rank 0 has made
