"""What holds for a `[teacher]` section together with the teachers inside of it."""

from collections.abc import Iterator
from typing import Any

from rlad.config.teacher import (
    CachedTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
)


def single_teachers(teacher: Any, name: str = "teacher") -> Iterator[tuple[str, Any]]:
    """The sections of the teachers that score by themselves, with what to call them: those inside
    of wrappers."""
    match teacher:
        case None:
            return
        case SeveralTeachersConfig():
            for key, one in teacher.teachers.items():
                yield from single_teachers(one, f"{name} {key}")
        case PrivilegedTeacherConfig() | CachedTeacherConfig():
            yield from single_teachers(teacher.teacher, name)
        case _:
            yield name, teacher


_MEANS = frozenset(
    (
        *(
            "urls",
            "api_key_variable",
            "max_concurrent_requests",
            "timeout_seconds",
            "num_retries",
            "retry_pause_seconds",
        ),
        *("tolerance", "local_model", "directory", "max_gib", "keep"),
    )
)


def what_it_answers(section: Any) -> Any:
    """A dumped `[teacher]` section without what says how it is reached, tested and kept: of two
    such runs each can go on with the other.
    """
    if not isinstance(section, dict):
        return section
    left_out = _MEANS if "type" in section else ()
    return {key: what_it_answers(value) for key, value in section.items() if key not in left_out}
