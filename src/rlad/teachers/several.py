"""Several teachers: each problem's tokens are scored by the teacher of its task, or by a weighted
mixture of all.

    log πT = log sum_i w_i πT_i        for each token, the weights w_i scaled to sum 1

The mixture is over the next-token distributions at every token (each at the sampling temperature),
so it is again a probability distribution. It is not the mixture of the teachers' distributions over
whole completions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlad.config.run import RunConfig
from rlad.config.task import SeveralTasksConfig
from rlad.config.teacher import SeveralTeachersConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.scoring.columns import TokenColumns
from rlad.scoring.distributions import TokenDistributions
from rlad.scoring.mixtures import ArithmeticMixture, OneForEachToken
from rlad.teachers import build_teacher
from rlad.teachers import check_teacher as check_one
from rlad.teachers.base import Answer, Setting, Teacher, TeacherRequest


class TeacherByTask(Teacher):
    """A teacher that forwards each request to the teacher with the name of the problem's task.
    `only_task` is the task of a run with only one."""

    def __init__(self, teachers: Mapping[str, Teacher], *, only_task: str = ""):
        self.inner = teachers
        self.only_task = only_task
        members = [f"{name} = {one.identity}" for name, one in sorted(self.inner.items())]
        self.identity = f"by task: {', '.join(members)}"

    def _name_of(self, request: TeacherRequest) -> str:
        task = request.problem.task if request.problem else ""
        return task or self.only_task

    def speaks(self, request: TeacherRequest) -> bool:
        return self.inner[self._name_of(request)].speaks(request)

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for name, wanted in self._rows(requests).items():
            submitted = self.inner[name].submit([requests[i] for i in wanted])
            answers |= zip(wanted, submitted, strict=True)
        return [answers[i] for i in range(len(requests))]

    def distributions(self, requests: Sequence[TeacherRequest]) -> TokenDistributions:
        if not requests:
            return next(iter(self.inner.values())).distributions(requests)
        parts = []
        for name, wanted, places in self._places(requests):
            own = self.inner[name].distributions([requests[i] for i in wanted])
            parts.append((own, places))
        if len(parts) == 1:
            return parts[0][0]
        owners = torch.empty(sum(len(one.completion) for one in requests), dtype=torch.int64)
        for number, (_, places) in enumerate(parts):
            owners[places] = number
        placed = [own.placed(places, len(owners)) for own, places in parts]
        return OneForEachToken(placed, owners)

    def columns(
        self, requests: Sequence[TeacherRequest], *, top_k: int, ids: Tensor | None = None
    ) -> TokenColumns:
        whole = TokenColumns.missing(sum(len(one.completion) for one in requests), top_k)
        for name, wanted, places in self._places(requests):
            own_ids = None if ids is None else ids[places]
            asked = [requests[i] for i in wanted]
            own = self.inner[name].columns(asked, top_k=top_k, ids=own_ids)
            whole.ids[places] = own.ids.to(whole.ids)
            whole.logprobs[places] = own.logprobs.to(whole.logprobs)
        return whole

    def _places(
        self, requests: Sequence[TeacherRequest]
    ) -> Iterator[tuple[str, list[int], Tensor]]:
        """Yield the name of each teacher that is asked, with its requests and the positions of
        their tokens among all."""
        lengths = torch.tensor([len(one.completion) for one in requests])
        for name, wanted in self._rows(requests).items():
            is_own = torch.zeros(len(requests), dtype=torch.bool)
            is_own[wanted] = True
            yield name, wanted, is_own.repeat_interleave(lengths).nonzero().flatten()

    def _rows(self, requests: Sequence[TeacherRequest]) -> dict[str, list[int]]:
        """Assign the requests to teachers, so that each teacher is asked once about all of its
        own."""
        rows: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            rows.setdefault(self._name_of(request), []).append(i)
        return rows


class TeacherMixture(Teacher):
    """The mixture log sum_i w_i πT_i of each token; NaN where a member gives no log-prob."""

    def __init__(self, teachers: Mapping[str, Teacher], weights: Mapping[str, float]):
        self.inner = teachers
        total = math.fsum(weights[name] for name in self.inner)
        self.weights = {name: weights[name] / total for name in self.inner}
        members = [
            f"{self.weights[name]!r} x {name} = {one.identity}"
            for name, one in sorted(self.inner.items())
        ]
        self.identity = f"mixture: {', '.join(members)}"

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        by_teacher = [teacher.submit(requests) for teacher in self.inner.values()]
        return [self._mixed(answers) for answers in zip(*by_teacher, strict=True)]

    def distributions(self, requests: Sequence[TeacherRequest]) -> TokenDistributions:
        parts = [teacher.distributions(requests) for teacher in self.inner.values()]
        log_weights = [math.log(weight) for weight in self.weights.values()]
        return ArithmeticMixture(parts, log_weights)

    def _mixed(self, answers: Sequence[Answer]) -> Answer:
        # log sum_i w_i p_i = logsumexp_i(log w_i + log p_i), so no probability underflows.
        log_weights = [math.log(weight) for weight in self.weights.values()]
        spans: list[tuple[float, float]] = []

        def wait() -> Tensor:
            # All members were asked before waiting for the first, so servers work in parallel.
            values = torch.stack([answer.result() for answer in answers])
            spans[:] = [span for answer in answers for span in answer.spans]
            return torch.logsumexp(values + values.new_tensor(log_weights)[:, None], dim=0)

        return Answer(wait, spans)


def task_names(config: RunConfig) -> list[str]:
    """Return the names of a run's tasks, or the type of a single one."""
    task = config.task
    return list(task.tasks) if isinstance(task, SeveralTasksConfig) else [task.type]


def check_teacher(settings: SeveralTeachersConfig, setting: Setting) -> list[Finding]:
    members = settings.teachers
    findings = []
    for name, member in members.items():
        try:
            own = check_one(member, setting)
        except UserError as error:
            own = [Finding("error", "teacher", str(error))]
        findings += [replace(one, subject=f"{name}: {one.subject}") for one in own]
    if settings.combine == "mixture":
        return findings
    tasks = task_names(setting.config)
    for name in [name for name in tasks if name not in members]:
        message = (
            f"task {name!r} has no teacher of that name; add [teacher.teachers.{name}], or rename "
            f"one of {', '.join(members)}."
        )
        findings.append(Finding("error", "teachers", message))
    for name in [name for name in members if name not in tasks]:
        message = (
            f"teacher {name!r} is never asked: the run's tasks are {', '.join(tasks)}; remove or "
            "rename it."
        )
        findings.append(Finding("warning", "teachers", message))
    return findings


def make_teacher(settings: SeveralTeachersConfig, setting: Setting) -> Teacher:
    teachers = {name: build_teacher(one, setting) for name, one in settings.teachers.items()}
    if settings.combine == "mixture":
        weights = {name: settings.weights.get(name, 1.0) for name in teachers}
        return TeacherMixture(teachers, weights)
    names = task_names(setting.config)
    return TeacherByTask(teachers, only_task=names[0] if len(names) == 1 else "")
