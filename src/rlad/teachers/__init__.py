"""The table of teachers, and how one is checked and made. Imports no torch before a teacher is
made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rlad.config.run import RunConfig
from rlad.config.teacher import LocalTeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.teachers.base import Setting, Teacher

if TYPE_CHECKING:
    from rlad.models.loading import LanguageModel

TEACHERS: dict[str, str] = {
    name: f"rlad.teachers.{name}"
    for name in ("local", "adapter", "several", "privileged", "cached", "ema")
} | {"served": "rlad.teachers.served.teacher"}
"""Type -> module, imported when it is asked for, with two functions: `check_teacher(settings,
setting) -> list[Finding]` says what can be known before weights are loaded; `make_teacher(settings,
setting) -> Teacher`, called when it found no error, loads them."""
_CHECKS = TEACHERS | {"local": "rlad.teachers.local_check"}
"""where `check_teacher` is, apart from what imports torch"""


def check_teacher(settings: Any, setting: Setting) -> list[Finding]:
    """Whether a `[teacher]` section can score this student's tokens, as far as that shows before
    weights are loaded."""
    return importlib.import_module(_CHECKS[settings.type]).check_teacher(settings, setting)


def make_teacher(settings: Any, setting: Setting) -> Teacher:
    """The teacher of a `[teacher]` section. `UserError` when it cannot score this student's
    tokens."""
    require_no_error(settings, check_teacher(settings, setting))
    return build_teacher(settings, setting)


def build_teacher(settings: Any, setting: Setting) -> Teacher:
    """The teacher of a section in which `check_teacher` found no error, as a teacher within another
    one is made."""
    return importlib.import_module(TEACHERS[settings.type]).make_teacher(settings, setting)


def require_no_error(settings: Any, findings: Sequence[Finding]) -> None:
    """`UserError` with the first error among the findings about a teacher."""
    for finding in findings:
        if finding.level == "error":
            raise UserError(
                f"teacher {settings.title!r} cannot score the student's tokens: {finding.subject}: "
                f"{finding.message}"
            )


def setting_of(
    config: RunConfig, student: LanguageModel, before_work: Callable[[], None] = lambda: None
) -> Setting:
    """What a teacher has to work with."""
    return Setting(config, student.tokenizer, student.context_tokens, student, before_work)


def load_teacher(config: RunConfig, student: LanguageModel) -> LanguageModel:
    """The model of a local teacher. `UserError` when it cannot score this student's tokens."""
    settings, setting = config.teacher, setting_of(config, student)
    assert isinstance(settings, LocalTeacherConfig), (
        "RunConfig refuses other teachers where the model itself is needed"
    )
    require_no_error(settings, check_teacher(settings, setting))
    from rlad.teachers.local import load_teacher_model

    return load_teacher_model(settings, setting)


def prepare_teacher(
    config: RunConfig, student: LanguageModel, before_work: Callable[[], None] = lambda: None
) -> Teacher | None:
    """The teacher of an objective of ours that needs one, or None. `UserError` when it cannot
    score this student's tokens.

    `before_work` is called before each piece of its work; it may raise to stop the run there.
    """
    if not config.needs_teacher:
        return None
    assert config.teacher is not None, (
        "RunConfig refuses an objective that needs a teacher without one"
    )
    return make_teacher(config.teacher, setting_of(config, student, before_work))
