"""What a trial says about a run, in sentences; and when it is a warning."""

from rlad.checks.top_choices import NUM_CHOICES
from rlad.checks.trial import StepSeconds, TeacherTrial, Trial
from rlad.config.run import RunConfig
from rlad.config.teacher import single_teachers
from rlad.findings import Finding
from rlad.runs.guards import LARGE_GATED_SHARE, LARGE_LOG_RATIO

# Below what rounding to bfloat16 moves log-probs by, two models cannot be told apart.
SMALL_LOG_RATIO = 0.01


def describe_trial(trial: Trial, config: RunConfig) -> list[Finding]:
    """The trial's findings, one line each."""
    message = (
        f"{trial.num_completions} completions of training prompts, cut at {trial.max_tokens} "
        "tokens "
        f"({trial.num_truncated} were), {trial.mean_tokens:.0f} tokens on average"
    )
    findings = [Finding("ok", "trial", message)]
    if trial.teacher is not None:
        findings += _teacher(trial.teacher, config)
    return [*findings, *_time(trial.steps)]


def _teacher(trial: TeacherTrial, config: RunConfig) -> list[Finding]:
    most = config.optimization.max_missing_teacher_share
    findings = []
    if trial.missing > most:
        message = (
            f"the teacher gave no finite log-prob for {trial.missing:.1%} of the tokens, and "
            f"optimization.max_missing_teacher_share allows {most:.1%}; check that it is the right "
            "model and does not overflow "
            "(bfloat16 instead of float16)."
        )
        findings.append(Finding("error", "log-probs", message))
    elif trial.missing:
        findings.append(
            Finding("warning", "log-probs", f"missing for {trial.missing:.1%} of the tokens")
        )
    return [*findings, *_log_ratio(trial, config), *_gates(trial), *_top_choices(trial)]


def _log_ratio(trial: TeacherTrial, config: RunConfig) -> list[Finding]:
    if trial.mean is None or trial.mean_size is None or trial.median_size is None:
        return []
    subject = "log πS - log πT"
    message = f"mean {trial.mean:+.2f} nats; of its size mean {trial.mean_size:.2f}, median {trial.median_size:.2f}"
    if trial.median_size > LARGE_LOG_RATIO:
        what = "the teacher finds the student's own tokens very unlikely; compare vocabulary, prompt format and temperature"
        return [Finding("warning", subject, f"{message}: {what}")]
    if trial.mean_size < SMALL_LOG_RATIO:
        if all(teacher.type == "ema" for _, teacher in single_teachers(config.teacher)):
            return [
                Finding(
                    "ok", subject, f"{message}: the moving average begins as the student itself"
                )
            ]
        what = (
            "the teacher says what the student says, so it changes nothing; is it the same model?"
        )
        return [Finding("warning", subject, f"{message}: {what}")]
    return [Finding("ok", subject, message)]


def _gates(trial: TeacherTrial) -> list[Finding]:
    if trial.gated_positive is None or trial.gated_negative is None:
        return []
    message = (
        f"at the first step {trial.gated_positive:.0%} of the tokens if the advantage is positive, "
        f"{trial.gated_negative:.0%} "
        f"if negative; {trial.clamped or 0.0:.0%} are clamped"
    )
    if max(trial.gated_positive, trial.gated_negative) > LARGE_GATED_SHARE:
        what = "most tokens get no gradient; raise objective.alpha or the clips, or take another teacher"
        return [Finding("warning", "gated", f"{message}: {what}")]
    return [Finding("ok", "gated", message)]


def _top_choices(trial: TeacherTrial) -> list[Finding]:
    if trial.top_choices is None:
        return [
            Finding(
                "ok", "top choices", "not available: the teacher's distributions are out of reach"
            )
        ]
    message = (
        f"the most likely token is the same at {trial.top_choices.same_first:.0%} of the tokens; "
        "of the student's "
        f"{NUM_CHOICES} most likely, {trial.top_choices.shared:.0%} are the teacher's"
    )
    return [Finding("ok", "top choices", message)]


def _time(steps: tuple[StepSeconds, ...]) -> list[Finding]:
    if not steps:
        return []
    first = steps[0]
    parts = (("generation", first.generation), ("teacher", first.teacher), ("update", first.update))
    shares = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in parts if seconds)
    message = f"about {_seconds(first.total)} a step with completions of {first.completion_tokens:.0f} tokens ({shares})"
    if len(steps) > 1:
        message += f", {_seconds(steps[1].total)} if all had {steps[1].completion_tokens:.0f}"
    return [Finding("ok", "time", message)]


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds < 60
        else f"{seconds / 60:.1f} min"
        if seconds < 3600
        else f"{seconds / 3600:.1f} h"
    )
