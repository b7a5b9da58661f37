"""What holds for a `[teacher]` section together with the teachers inside of it."""

from collections.abc import Iterator
from typing import Any

from rlad.config.teacher import (
    CachedTeacherConfig,
    LocalTeacherConfig,
    PrivilegedTeacherConfig,
    SeveralTeachersConfig,
    with_those_inside,
)


def single_teachers(teacher: Any, name: str = "teacher") -> Iterator[tuple[str, Any]]:
    """The sections of the teachers that score by themselves, with what to call them: those inside of wrappers."""
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
        *("urls", "api_key_variable", "max_concurrent_requests", "timeout_seconds", "num_retries", "retry_pause_seconds"),
        *("tolerance", "local_model", "directory", "max_gib", "keep"),
    )
)


def what_it_answers(section: Any) -> Any:
    """A dumped `[teacher]` section without what says how it is reached, tested and kept: of two such runs each can go on with
    the other.
    """
    if not isinstance(section, dict):
        return section
    left_out = _MEANS if "type" in section else ()
    return {key: what_it_answers(value) for key, value in section.items() if key not in left_out}


def require_shardable(teacher: Any) -> None:
    """`ValueError` unless several processes can hold the teacher together, each a share of every weight."""
    if not isinstance(teacher, LocalTeacherConfig):
        raise ValueError(
            f"engine.trl.teacher_is_sharded splits a teacher of type 'local' over the processes, and this one is "
            f"{teacher.type!r}; leave it out"
        )
    for name in ("device", "keep", "quantization"):
        if (value := getattr(teacher, name)) != (needed := LocalTeacherConfig.model_fields[name].default):
            raise ValueError(
                f"teacher.{name} = {value!r} is not for engine.trl.teacher_is_sharded, by which each process keeps its share "
                f"of the weights as they are on its own device; set {needed!r}, or leave teacher_is_sharded out"
            )


def require_standing_still(teacher: Any) -> None:
    """`ValueError` for a teacher that follows the student by steps of its own, or holds one that does."""
    if any(one.type == "ema" and one.update_rate < 1 for one in with_those_inside(teacher)):
        raise ValueError(
            "a teacher of type 'ema' moves with the student, which the native engine alone offers; use engine.type = 'native', "
            "or another teacher"
        )
