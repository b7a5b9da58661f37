"""A teacher whose weights are sharded over the processes (torch's FSDP2). Each process holds its
shard and gathers one layer at a time."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from rlad.models.loading import LanguageModel
from rlad.scoring.scorer import Scorer, TokenIds
from rlad.teachers.local import ScoringTeacher


def split_over_processes(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard the weights over the mesh's devices. Layers are gathered one by one, and freed after
    use."""
    # The unit that is gathered is a block of the model: the classes that transformers declares as
    # not to be split. The rest (embeddings, head) is gathered with the model itself.
    blocks = [
        module
        for module in model.modules()
        if type(module).__name__ in (model._no_split_modules or ())
    ]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


class ShardedScorer(Scorer):
    """A scorer whose `score` is a collective call: all processes call it at the same time, each
    with its own number of completions."""

    def __init__(self, language_model: LanguageModel, *, device_type: str, **scoring: Any):
        """Split a model whose weights should still be on the CPU."""
        super().__init__(language_model, **scoring)
        self._compares_neighbours = False  # an extra pass of one process would wait for ever
        # Weights are complete only within the model's own forward pass, so log-probs are computed
        # there.
        add_fused_lm_head(self.model, temperature=self.temperature)
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
        split_over_processes(self.model, mesh)
        self.group = mesh.get_group()

    def _token_scores(
        self, inputs: dict[str, Any], predicts: Tensor, targets: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor]:
        # The fused head takes labels at the predicting positions, and skips all others (-100).
        labels = torch.full_like(inputs["input_ids"], -100).masked_scatter(predicts, targets)
        with self.language_model.autocast():
            output = self.model(**inputs, shift_labels=labels, fused_lm_head=True)
        logprobs = output.log_probs[predicts]
        return logprobs, torch.full_like(logprobs, torch.nan)

    @torch.no_grad()
    def score(self, prompts: Sequence[TokenIds], completions: Sequence[TokenIds]) -> list[Tensor]:
        # Every forward pass gathers weights from all processes, so all processes must make the same
        # number of passes. A process with less to score makes empty passes at the end; otherwise
        # the others would wait for ever.
        own = len(self.batches(prompts, completions))
        most = torch.tensor(own, device=self.model.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        results = super().score(prompts, completions)
        for _ in range(int(most) - own):
            self([[0]], [[0]], with_entropy=False)
        return results


class ShardedTeacher(ScoringTeacher):
    """A frozen local model over all processes. `logprobs` is a collective call."""

    def __init__(self, language_model: LanguageModel, **scoring: Any):
        """Take in `scoring` the arguments of a `ShardedScorer` besides the model."""
        language_model.model.requires_grad_(False)
        super().__init__(language_model.name, ShardedScorer(language_model, **scoring))
