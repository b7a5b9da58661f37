"""The problems of a run as a data set for TRL, and its task as a reward function."""

import math
from functools import lru_cache
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset

from rlad.config.run import RunConfig
from rlad.engines.rollout_batch import teacher_request
from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.rollouts.grading import Timer, asked_prompts, grade
from rlad.rollouts.prompts import chat_messages, is_plain, plain_text
from rlad.rollouts.texts import begun_completion
from rlad.rollouts.types import Asked, Completion, Rollout, RolloutGroup
from rlad.tasks import Task
from rlad.teachers.base import TeacherRequest


class TaskRollouts:
    """The training problems of a run for TRL, and the groups that it has sampled."""

    def __init__(self, config: RunConfig, student: LanguageModel, task: Task, timer: Timer):
        self.config = config
        self.student = student
        self.task = task
        self.timer = timer
        self.groups: list[RolloutGroup] = []
        """The groups of the latest generation batch, from all processes."""
        self._first = 0
        self.asked = lru_cache(maxsize=4 * config.rollout.prompts_per_batch)(self._asked)

    def _asked(self, index: int) -> Asked:
        """Return a training problem and its prompt. Raises `UserError` for a problem with pictures,
        since TRL gets only the text."""
        config = self.config
        (asked,) = asked_prompts(
            self.student, self.task, "train", [index], config.rollout, config.seed
        )
        if asked.problem.images:
            raise UserError(
                "a problem has pictures, but engine.type = 'trl' trains on texts; use 'native'."
            )
        return asked

    def dataset(self) -> Dataset:
        """Return a row for each training problem, in the native engine's order; problems are made
        when they are read."""
        rollout = self.config.rollout
        number = self.config.optimization.num_rollout_batches * rollout.prompts_per_batch

        def with_prompts(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
            return {"prompt": [self._prompt(i) for i in rows["index"]], "index": rows["index"]}

        return Dataset.from_dict({"index": range(number)}).with_transform(with_prompts)

    def _prompt(self, index: int) -> str | list[dict[str, str]]:
        rollout = self.config.rollout
        asked = self.asked(index).problem.asked
        if is_plain(self.student.tokenizer, rollout.prompt_format):
            return plain_text(asked, rollout)
        return chat_messages(asked, rollout.system_prompt)

    def reward(
        self, completion_ids: list[list[int]], index: list[int], **columns: Any
    ) -> list[float | None]:
        """Grade this process's completions, and join them with those of the others in `groups`."""
        with self.timer("rewards"):
            rollouts = list(map(self._graded, index, completion_ids))
            rows = gather_object(list(zip(index, rollouts, strict=True)))
        size = self.config.rollout.group_size
        self.groups = []
        for start in range(0, len(rows), size):
            indices, group = zip(*rows[start : start + size], strict=True)
            asked = self.asked(indices[0])
            self.groups.append(RolloutGroup(indices[0], asked.problem, tuple(asked.prompt), group))
        self._first = len(rollouts) * Accelerator().process_index
        return [None if math.isnan(rollout.reward) else rollout.reward for rollout in rollouts]

    def _graded(self, index: int, token_ids: list[int]) -> Rollout:
        asked = self.asked(index)
        is_truncated = token_ids[-1] not in self.student.eos_token_ids
        # TRL does not pass on the sampler's log-probs.
        completion = Completion(tuple(token_ids), (), is_truncated)
        begun = begun_completion(self.student.tokenizer, asked.prompt)
        (rollout,) = grade(
            self.task, asked.problem, asked.name, [completion], self.student, lambda: None, begun
        )
        return rollout

    def teacher_request(self, number: int) -> TeacherRequest:
        """Return the request to the teacher about a completion of this process, by its index."""
        group, place = divmod(self._first + number, self.config.rollout.group_size)
        return teacher_request(self.groups[group], place)
