"""The state of the native engine on disk. With the same config, a restored run continues bit for
bit (CPU, float32).

A checkpoint is a Hugging Face model folder; `trainer/` in it holds everything besides the weights.
There is no pickle: tensors are safetensors, everything else is JSON. Randomness and the position in
the data are functions of the step, so they are not stored.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import UserError
from rlad.rollouts.types import RolloutGroup
from rlad.tasks import Problem

STATE = "trainer/state.json"
OPTIMIZER = "trainer/optimizer.safetensors"
PENDING = "trainer/pending.safetensors"
TEACHER = "trainer/teacher.safetensors"
_SCORES = (
    "teacher_logprobs",
    "reference_logprobs",
    "old_logprobs",
    "token_advantages",
    "role_evidence",
    "roles",
)


@dataclass(frozen=True, slots=True)
class EngineState:
    """All that the next steps of a run depend on, beside the student's weights and the config."""

    step: int
    scheduler: dict[str, Any]
    moments: dict[int, dict[str, Tensor]]
    """optimiser state, by parameter"""
    teacher_identity: str | None
    teacher: Mapping[str, Tensor]
    """state of a teacher that changes; empty for others"""
    skills: list[dict[str, Any]]
    """skills in the bank; empty if there is none"""
    pending: RolloutBatch | None
    """the rollout batch on which some steps are still to be made"""


def save_state(state: EngineState, folder: Path, *, run_digest: str) -> None:
    """Write a state into a model's folder; `run_digest` names the run it belongs to."""
    # safetensors stores one flat table of tensors: a moment's key is the number of its parameter
    # and its name in the optimiser, such as "3.exp_avg".
    (folder / "trainer").mkdir()
    moments = {
        f"{index}.{name}": value.contiguous()
        for index, entry in state.moments.items()
        for name, value in entry.items()
    }
    save_file(moments, folder / OPTIMIZER)
    if state.teacher:
        save_file(dict(state.teacher), folder / TEACHER)
    saved: dict[str, Any] = {
        "run": run_digest,
        "step": state.step,
        "scheduler": state.scheduler,
        "teacher": state.teacher_identity,
        "teacher_moves": bool(state.teacher),
        "skills": state.skills,
        "pending": None,
    }
    # The remaining steps on a rollout batch use its completions and scores as sampled: the student
    # was updated since, and would sample others.
    if state.pending is not None:
        saved["pending"] = {
            "index": state.pending.index,
            "groups": [group.to_json() for group in state.pending.groups],
            "seconds": state.pending.seconds,
            "counts": state.pending.counts,
            "skills": state.pending.skills,
        }
        save_file(batch_tensors(state.pending), folder / PENDING)
    (folder / STATE).write_text(json.dumps(saved), encoding="utf-8")


def load_state(
    folder: Path, *, run_digest: str, problem_of: Callable[[int], Problem]
) -> EngineState:
    """Load the state that was saved in a checkpoint's folder. `problem_of` returns the training
    problem of an index.

    Raises `UserError` if it is not one of ours, is damaged, or belongs to another run.
    """
    with _readable():
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if saved["run"] != run_digest:
            raise UserError(
                "it belongs to another run, whose config differs from this run directory's "
                "config.toml."
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / OPTIMIZER).items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = tensor
        pending = saved["pending"]
        tensors = load_file(folder / PENDING) if pending else {}
        indices = {row["problem_index"] for row in pending["groups"]} if pending else set()
        state = EngineState(
            step=saved["step"],
            scheduler=saved["scheduler"],
            moments=moments,
            teacher_identity=saved["teacher"],
            teacher=load_file(folder / TEACHER) if saved["teacher_moves"] else {},
            skills=saved.get("skills", []),
            pending=None,
        )
    # The task's own code runs here; its errors do not mean that the checkpoint is damaged.
    problems = {index: problem_of(index) for index in indices}
    if pending:
        with _readable():
            batch = _batch_from(pending, tensors, problems.__getitem__)
        state = replace(state, pending=batch)
    return state


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as error:
        raise UserError(f"its state cannot be read ({error}).") from None


def batch_tensors(batch: RolloutBatch) -> dict[str, Tensor]:
    """Return advantages and scores by name, with rollouts concatenated, and the lengths of their
    rows."""
    # Rows differ in length, so they are stored as one long row with the lengths to split it.
    tensors = {"advantages": batch.advantages}
    for name in _SCORES:
        rows = getattr(batch, name)
        if rows is not None:
            tensors[name] = torch.cat(rows)
            tensors[f"{name}/lengths"] = torch.tensor([len(row) for row in rows])
    return tensors


def _batch_from(
    saved: dict[str, Any], tensors: dict[str, Tensor], problem_of: Callable[[int], Problem]
) -> RolloutBatch:
    groups = [
        RolloutGroup.from_json(row, problem_of(row["problem_index"])) for row in saved["groups"]
    ]
    scores: dict[str, Any] = {
        name: list(tensors[name].split(tensors[f"{name}/lengths"].tolist()))
        for name in _SCORES
        if name in tensors
    }
    return RolloutBatch(
        saved["index"],
        groups,
        tensors["advantages"],
        seconds=saved["seconds"],
        counts=saved["counts"],
        skills=saved.get("skills"),
        **scores,
    )
