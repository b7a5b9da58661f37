"""The writers of a run's skills: rules, the student, its teacher, or a model on a server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rlad.config.context import ContextConfig
from rlad.config.run import RunConfig
from rlad.models.loading import LanguageModel
from rlad.rollouts.sampling import OwnSampler
from rlad.rollouts.skill_endpoint import EndpointWriter
from rlad.rollouts.skill_writer import SkillWriter
from rlad.rollouts.skills import Skill, SkillBank, Summarise, summarise_by_rules
from rlad.rollouts.types import RolloutGroup, Sampler
from rlad.teachers.base import Teacher
from rlad.teachers.local import LocalTeacher
from rlad.teachers.privileged import PrivilegedTeacher


class Summariser:
    """The writer of skills, as set in `[teacher.context.skill]`."""

    def __init__(
        self,
        config: RunConfig,
        bank: SkillBank | None,
        *,
        student: LanguageModel,
        teacher: Teacher | None,
        before_work: Callable[[], None],
    ):
        """Start the writer. Raises `UserError` for a server that cannot write."""
        self._config = config
        self._settings = bank and bank.settings
        self._student = student
        self._teacher = teacher
        self._before_work = before_work
        self._endpoint: EndpointWriter | None = None
        if self._settings is not None and self._settings.endpoint is not None:
            self._endpoint = EndpointWriter(self._settings.endpoint, before_work)
            self._endpoint.require_answer()

    @contextmanager
    def at_work(self, sampler: Sampler) -> Iterator[Summarise]:
        """Yield the function that summarises a group; `sampler` is the student's."""
        assert self._settings is not None
        rollout = self._config.rollout
        match self._settings.summariser:
            case "rules":
                yield summarise_by_rules
            case "student":
                yield SkillWriter(self._student, sampler, rollout, self._before_work)
            case "teacher":
                teacher = next(filter(None, map(_writer, _all_teachers(self._teacher))))
                with teacher.at_work():
                    model = teacher.language_model
                    yield SkillWriter(model, OwnSampler(model, rollout), rollout, self._before_work)
            case "endpoint":
                assert self._endpoint is not None
                yield self._endpoint


def _writer(teacher: Teacher) -> LocalTeacher | None:
    """Return the model inside a teacher that is shown skills; None for all other teachers."""
    shows_skills = isinstance(teacher, PrivilegedTeacher) and teacher.shows_skills
    inner = next(iter(teacher.inner.values()), None)
    return inner if shows_skills and isinstance(inner, LocalTeacher) else None


def _all_teachers(teacher: Teacher | None) -> Iterator[Teacher]:
    """Yield a teacher and all teachers inside it."""
    if teacher is not None:
        yield teacher
        for inner in teacher.inner.values():
            yield from _all_teachers(inner)


def skill_bank(config: RunConfig) -> SkillBank | None:
    """Make the empty bank of a run whose teacher is shown skills; None for other runs."""
    if config.teacher is None or not config.needs_teacher:
        return None
    contexts = [one for one in config.teacher.walk() if isinstance(one, ContextConfig)]
    settings = next((one.skill for one in contexts if one.skill is not None), None)
    return None if settings is None else SkillBank(settings)


def with_skill(group: RolloutGroup, skill: Skill | None) -> RolloutGroup:
    """Return the group with the skill that its teacher is shown."""
    return group if skill is None else replace(group, skill=skill.text)
