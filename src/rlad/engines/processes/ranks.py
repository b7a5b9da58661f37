"""Several processes of one run, its ranks: who does which part, and how an error or a signal of one becomes that of all.

What a rank does by itself (sampling, judging, asking the teacher) stands inside `together`; a rank that dies elsewhere ends
the others with `RankLostError` at the next thing that they do with it.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlad.config.run import RunConfig
from rlad.engines.processes.requirements import num_ranks, require_possible, uses_gpus
from rlad.errors import RunFailedError
from rlad.rollouts.types import Metrics
from rlad.runs.directory import CannotWriteError
from rlad.stopping import StopRequested

T = TypeVar("T")

DEFAULT_TIMEOUT_SECONDS = 1800
"""TRL's ddp_timeout: how long a rank waits for the others."""


class RankLostError(RunFailedError):
    """Another rank has died or does not answer."""


class Ranks:
    """A process alone, rank 0 of 1. `SeveralRanks` offers the same to one of several."""

    index, number = 0, 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, number: int) -> range:
        """This rank's part of `number` things: the parts of all ranks, in their order, are all of them."""
        return range(number * self.index // self.number, number * (self.index + 1) // self.number)

    def together(self, what: str, work: Callable[[], T]) -> T:
        """This rank's `work`; a `ValueError` or `StopRequested` in that of any rank is raised on all of them."""
        return work()

    def from_first(self, what: str, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it, on every rank; what it raises there is raised on all."""
        return work()

    def to_first(self, what: str, values: Sequence[T]) -> list[T]:
        """On rank 0 the values of all ranks in their order; on the others their own."""
        return list(values)

    def agree(self, check: Callable[[], None]) -> None:
        """`check`, which may raise `StopRequested`: where it does so on one rank, it does on all of them."""
        check()

    def largest(self, what: str, values: Metrics) -> Metrics:
        """Of each value, the largest of any rank; all ranks must have the same keys."""
        return values

    def all_raise(self, error: BaseException) -> bool:
        """Whether every rank raises this error, at the same place."""
        return True

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Around work that the ranks do jointly, not through this class."""
        yield


ALONE = Ranks()


class SeveralRanks(Ranks):
    """One of several. Its messages go through the CPU (gloo), whatever moves the gradients."""

    def __init__(self, *, timeout_seconds: float):
        self.index, self.number = dist.get_rank(), dist.get_world_size()
        self.timeout = timedelta(seconds=timeout_seconds)
        self.group: Any = dist.new_group(backend="gloo", timeout=self.timeout)
        self.shared: BaseException | None = None

    def together(self, what: str, work: Callable[[], T]) -> T:
        result, outcome = _outcome(work)
        with self._waiting(what):
            dist.monitored_barrier(self.group, timeout=self.timeout, wait_all_ranks=True)
            outcomes: list[Any] = [None] * self.number
            dist.all_gather_object(outcomes, outcome, group=self.group)
        failed = [rank for rank in range(self.number) if outcomes[rank]]
        if failed:
            first = next((rank for rank in failed if outcomes[rank][0] is not StopRequested), failed[0])
            self._raise(outcomes[first], rank=None if outcomes.count(outcomes[first]) == self.number else first)
        return result  # pyright: ignore[reportReturnType]

    def from_first(self, what: str, work: Callable[[], T]) -> T:
        message = [_outcome(work) if self.is_first else None]
        with self._waiting(what):
            dist.broadcast_object_list(message, src=0, group=self.group)
        assert message[0] is not None
        result, outcome = message[0]
        if outcome:
            self._raise(outcome, rank=None)
        return result  # pyright: ignore[reportReturnType]

    def to_first(self, what: str, values: Sequence[T]) -> list[T]:
        lists: Any = [None] * self.number if self.is_first else None
        with self._waiting(what):
            dist.gather_object(list(values), lists, dst=0, group=self.group)
        return [value for part in lists for value in part] if self.is_first else list(values)

    def agree(self, check: Callable[[], None]) -> None:
        _, outcome = _outcome(check)
        signal_number = torch.tensor(outcome[1] if outcome else 0)
        with self._waiting("the next micro-batch"):
            dist.all_reduce(signal_number, dist.ReduceOp.MAX, group=self.group)
        if signal_number:
            self._raise((StopRequested, int(signal_number)), rank=None)

    def largest(self, what: str, values: Metrics) -> Metrics:
        column = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64)
        with self._waiting(what):
            dist.all_reduce(column, dist.ReduceOp.MAX, group=self.group)
        return dict(zip(sorted(values), column.tolist(), strict=True))

    def all_raise(self, error: BaseException) -> bool:
        return error is self.shared

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise self._lost(what, error) from None
            raise

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise self._lost(f"{what}, after {time.monotonic() - started:.0f} s of waiting", error) from None

    def _lost(self, what: str, error: RuntimeError) -> RankLostError:
        reason = str(error).strip().splitlines()[0]
        return RankLostError(f"rank {self.index} of {self.number} lost another rank at {what}: {reason}")

    def _raise(self, outcome: tuple[Any, Any], *, rank: int | None) -> None:
        """Raise what happened, naming the rank where it happened on that one alone."""
        kind, content = outcome
        error = kind(content if rank is None or kind is StopRequested else f"rank {rank}: {content}")
        self.shared = error
        raise error


def _outcome(work: Callable[[], T]) -> tuple[T | None, tuple[Any, Any] | None]:
    """What `work` returned, or what kind of error it raised and with what: errors themselves need not survive a pickle."""
    try:
        return work(), None
    except StopRequested as stopped:
        return None, (StopRequested, stopped.signal_number)
    except ValueError as error:
        if isinstance(error, RankLostError):
            raise
        kinds = (CannotWriteError, RunFailedError)
        return None, (next((kind for kind in kinds if isinstance(error, kind)), ValueError), str(error))


@contextmanager
def ranks_of(config: RunConfig) -> Iterator[Ranks]:
    """This process among those that torchrun, accelerate or `rlad train --launch` started; alone where there is but one.

    Raises `ValueError` when this run cannot be made by so many, or when they cannot meet.
    """
    require_possible(config, num_ranks())
    if num_ranks() == 1:
        yield ALONE
        return
    gpus, timeout = uses_gpus(config), config.engine.trl.get("ddp_timeout", DEFAULT_TIMEOUT_SECONDS)
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"the {num_ranks()} processes cannot meet at {place} ({str(error).splitlines()[0]}); give another port "
            "(--port of `rlad train --launch`, --master-port of torchrun)."
        ) from None
    ranks = SeveralRanks(timeout_seconds=timeout)
    yield ranks
    # Not after an error: the others may be gone, and to say goodbye would mean to wait for them.
    dist.destroy_process_group()
