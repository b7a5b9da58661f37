"""Numbers of all processes together, so that no average of averages is taken."""

import torch
from accelerate import Accelerator
from torch import Tensor

from rlad.engines.metrics import TokenStats
from rlad.objectives.inputs import LossInputs
from rlad.objectives.masks import per_token
from rlad.rollouts.types import Metrics


def over_processes(accelerator: Accelerator, number: Tensor) -> Tensor:
    """The sum of each process's `number` []."""
    gathered = accelerator.gather(number)
    assert isinstance(gathered, Tensor)
    return gathered.sum()


class WindowStats:
    """Collects what one optimiser step did with its tokens; every process must add the same number
    of micro-batches."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.tokens = TokenStats()
        self.num_rows = self.num_scored = 0
        self.knows_sampler = False

    def add(
        self,
        batch: LossInputs,
        trained: Tensor,
        counted: Tensor,
        entropy: Tensor,
        sampled: Tensor | None,
        stats: dict[str, Tensor],
    ) -> None:
        """Every tensor `[batch, token]`: the tokens with a say in the gradient, those that the
        denominator counts, and the log-probs that the sampler reported (None where it gave none).
        """
        self.knows_sampler = sampled is not None
        given = {
            "mask": batch.mask,
            "trained": trained,
            "counted": counted,
            "old": batch.old_logprobs,
            "advantages": per_token(batch.advantages, batch.mask),
            "entropy": entropy,
            "sampled": batch.old_logprobs if sampled is None else sampled,
        }
        own = {f"own {name}": value for name, value in stats.items()}
        columns = self._of_all_processes(given | own)
        mask = columns["mask"].bool()
        has_a_say = columns["trained"].bool()
        everything = LossInputs(
            student_logprobs=columns["old"],
            old_logprobs=columns["old"],
            advantages=columns["advantages"],
            mask=has_a_say,
        )
        own = {name.removeprefix("own "): columns[name] for name in own}
        self.tokens.add(everything, columns["entropy"], columns["sampled"], own)
        self.tokens.num_dropped += int((mask & ~columns["counted"].bool()).sum())
        self.num_rows += len(mask)
        self.num_scored += int(has_a_say.any(dim=1).sum())

    def _of_all_processes(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors with the rows of every process, in one exchange."""
        shape = columns["mask"].shape
        # Processes have completions of different lengths, so each is padded to the longest one
        # first.
        packed = torch.stack(
            [values.detach().expand(shape).float() for values in columns.values()], dim=-1
        )
        packed = self.accelerator.gather(self.accelerator.pad_across_processes(packed, dim=1))
        assert isinstance(packed, Tensor)
        return dict(zip(columns, packed.unbind(dim=-1), strict=True))

    def summary(self) -> Metrics:
        self.tokens.scored_share = self.num_scored / max(self.num_rows, 1)
        metrics = self.tokens.summary()
        return {
            k: v for k, v in metrics.items() if self.knows_sampler or not k.startswith("sampler/")
        }
