"""Make the engine of a run, and load the student as that engine needs it."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from rlad.config.run import RunConfig
from rlad.config.teacher import single_teachers
from rlad.engines import native
from rlad.engines.base import Engine
from rlad.errors import UserError, require_package
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student, require_base_model
from rlad.models.vision import sees
from rlad.models.without_weights import load_model_config
from rlad.rollouts.prompts import NUM_PROBED_PROBLEMS
from rlad.tasks import Task


def is_main_process() -> bool:
    """Return whether this is the one process, of those started by a launcher, that writes and
    prints."""
    return os.environ.get("RANK", "0") == "0"


def require_engine_package(config: RunConfig) -> None:
    """Raise `UserError` if an engine is not installed, or cannot use the processes that were
    started."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.engine.type == "trl":
        require_package("trl", "engine.type = 'trl'")
    elif num_processes > 1:
        raise UserError(
            f"{num_processes} processes were started, but engine.type = 'native' trains in a "
            "single one; set engine.type=trl, or start one process."
        )


def load_engine_student(config: RunConfig, checkpoint: Path | None) -> LanguageModel:
    """Load the model to train: the initial student, or the student in a checkpoint.

    TRL moves it to its devices, adds its adapter and reads its checkpoint itself.
    """
    if config.engine.type == "native":
        return load_student(config, checkpoint)
    require_base_model(config)
    plain = config.student.model_copy(update={"device": "cpu", "lora": None})
    return load_student(config.model_copy(update={"student": plain}))


def require_pictures_fit(config: RunConfig, task: Task) -> None:
    """Raise `UserError` if problems have pictures but something in the run supports only texts."""
    # Rows with and without pictures may be mixed.
    asked = config.optimization.num_rollout_batches * config.rollout.prompts_per_batch
    number = min(asked, task.num_problems("train") or NUM_PROBED_PROBLEMS)
    if not any(task.problem("train", i, seed=config.seed).images for i in range(number)):
        return
    obstacle = ""
    if config.engine.type != "native":
        obstacle = f"engine.type = {config.engine.type!r} trains on texts; use 'native'"
    elif config.teacher is not None and config.needs_teacher:
        if any(getattr(one, "type", "") == "cached" for one in config.teacher.walk()):
            obstacle = "a teacher of type 'cached' supports only texts; leave the cache out"
        for where, one in single_teachers(config.teacher):
            if one.type == "served" and config.objective.asked_of_teacher != "sampled":
                obstacle = (
                    f"{where}.type = 'served' gives log-probs of single tokens after them; use "
                    "'local', or objective=opd"
                )
            elif one.type == "local" and not sees(load_model_config(one.model)):
                obstacle = f"{where}.model = {one.model!r} reads only text; use a vision model"
    if obstacle:
        raise UserError(f"the task's problems have pictures, but {obstacle}.")


def make_engine(
    config: RunConfig, student: LanguageModel, task: Task, *, before_work: Callable[[], None]
) -> Engine:
    """Make the engine and load what a run needs besides its student and its task."""
    if config.engine.type == "native":
        return native.make_engine(config, student, task, before_work=before_work)
    trl = import_module("rlad.engines.trl.engine")  # imports TRL, which takes seconds
    return trl.TRLEngine(config, student=student, task=task, before_work=before_work)
