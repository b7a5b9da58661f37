"""A batch of rollouts of the native engine through `RLADTrainer`, in one process or several. Also a
program:

torchrun --nproc_per_node 2 tests/trl_parity.py FILE '[{"wrapped": "fully_shard"}]'
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from parity_cases import EqualPrompts, make_case
from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.engines.trl.config import AGGREGATION
from rlad.teachers.sharded import split_over_processes
from trl_runs import first_inputs, loss_and_gradient, make_trainer

NUM_MICRO_BATCHES = 4
LOSS_TYPE = {mode: name for name, mode in AGGREGATION.items() if name != "bnpo"}


def trainer_of(
    engine: NativeEngine,
    batch: RolloutBatch,
    folder: Path,
    *,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """TRL's trainer with an engine's settings and models, whose rollouts are those of `batch`,
    divided among the processes."""
    rollout, optimization = engine.config.rollout, engine.config.optimization
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    size = len(batch.rollouts) // world
    mine = slice(rank * size, (rank + 1) * size)
    rewards = [r.reward if r.verdict != "cannot_judge" else None for r in batch.rollouts]
    rollouts = {
        "prompt_ids": list(map(list, batch.prompts))[mine],
        "completion_ids": list(map(list, batch.completions))[mine],
        "logprobs": [list(each.completion.logprobs) for each in batch.rollouts][mine],
    }
    given = {
        "teacher": engine.teacher,
        "processing_class": engine.student.tokenizer,
        "train_dataset": Dataset.from_dict({"prompt": [group.prompt for group in batch.groups]}),
        "rollout_func": lambda prompts, trainer: rollouts,
    }
    settings = {
        "per_device_train_batch_size": size // NUM_MICRO_BATCHES,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "max_completion_length": rollout.max_completion_tokens,
        "temperature": rollout.temperature,
        "beta": optimization.kl_coef,
        "loss_type": LOSS_TYPE[optimization.aggregation],
        "advantages": "rlad",
        "max_steps": 1,
    }
    return make_trainer(
        folder,
        engine.config.objective.model_dump(exclude_none=True),
        model=arguments.pop("model", engine.student.model),
        reward=lambda completions, **columns: rewards[mine],
        trainer=given | (trainer or {}),
        **settings | arguments,
    )


def by_trl(trainer: Any, *, wrapped: str = "") -> tuple[float, Tensor]:
    """Loss and gradient of the trainer's step, its model wrapped as "ddp", by "fully_shard" or not
    at all."""
    model = trainer.model
    if wrapped == "fully_shard":
        split_over_processes(model, init_device_mesh("cpu", (trainer.accelerator.num_processes,)))
    if wrapped == "ddp":
        model = trainer.accelerator.prepare_model(model)
    return loss_and_gradient(trainer, first_inputs(trainer), model=model)


# --- under torchrun -------------------------------------------------------------------------------


def torchrun(world: int, script: str | Path, where: Path, what: Any) -> None:
    """Run a script with two arguments, a path and JSON, in `world` processes over gloo."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command += [str(script), str(where), json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    if done.returncode:
        raise RuntimeError(f"{world} processes with {what} failed:\n{done.stderr[-3000:]}")


def in_processes(world: int, folder: Path, *cases: dict[str, Any]) -> list[dict[str, Any]]:
    """What `step_of` finds of each case in `world` processes."""
    file = folder / f"found-by-{world}.pt"
    torchrun(world, __file__, file, cases)
    return torch.load(file)


def scores_of(inputs: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and teacher's log-probs of the completions that it was asked about: TRL shuffles
    them."""
    rows = [(part, i) for part in inputs for i in range(len(part["completion_ids"]))]
    asked = [(part, i, part["teacher_logprobs"][i].isfinite()) for part, i in rows]
    return [
        (
            [*part["prompt_ids"][i].tolist(), *part["completion_ids"][i][kept].tolist()],
            part["teacher_logprobs"][i][kept].tolist(),
        )
        for part, i, kept in asked
        if kept.any()
    ]


def step_of(
    *,
    wrapped: str = "",
    batch_index: int = 0,
    is_judged_in_full: bool = False,
    dtype: str = "float64",
    arguments: dict[str, Any] | None = None,
    **case: Any,
) -> dict[str, Any]:
    """Loss, gradient, number of processes, and the teacher's scores in each of them, of one batch
    of a case of `make_case`."""
    made = make_case(
        task=EqualPrompts(is_judged_in_full=is_judged_in_full), dtype=getattr(torch, dtype), **case
    )
    batch = made.engine.make_rollout_batch(batch_index)
    arguments = arguments or {}
    # A teacher that may be split is a plain model.
    teacher = {"teacher": made.teacher.model} if arguments.get("teacher_is_sharded") else {}
    with tempfile.TemporaryDirectory() as folder:
        trained = trainer_of(made.engine, batch, Path(folder), trainer=teacher, **arguments)
        loss, gradient = by_trl(trained, wrapped=wrapped)
    found = {"loss": loss, "gradient": gradient, "world": trained.accelerator.num_processes}
    found["teacher"] = trained.accelerator.gather_for_metrics(
        [scores_of(trained._buffered_inputs)], use_gather_object=True
    )
    return found


def main(file: Path, cases: list[dict[str, Any]]) -> None:
    found = [step_of(**case) for case in cases]
    if PartialState().is_main_process:
        torch.save(found, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
