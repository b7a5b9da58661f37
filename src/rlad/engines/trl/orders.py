"""Orders between the processes of a run: the main one decides and writes, the others follow."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rlad.errors import LostProcessError


class Orders:
    """The channel from the main process to the others. With a single process nothing is sent."""

    def __init__(self) -> None:
        """Open the channel. Call this in all processes, after TRL's arguments have connected
        them."""
        self.num_processes = dist.get_world_size() if dist.is_initialized() else 1
        self.is_main = self.num_processes == 1 or dist.get_rank() == 0
        self._group: Any = None
        if self.num_processes > 1:
            # On the CPU and without a time limit: the others wait while the main one evaluates.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def share(self, order: Any = None) -> Any:
        """Send an order from the main process to the others, which wait for it here; return it in
        all processes."""
        if self._group is None:
            return order
        shared = [order]
        try:
            dist.broadcast_object_list(shared, src=0, group=self._group)
        except RuntimeError as error:
            raise (lost_process(error) or error) from None
        return shared[0]

    def wait_for_all(self) -> None:
        """Return once all processes have called this."""
        if self._group is not None:
            dist.barrier(group=self._group)


def lost_process(error: RuntimeError) -> LostProcessError | None:
    """Return the error for the end of another process; None for any other error."""
    is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    return LostProcessError() if is_lost else None
