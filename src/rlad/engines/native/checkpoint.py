"""Saving and restoring the native engine: with the same config a restored run goes on bit for bit
(CPU, float32).

A checkpoint is a Hugging Face model folder; beside the weights, `trainer/` holds the rest. No
pickle: tensors are safetensors, everything else is JSON. Randomness and the position in the data
are functions of the step, so they need no storage.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlad.engines.rollout_batch import RolloutBatch
from rlad.models.saving import save_model
from rlad.rollouts.types import RolloutGroup

if TYPE_CHECKING:
    from rlad.engines.native.loop import NativeEngine

STATE, OPTIMIZER, PENDING = (
    "trainer/state.json",
    "trainer/optimizer.safetensors",
    "trainer/pending.safetensors",
)
TEACHER = "trainer/teacher.safetensors"


def save_engine(engine: "NativeEngine", folder: Path, *, run_digest: str) -> None:
    """Write everything that `restore_engine` needs into `folder`; `run_digest` names the run it
    belongs to."""
    save_model(engine.student, folder)
    (folder / "trainer").mkdir()
    moments = engine.optimizer.state_dict()["state"]
    tensors = {
        f"{index}.{name}": value
        for index, entry in moments.items()
        for name, value in entry.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / OPTIMIZER)
    teacher = engine.teacher.state() if engine.teacher else {}
    if teacher:
        save_file(dict(teacher), folder / TEACHER)
    state: dict[str, Any] = {
        "run": run_digest,
        "step": engine.step,
        "scheduler": engine.scheduler.state_dict(),
        "teacher": getattr(engine.teacher, "identity", None),
        "teacher_moves": bool(teacher),
        "pending": None,
    }
    if engine.pending is not None:
        batch = engine.pending
        groups = [group.to_json() for group in batch.groups]
        state["pending"] = {
            "index": batch.index,
            "groups": groups,
            "seconds": batch.seconds,
            "counts": batch.counts,
        }
        save_file(batch_tensors(batch), folder / PENDING)
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")


def read_state(folder: Path, *keys: str, run_digest: str) -> dict[str, Any]:
    """What a checkpoint says of each key. `ValueError` when it cannot be read, lacks one of them,
    or is of another run."""
    with _readable():
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        run, state = saved["run"], {key: saved[key] for key in keys}
    if run != run_digest:
        raise ValueError(
            "it belongs to another run, whose config differs from this run directory's config.toml."
        )
    return state


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"its state cannot be read ({error}).") from None


def restore_engine(engine: "NativeEngine", folder: Path, *, run_digest: str) -> None:
    """Bring a new engine, whose student was loaded from `folder`, to the state that was saved
    there.

    Raises `ValueError` when the checkpoint is not one of ours, is damaged or of another run, or had
    another teacher.
    """
    state = read_state(
        folder, "step", "scheduler", "teacher", "teacher_moves", "pending", run_digest=run_digest
    )
    with _readable():
        tensors = load_file(folder / OPTIMIZER)
        pending = load_file(folder / PENDING) if state["pending"] else {}
        teacher = load_file(folder / TEACHER) if state["teacher_moves"] else {}
    identity = getattr(engine.teacher, "identity", None)
    if state["teacher"] != identity:
        raise ValueError(f"it was trained with teacher {state['teacher']!r}, not {identity!r}.")
    if engine.teacher is not None:
        engine.teacher.load_state(teacher)
    engine.step = state["step"]
    engine.scheduler.load_state_dict(state["scheduler"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = tensor
    groups = engine.optimizer.state_dict()["param_groups"]
    for group, learning_rate in zip(groups, engine.scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate
    engine.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if state["pending"]:
        engine.pending = _batch_from(state["pending"], pending)


_SCORES = ("teacher_logprobs", "reference_logprobs", "old_logprobs", "token_advantages")


def batch_tensors(batch: RolloutBatch) -> dict[str, Tensor]:
    """Advantages and scores by name, rollouts one behind the other, and of each score the lengths
    of its rows."""
    tensors = {"advantages": batch.advantages}
    for name in _SCORES:
        rows = getattr(batch, name)
        if rows is not None:
            tensors[name] = torch.cat(rows)
            tensors[f"{name}/lengths"] = torch.tensor([len(row) for row in rows])
    return tensors


def _batch_from(saved: dict[str, Any], tensors: dict[str, Tensor]) -> RolloutBatch:
    groups = [RolloutGroup.from_json(row) for row in saved["groups"]]
    batch = RolloutBatch(
        saved["index"],
        groups,
        tensors["advantages"],
        seconds=saved["seconds"],
        counts=saved["counts"],
    )
    for name in _SCORES:
        if name in tensors:
            setattr(batch, name, list(tensors[name].split(tensors[f"{name}/lengths"].tolist())))
    return batch
