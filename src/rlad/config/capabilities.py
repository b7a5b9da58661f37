"""What the engines can do: one table, read wherever a config meets an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlad.config.objective import OBJECTIVE_CONFIGS, EngineName, ObjectiveSection
from rlad.config.teacher import LocalTeacherConfig
from rlad.config.types import Annealed
from rlad.errors import UserError

if TYPE_CHECKING:
    from rlad.config.run import RunConfig

TITLES: dict[EngineName, str] = {"native": "the native engine", "trl": "TRL", "verl": "verl"}


@dataclass(frozen=True, slots=True)
class Capability:
    """One row: something that a config may ask for, and the engines that can do it."""

    engines: tuple[EngineName, ...]
    asked: Callable[[Any], str]
    """How the objective, or the run, asks for it; empty when it does not."""
    instead: str


def _annealed_knob(objective: ObjectiveSection) -> str:
    knobs = [key for key, value in objective if isinstance(value, Annealed)]
    return f"an annealed objective.{knobs[0]}" if knobs else ""


def _verdicts(objective: Any) -> str:
    if not objective.needs_verdicts:
        return ""
    return f"objective.masking = {objective.masking!r} (it needs verdicts)"


def _ratio_of_a_sequence_without_teacher(objective: Any) -> str:
    if objective.needs_teacher or objective.ratio_level == "token":
        return ""
    return f"objective.ratio_level = {objective.ratio_level!r} of {objective.type}"


def _linear_schedule(run: "RunConfig") -> str:
    schedule = run.optimization.schedule
    return "optimization.schedule = 'linear'" if schedule == "linear" else ""


def _annealed_leash(run: "RunConfig") -> str:
    is_annealed = isinstance(run.optimization.kl_coef, Annealed)
    return "an annealed optimization.kl_coef" if is_annealed else ""


def _adapter(run: "RunConfig") -> str:
    return "student.lora" if run.student.lora else ""


def _end_tokens(run: "RunConfig") -> str:
    return "student.end_tokens" if run.student.end_tokens else ""


def _other_teacher(run: "RunConfig") -> str:
    teacher = run.teacher if run.needs_teacher else None
    if not isinstance(teacher, LocalTeacherConfig):
        return f"a [teacher] of type {teacher.type!r}" if teacher else ""
    if teacher.random_weights:
        return "a [teacher] with random_weights"
    return "a [teacher] with quantization" if teacher.quantization != "none" else ""


def _temperature_of_teacher(run: "RunConfig") -> str:
    if not run.needs_teacher or run.rollout.temperature == 1:
        return ""
    return f"rollout.temperature = {run.rollout.temperature} with a teacher"


_OF_AN_OBJECTIVE = (
    Capability(("native", "trl"), _annealed_knob, "give one number"),
    Capability(("native",), _verdicts, "set it to 'none', or use the native engine"),
    Capability(("native", "trl"), _ratio_of_a_sequence_without_teacher, "use 'token'"),
)
_OF_A_RUN = (
    Capability(
        ("native", "verl"),
        lambda run: "engine.type = 'trl'",
        "set it to 'native'; on several GPUs use rlad.engines.trl.trainer.RLADTrainer in a script "
        "of your own (docs/trl.md)",
    ),
    Capability(("native",), _linear_schedule, "use constant or cosine"),
    Capability(("native",), _annealed_leash, "give one number"),
    Capability(("native",), _adapter, "leave it out, or use the native engine"),
    Capability(("native",), _end_tokens, "leave it out, or use the native engine"),
    Capability(
        ("native",),
        _other_teacher,
        "name a model of type 'local' with its own weights, of which verl starts the servers",
    ),
    Capability(
        ("native",), _temperature_of_teacher, "set it to 1, at which verl's teacher always scores"
    ),
)


def require_engine(engine: EngineName, objective: Any, run: "RunConfig | None" = None) -> None:
    """`UserError` with one sentence when an engine cannot train this objective, or this run."""
    title = TITLES[engine]
    if engine not in objective.engines:
        able = [name for name, one in OBJECTIVE_CONFIGS.items() if engine in one.engines]
        raise UserError(
            f"objective {objective.type!r} is not available on {title}; use one of "
            f"{', '.join(able)}, or the native engine."
        )
    asked = [(row, row.asked(objective)) for row in _OF_AN_OBJECTIVE]
    if run is not None:
        asked += [(row, row.asked(run)) for row in _OF_A_RUN]
    for row, what in asked:
        if what and engine not in row.engines:
            where = "" if what.startswith("engine.type") else f" on {title}"
            raise UserError(f"{what} is not available{where}; {row.instead}.")
