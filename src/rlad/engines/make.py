"""The engine that a run's config names."""

from collections.abc import Callable

from rlad.config.objective import TRAINED_BY_TRL
from rlad.config.run import RunConfig
from rlad.engines.base import Engine
from rlad.engines.native.loop import NativeEngine
from rlad.engines.processes.ranks import ALONE, Ranks
from rlad.models.loading import LanguageModel
from rlad.models.student import load_reference
from rlad.tasks import Task
from rlad.teachers import load_teacher, prepare_teacher


def make_engine(
    config: RunConfig, student: LanguageModel, task: Task, *, before_work: Callable[[], None], ranks: Ranks = ALONE
) -> Engine:
    """The engine of a run: the one that its config names, but TRL's own for what TRL alone trains."""
    if config.objective.type in TRAINED_BY_TRL:
        from rlad.engines.trl.distillation import TRLDistillationEngine

        return TRLDistillationEngine(
            config, student=student, teacher=load_teacher(config, student), task=task, before_work=before_work
        )
    if config.engine.type == "trl":
        from rlad.engines.trl.distillation import require_trl

        require_trl(config.objective.type)
        from rlad.engines.trl.engine import TRLEngine
        from rlad.engines.trl.sharded_teacher import make_sharded_teacher

        split = config.splits_teacher
        teacher = make_sharded_teacher(config, student) if split else prepare_teacher(config, student, before_work)
        return TRLEngine(config, student=student, task=task, teacher=teacher, before_work=before_work, ranks=ranks)
    return NativeEngine(
        config,
        student=student,
        task=task,
        reference=load_reference(config, student) if config.optimization.kl_coef else None,
        teacher=prepare_teacher(config, student, before_work),
        before_work=before_work,
    )
