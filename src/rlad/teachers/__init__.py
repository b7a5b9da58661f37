"""The table of teachers, and the functions that check and make one."""

from collections.abc import Callable, Sequence
from typing import Any

from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.loading import LanguageModel
from rlad.teachers.base import Setting, Teacher


def teacher_modules() -> dict[str, Any]:
    """Return the module of each teacher type. Each module has two functions.

    `check_teacher(settings, setting) -> list[Finding]` reports what can be known before weights are
    loaded. `make_teacher(settings, setting) -> Teacher` loads them; it is called only if the check
    found no error.
    """
    # Imported here, because teachers that contain other teachers import this file.
    from rlad.teachers import adapter, cached, ema, local, privileged, several
    from rlad.teachers.served import teacher as served

    return {
        "local": local,
        "adapter": adapter,
        "served": served,
        "several": several,
        "privileged": privileged,
        "cached": cached,
        "ema": ema,
    }


def check_teacher(settings: Any, setting: Setting) -> list[Finding]:
    """Check whether a `[teacher]` section can score this student's tokens, as far as this can be
    known before weights are loaded."""
    return teacher_modules()[settings.type].check_teacher(settings, setting)


def make_teacher(settings: Any, setting: Setting) -> Teacher:
    """Make the teacher of a `[teacher]` section. Raises `UserError` if it cannot score this
    student's tokens."""
    require_no_error(settings.title, check_teacher(settings, setting))
    return build_teacher(settings, setting)


def require_no_error(name: str, findings: Sequence[Finding]) -> None:
    """Raise `UserError` for the first error that a teacher's check has found."""
    for finding in findings:
        if finding.level == "error":
            raise UserError(
                f"teacher {name!r} cannot score the student's tokens: {finding.subject}: "
                f"{finding.message}"
            )


def build_teacher(settings: Any, setting: Setting) -> Teacher:
    """Make a teacher, possibly one inside another, without a check: `check_teacher` has found no
    error before."""
    return teacher_modules()[settings.type].make_teacher(settings, setting)


def setting_of(
    config: RunConfig, student: LanguageModel, before_work: Callable[[], None] = lambda: None
) -> Setting:
    """Make the `Setting` that a teacher works in."""
    return Setting(config, student.tokenizer, student.context_tokens, student, before_work)


def prepare_teacher(
    config: RunConfig, student: LanguageModel, before_work: Callable[[], None] = lambda: None
) -> Teacher | None:
    """Make the teacher if the objective needs one; otherwise return None. Raises `UserError` if it
    cannot score this student's tokens.

    `before_work` is called before each piece of the teacher's work; it may raise to stop the run.
    """
    if not config.needs_teacher:
        return None
    return make_teacher(config.teacher, setting_of(config, student, before_work))
