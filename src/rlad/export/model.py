"""`rlad export model`: a checkpoint of a run as a plain Hugging Face folder, its adapter merged
into the base model."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from rlad.config.file import load_config
from rlad.errors import RunFailedError, UserError
from rlad.models.adapters import merge_adapter
from rlad.models.loading import LanguageModel, save_model
from rlad.models.student import load_student
from rlad.runs.checkpoints import damage, write_folder
from rlad.runs.directory import RunDirectory


def export_model(
    run_dir: str,
    output: Path | None = None,
    *,
    checkpoint: str = "best",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Write the student of a checkpoint for any tool that loads transformers' models; return the
    folder.

    `checkpoint` is `best` (on validation problems), `last` or a step. `output` is a new folder, by
    default `<run_dir>-model`. The weights are those of training in float32, an adapter added to its
    base model, rounded at the end where `dtype` says so. Raises `UserError` for a user's mistake,
    `RunFailedError` when the folder cannot be written.
    """
    run = RunDirectory(Path(run_dir))
    folder = output or run.path.resolve().with_name(f"{run.path.resolve().name}-model")
    problem = ""
    if not run.exists():
        problem = (
            f"there is no run in {run_dir}; give the directory of a run, as `rlad train` names it "
            "at its end."
        )
    elif folder.exists() or folder.is_symlink() or not folder.parent.is_dir():
        problem = f"--output {folder} exists already or has no parent folder; give a new folder."
    if problem:
        raise UserError(problem)
    student = _merged_student(run, _chosen(run, checkpoint), getattr(torch, dtype))
    try:
        write_folder(folder, lambda aside: save_model(student, aside))
    except (OSError, SafetensorError) as error:
        raise RunFailedError(
            f"{folder} cannot be written ({error}); free some space or fix its permissions, or "
            "give another --output."
        ) from None
    return folder


def _chosen(run: RunDirectory, which: str) -> Path:
    """Return the folder of an intact checkpoint."""
    if which in ("best", "last"):
        return (run.best_checkpoint() if which == "best" else run.newest_checkpoint())[1]
    # Of two at one step, the one that holds the student alone.
    found = {str(step): path for step, path in reversed(run.checkpoints())}
    reason = damage(found[which]) if which in found else "there is none"
    if reason:
        raise UserError(
            f"--checkpoint {which} of {run.path} cannot be exported ({reason}); use best, last, or "
            f"one of its steps: {', '.join(reversed(found)) or 'none'}."
        )
    return found[which]


def _merged_student(run: RunDirectory, checkpoint: Path, dtype: torch.dtype) -> LanguageModel:
    """Load a checkpoint as in training, then merge it into one model that ends its answers where
    rlad ends them."""
    config = load_config(run.path)
    on_the_cpu = config.student.model_copy(update={"device": "cpu"})
    student = load_student(config.model_copy(update={"student": on_the_cpu}), checkpoint)
    model: Any = student.model.float()
    # The adapter is added in float32, and the sum is rounded once.
    merge_adapter(model)
    model.to(dtype)
    if model.generation_config is not None:
        # Other tools use these settings to end an answer; without them they would continue after
        # rlad's end token.
        ids = student.eos_token_ids
        model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
        model.generation_config.pad_token_id = student.pad_token_id
    return student
