"""What each engine supports, in one table that is read wherever a config meets an engine."""

from collections.abc import Iterator
from typing import Any

from rlad.config.context import ContextConfig
from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.config.objective_section import EngineName
from rlad.config.run import RunConfig
from rlad.config.task import EpisodesConfig
from rlad.config.teacher import single_teachers
from rlad.config.types import Annealed
from rlad.errors import UserError

TITLES: dict[EngineName, str] = {"native": "the native engine", "trl": "TRL", "verl": "verl"}
Row = tuple[str, tuple[EngineName, ...], str]
"""What a config asks for, the engines that support it, and what to do instead."""


def _asked_by_objective(objective: Any, engine: EngineName) -> Iterator[Row]:
    able = [name for name, one in OBJECTIVE_CONFIGS.items() if engine in one.engines]
    instead = f"use one of {', '.join(able)}, or the native engine"
    yield f"objective {objective.type!r}", objective.engines, instead
    for key, value in objective:
        if isinstance(value, Annealed):
            yield f"an annealed objective.{key}", ("native", "trl"), "give one number"
    if objective.asks_teacher_on != "all":
        what = f"objective.teacher_on = {objective.asks_teacher_on!r}"
        yield what, ("native",), "set it to 'all', or use the native engine"
    if objective.asked_of_teacher != "sampled":
        what = f"objective {objective.type!r} with a support of {objective.asked_of_teacher!r}"
        yield what, ("native",), "take an estimator of the sampled token, or the native engine"
    if objective.weighs_roles:
        yield "objective.evidence_weight", ("native",), "set it to 0"
    if not objective.needs_teacher and getattr(objective, "ratio_level", "token") != "token":
        what = f"objective.ratio_level = {objective.ratio_level!r} of {objective.type}"
        yield what, ("native", "trl"), "use 'token'"


def _asked_by_run(run: RunConfig) -> Iterator[Row]:
    loop = run.optimization
    if loop.schedule == "linear":
        yield "optimization.schedule = 'linear'", ("native", "trl"), "use constant or cosine"
    if isinstance(loop.kl_coef, Annealed):
        yield "an annealed optimization.kl_coef", ("native",), "give one number"
    yield from _asked_by_length(run)
    if isinstance(run.task, EpisodesConfig):
        yield f"task.type = {run.task.type!r}", ("native",), "use the native engine"
    if run.rollout.max_staleness:
        yield "rollout.max_staleness = 1", ("native",), "set it to 0"
    yield from _asked_by_student(run.student)
    if run.rollout.engine != "native":
        what = f"rollout.engine = {run.rollout.engine!r}"
        yield what, ("native", "verl"), "set it to 'native', and engine.trl.use_vllm = true"
    if run.needs_teacher:
        yield from _asked_by_teacher(run)


def _asked_by_student(student: Any) -> Iterator[Row]:
    for key in ("lora", "end_tokens"):
        if getattr(student, key):
            yield f"student.{key}", ("native", "trl"), "leave it out, or use the native engine"
    if student.lora is not None and "lm_head" in student.lora.target_modules:
        what = "lm_head in student.lora.target_modules"
        yield what, ("native",), "leave it out, or use the native engine"
    if student.device not in ("auto", "cpu", "cuda"):
        what = f"student.device = {student.device!r}"
        yield what, ("native", "verl"), "set it to 'auto': each process takes the GPU of its number"


def _asked_by_length(run: RunConfig) -> Iterator[Row]:
    loop = run.optimization
    per_batch = loop.steps_per_rollout_batch
    lengths = {
        "evaluation.every_steps": run.evaluation.every_steps,
        "optimization.num_steps": loop.num_steps,
    }
    for key, length in lengths.items():
        if length % per_batch:
            # TRL resumes exactly only at the end of a rollout batch.
            what = f"{key} = {length} with optimization.steps_per_rollout_batch = {per_batch}"
            yield what, ("native", "verl"), f"make it a multiple of {per_batch}"


def _asked_by_teacher(run: RunConfig) -> Iterator[Row]:
    teacher: Any = run.teacher
    if teacher.type != "local" or teacher.random_weights or teacher.quantization != "none":
        instead = "name a model of type 'local' with its own weights, unquantised"
        yield "this [teacher]", ("native", "trl"), f"{instead}, of which verl starts the servers"
    for where, one in single_teachers(teacher):
        if one.type in ("ema", "adapter"):
            instead = "name a model of type 'local', or use the native engine"
            yield f"{where}.type = {one.type!r}", ("native", "verl"), instead
    for one in teacher.walk():
        if not isinstance(one, ContextConfig):
            continue
        if one.needs_group:
            instead = "show answer or fields alone, or use the native engine"
            yield "a teacher.context of the group's rollouts", ("native",), instead
        if one.without_success != "plain":
            what = f"teacher.context.without_success = {one.without_success!r}"
            yield what, ("native",), "set it to 'plain', or use the native engine"
    if run.engine.trl.get("teacher_is_sharded"):
        yield from _asked_by_sharding(teacher)
    if run.rollout.temperature != 1:
        what = f"rollout.temperature = {run.rollout.temperature} with a teacher"
        yield what, ("native", "trl"), "set it to 1, at which verl's teacher always scores"


def _asked_by_sharding(teacher: Any) -> Iterator[Row]:
    whole = {"type": "local", "random_weights": False, "quantization": "none", "keep": "gpu"}
    for key, value in whole.items():
        found = getattr(teacher, key, value)
        if found != value:
            what = f"teacher.{key} = {found!r} with engine.trl.teacher_is_sharded"
            yield what, ("native", "verl"), f"set it to {value!r}, or leave the other one out"


def require_engine(engine: EngineName, objective: Any, run: RunConfig | None = None) -> None:
    """Raise `UserError` if an engine does not support this objective, or this run."""
    rows = list(_asked_by_objective(objective, engine))
    if run is not None:
        rows += _asked_by_run(run)
    for what, engines, instead in rows:
        if engine not in engines:
            raise UserError(f"{what} is not available on {TITLES[engine]}; {instead}.")
