"""How much student and teacher of a run solve before training."""

from contextlib import closing
from dataclasses import dataclass

from rlad.checks.nearest import describe_nearest
from rlad.checks.trial import without_cache
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student
from rlad.rollouts.evaluation import evaluate
from rlad.rollouts.samplers import make_sampler, of_teacher
from rlad.runs.rows import summarise
from rlad.runs.statistics import Estimate
from rlad.tasks import make_task
from rlad.teachers import build_teacher, setting_of
from rlad.teachers.local import LocalTeacher

NUM_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class PassRates:
    """pass@1 on the same problems."""

    num_problems: int
    student: Estimate
    teacher: Estimate


def measure_pass_rates(config: RunConfig, num_problems: int) -> PassRates:
    """Have student and teacher write completions of validation problems in full.

    `UserError` for a teacher that scores only.
    """
    if config.teacher is None or not config.teacher.writes:
        what = "there is none" if config.teacher is None else f"it is {config.teacher.type!r}"
        raise UserError(
            "--nearest needs a teacher whose model is in this process, to write completions, and "
            f"{what}; give teacher.type = 'local', or leave --nearest out."
        )
    student = load_student(config)
    of_student = _pass_at_1(config, student, num_problems)
    with closing(build_teacher(without_cache(config.teacher), setting_of(config, student))) as one:
        assert isinstance(one, LocalTeacher)
        with one.at_work():
            of_the_teacher = _pass_at_1(config, one.language_model, num_problems)
    return PassRates(num_problems, of_student, of_the_teacher)


def _pass_at_1(config: RunConfig, model: LanguageModel, num_problems: int) -> Estimate:
    # Servers hold the student's weights of a run, not those of either model here.
    rollout = of_teacher(config.rollout)
    with (
        closing(make_task(**config.task.model_dump())) as task,
        closing(make_sampler(model, rollout)) as sampler,
    ):
        results = evaluate(
            model,
            task,
            "validation",
            rollout=rollout,
            num_problems=num_problems,
            num_samples=NUM_SAMPLES,
            temperature=config.evaluation.temperature,
            sampler=sampler,
        )
    return summarise([results])["pass@k"][1]


def describe_pass_rates(rates: PassRates) -> list[Finding]:
    """Return the lines about both, and those about the nearest measured cases."""
    message = (
        f"student {rates.student}, teacher {rates.teacher} on {rates.num_problems} validation "
        f"problems x {NUM_SAMPLES} completions"
    )
    finding = Finding("ok", "pass@1", message)
    return [finding, *describe_nearest(rates.student, rates.teacher)]
