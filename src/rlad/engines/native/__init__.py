"""The engine for one device, and the function that makes it from a run's config."""

from collections.abc import Callable

from rlad.config.run import RunConfig
from rlad.engines.native.loop import NativeEngine
from rlad.models.loading import LanguageModel
from rlad.models.student import load_reference
from rlad.tasks import Task
from rlad.teachers import prepare_teacher


def make_engine(
    config: RunConfig, student: LanguageModel, task: Task, *, before_work: Callable[[], None]
) -> NativeEngine:
    """Make the engine and load what a run needs besides its student and its task."""
    return NativeEngine(
        config,
        student=student,
        task=task,
        reference=load_reference(config, student) if config.optimization.kl_coef else None,
        teacher=prepare_teacher(config, student, before_work),
        before_work=before_work,
    )
