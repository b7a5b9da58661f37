"""Measure how much student and teacher of a run solve before training."""

from contextlib import closing
from dataclasses import dataclass

from rlad.checks.nearest import describe_nearest
from rlad.checks.trial import without_cache
from rlad.config.run import RunConfig
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
    """pass@1 of student and teacher on the same problems."""

    num_problems: int
    student: Estimate
    teacher: Estimate


def check_pass_rates(
    config: RunConfig, num_problems: int
) -> tuple[PassRates | None, list[Finding]]:
    """Measure pass@1 of both, and report the nearest measured cases. Without a teacher that can
    write, only report that."""
    if config.teacher is not None and config.teacher.writes:
        rates = measure_pass_rates(config, num_problems)
        return rates, describe_pass_rates(rates)
    what = "there is none" if config.teacher is None else f"this one is {config.teacher.type!r}"
    message = (
        "not looked for: that takes a teacher that can write completions (teacher.type = 'local'), "
        f"and {what}"
    )
    return None, [Finding("warning", "nearest case", message)]


def measure_pass_rates(config: RunConfig, num_problems: int) -> PassRates:
    """Sample complete answers to validation problems from the student and its writing teacher."""
    assert config.teacher is not None
    student = load_student(config)
    of_student = _pass_at_1(config, student, num_problems)
    with closing(build_teacher(without_cache(config.teacher), setting_of(config, student))) as one:
        assert isinstance(one, LocalTeacher)
        with one.at_work():
            of_the_teacher = _pass_at_1(config, one.language_model, num_problems)
    return PassRates(num_problems, of_student, of_the_teacher)


def _pass_at_1(config: RunConfig, model: LanguageModel, num_problems: int) -> Estimate:
    # Servers have the student's weights of a run, not those of the models here.
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
    """Return the findings about both models, and about the nearest measured cases."""
    message = (
        f"student {rates.student}, teacher {rates.teacher} on {rates.num_problems} validation "
        f"problems x {NUM_SAMPLES} completions"
    )
    finding = Finding("ok", "pass@1", message)
    return [finding, *describe_nearest(rates.student, rates.teacher)]
