"""Batches of token log-probs as verl hands them to a loss, and through its own loss. Also a
program, for verl's environment:

PYTHON tests/verl_batches.py FILE OBJECTIVE

FILE holds a list of batches, and then what verl made of each.
"""

import json
import os
import sys
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig

from rlad.engines.verl.objective import VARIABLE

Batch = dict[str, Any]
"""`student`, `old`, `teacher`, `reference`, `advantages`, `weights`, `mask`, all `[row, token]`,
and the `prompts` and `responses` of the rows: their numbers of tokens."""


def inside(batch: Batch) -> Tensor:
    """The tokens of the responses, `[row, token]`."""
    return (
        torch.arange(max(batch["responses"]))[None, :] < torch.tensor(batch["responses"])[:, None]
    )


def sequences(batch: Batch, values: Tensor, rows: list[int]) -> Tensor:
    """Response log-probs as verl's model gives them: whole sequences in one jagged tensor, each
    value one token early."""
    pieces = [
        torch.cat(
            [
                values.new_full((batch["prompts"][i] - 1,), 99.0),
                values[i, : batch["responses"][i]],
                values.new_full((1,), -99.0),
            ]
        )
        for i in rows
    ]
    return torch.nested.as_nested_tensor(pieces, layout=torch.jagged)


def responses(batch: Batch, values: Tensor, rows: list[int]) -> Tensor:
    return torch.nested.as_nested_tensor(
        [values[i, : batch["responses"][i]] for i in rows], layout=torch.jagged
    )


def micro_batch(
    batch: Batch, rows: list[int], *, dp_size: int, padded: bool = False, drop: str = ""
) -> TensorDict:
    """Some rows as verl hands them to its loss function, jagged or (`padded`) as tensors with an
    attention mask."""
    mask = batch["mask"].long()
    longest = max(batch["prompts"])
    prompts = torch.nested.as_nested_tensor(
        [torch.zeros(batch["prompts"][i], dtype=torch.long) for i in rows], layout=torch.jagged
    )
    fields = {
        "prompts": prompts,
        "responses": responses(batch, torch.zeros_like(mask), rows),
        "response_mask": responses(batch, mask, rows),
        "old_log_probs": responses(batch, batch["old"], rows),
        "ref_log_prob": responses(batch, batch["reference"], rows),
        "advantages": responses(batch, batch["advantages"], rows),
        "rollout_is_weights": responses(batch, batch["weights"], rows),
        "teacher_logprobs": torch.nested.as_nested_tensor(
            [piece[:, None] for piece in sequences(batch, batch["teacher"], rows).unbind()],
            layout=torch.jagged,
        ),
    }
    if padded:
        names = (
            "response_mask",
            "old_log_probs",
            "ref_log_prob",
            "advantages",
            "rollout_is_weights",
            "responses",
        )
        fields |= {
            name: torch.nested.to_padded_tensor(fields[name], 0, (len(rows), mask.shape[1]))
            for name in names
        }
        fields["prompts"] = torch.nested.to_padded_tensor(prompts, 0, (len(rows), longest))
        # verl pads prompts on the left and responses on the right.
        left = (
            torch.arange(longest)[None, :]
            >= longest - torch.tensor([batch["prompts"][i] for i in rows])[:, None]
        )
        fields["attention_mask"] = torch.cat([left, inside(batch)[rows]], dim=1).long()
    data = TensorDict(
        {name: value for name, value in fields.items() if name != drop}, batch_size=[len(rows)]
    )
    tensordict_utils.assign_non_tensor(
        data,
        dp_size=dp_size,
        batch_num_tokens=int(batch["mask"].sum()),
        global_batch_size=len(batch["responses"]),
        temperature=1.0,
    )
    return data


def actor(mode: str, **settings: Any) -> FSDPActorConfig:
    return FSDPActorConfig(rollout_n=2, use_dynamic_bsz=True, loss_agg_mode=mode, **settings)


def distillation(name: str, **settings: Any) -> DistillationConfig:
    own = {
        "use_task_rewards": False,
        "use_policy_gradient": False,
        "loss_max_clamp": None,
    } | settings
    return DistillationConfig(distillation_loss=DistillationLossConfig(loss_mode=name, **own))


def through_verl(
    batch: Batch,
    name: str,
    config: FSDPActorConfig,
    split: list[list[list[int]]],
    *,
    padded: bool = False,
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics as verl adds them up: micro-batches are summed, ranks (the outer
    lists) averaged."""
    student = batch["student"].clone().requires_grad_()
    total, metrics = torch.zeros((), dtype=torch.float64), {}
    for rank in split:
        for rows in rank:
            data = micro_batch(
                batch,
                rows,
                dp_size=len(split),
                padded=padded,
                drop="" if config.use_kl_loss else "rollout_is_weights",
            )
            output = {"log_probs": sequences(batch, student, rows)}
            loss, seen = distillation_ppo_loss(config, distillation(name), output, data)
            (loss / len(split)).backward()
            total = total + loss.detach() / len(split)
            for key in (key for key in seen if key.startswith("rlad/")):
                metrics[key] = metrics.get(key, 0.0) + seen[key].aggregate() / len(split)
    assert student.grad is not None
    return float(total), student.grad, metrics


def main(file: str, name: str) -> None:
    """Loss and gradient to the log-probs of each batch, by sequence mean, in micro-batches of
    unequal size."""
    os.environ[VARIABLE] = json.dumps({"type": name})
    found = []
    for batch in torch.load(file):
        rows = list(range(len(batch["responses"])))
        loss, gradient, _ = through_verl(
            batch, name, actor("seq-mean-token-mean"), [[rows[:3], rows[3:]]]
        )
        found.append({"loss": loss, "gradient": gradient})
    torch.save(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
