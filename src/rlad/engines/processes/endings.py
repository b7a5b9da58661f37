"""How one of several processes says what ended it, and which of their reasons is the reason."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rlad.engines.processes.requirements import num_ranks
from rlad.errors import EXIT_SIGNAL, RunFailedError, exit_code

LAUNCHED, ERROR_FILE = "RLAD_LAUNCHED", "TORCHELASTIC_ERROR_FILE"
"""Set in the ranks of `rlad train --launch`, and (by torchrun too) the file for what ends a rank."""

_LOST = "RankLostError"


@contextmanager
def told_to_the_launcher() -> Iterator[None]:
    """Around the work of a process that may be a rank: what ends it is left where torchrun and `--launch` look for it.

    A rank of `--launch` says nothing itself of what a user can understand; one of torchrun says which it is.
    """
    try:
        yield
    except Exception as error:
        if LAUNCHED not in os.environ and num_ranks() == 1:
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        sentence = _sentence(error)
        get_error_handler().record_exception(sentence or error)
        if sentence is None:
            raise
        if LAUNCHED in os.environ:
            sys.exit(exit_code(sentence))
        raise type(sentence)(f"rank {os.environ['RANK']} of {num_ranks()}: {error}") from None


def _sentence(error: Exception) -> ValueError | None:
    """The error as one of the kinds that `conclude` knows; None for one that is nobody's mistake but ours."""
    if type(error).__name__ == _LOST:
        return error  # pyright: ignore[reportReturnType]
    if isinstance(error, RunFailedError):
        return RunFailedError(str(error))
    return ValueError(str(error)) if isinstance(error, ValueError) else None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rank has ended; `kind` and `text` are those of the exception that it left, if it left one."""

    rank: int
    code: int
    kind: str = ""
    text: str = ""
    was_killed_here: bool = False

    @classmethod
    def of(cls, rank: int, code: int, error_file: Path, *, was_killed_here: bool) -> Self:
        try:
            message = json.loads(error_file.read_text(encoding="utf-8"))["message"]["message"]
        except (OSError, ValueError, KeyError, TypeError):
            message = ""
        kind, _, text = message.partition(": ")
        return cls(rank, code, kind, text, was_killed_here)

    @property
    def is_a_reason(self) -> bool:
        """Not merely what another one's end has brought about."""
        return self.code != 0 and self.kind != _LOST and not self.was_killed_here


def conclude(endings: Sequence[Ending], run_dir: Path) -> int:
    """The exit code of ranks that have ended well or by a signal that they obeyed. Raises what ended them otherwise."""
    failed = [ending for ending in endings if ending.code != 0]
    if not failed:
        return 0
    first = next((ending for ending in failed if ending.is_a_reason), failed[0])
    if first.code > EXIT_SIGNAL:
        return first.code
    number = len(endings)
    if first.code < 0:
        name = signal.Signals(-first.code).name
        hint = " (as the system does when memory runs out)" if -first.code == signal.SIGKILL else ""
        raise RunFailedError(
            f"rank {first.rank} of {number} was ended by {name}{hint}, and the others with it; go on from the last checkpoint "
            f"with the same command and --resume, if {run_dir} holds one."
        )
    if first.kind not in ("ValueError", "RunFailedError", _LOST):
        what = f"{first.kind}: {first.text}" if first.kind else f"exit code {first.code}"
        raise RunFailedError(f"rank {first.rank} of {number} failed ({what}); what it said stands above.")
    kind = ValueError if first.kind == "ValueError" else RunFailedError
    of_all = all(ending.text == first.text for ending in endings)
    raise kind(first.text if of_all or first.kind == _LOST else f"rank {first.rank} of {number}: {first.text}")
