"""Numbers of all processes together, so that no average of averages is taken."""

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rlad.engines.metrics import TokenStats
from rlad.rollouts.types import Metrics


def over_processes(accelerator: Accelerator, number: Tensor) -> Tensor:
    """The sum of each process's `number` []."""
    gathered = accelerator.gather(number)
    assert isinstance(gathered, Tensor)
    return gathered.sum()


class StepStats(TokenStats):
    """What one optimiser step did with the tokens of this process."""

    num_rows = 0
    num_scored = 0

    def over_processes(self) -> Metrics:
        """Return the metrics of all processes' tokens. All of them must ask at the same time."""
        whole = StepStats()
        for part in gather_object([self]):
            for name, values in part._columns.items():
                whole._columns.setdefault(name, []).extend(values)
            whole.num_dropped += part.num_dropped
            whole.num_rows += part.num_rows
            whole.num_scored += part.num_scored
        whole.scored_share = whole.num_scored / max(whole.num_rows, 1)
        return whole.summary()
