"""Make graded groups of completions from problems: prompt, length check, sampling, grading.

Training, evaluation, `rlad sample` and `rlad check` all use this file.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.models.loading import LanguageModel
from rlad.models.pictures import held
from rlad.rollouts.episodes import EpisodePlayer
from rlad.rollouts.prompts import check_prompt_length, prompt_token_ids
from rlad.rollouts.sampling import OwnSampler
from rlad.rollouts.texts import begun_completion, completion_texts
from rlad.rollouts.types import Asked, Completion, Rollout, RolloutGroup, Sampler
from rlad.tasks import Problem, Split, Task
from rlad.tasks.base import judge_completion, require_reward_in_range
from rlad.tasks.episodes import episode_rules


class Timer:
    """Seconds by part. Time of a part inside another counts only for the inner part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        key = f"time/{part}/seconds"
        started = time.monotonic()
        counted = sum(self.seconds.values())
        yield
        # Time that inner parts have counted is subtracted.
        inner = sum(self.seconds.values()) - counted
        own = time.monotonic() - started - inner
        self.seconds[key] = self.seconds.get(key, 0.0) + own


def graded_groups(
    student: LanguageModel,
    task: Task,
    split: Split,
    indices: Sequence[int],
    *,
    rollout: RolloutConfig,
    seed: int,
    problem_seed: int = 0,
    sampler: Sampler | None = None,
    before_work: Callable[[], None] = lambda: None,
    after_group: Callable[[int, RolloutGroup], None] = lambda number, group: None,
    timer: Timer | None = None,
) -> list[RolloutGroup]:
    """Sample and grade `rollout.group_size` completions, or play as many episodes, for each problem
    of a split.

    `sampler` is by default our own with the student. `seed` is the sampler's, `problem_seed` the
    task's. A group is graded once its last completion has ended, and then passed to `after_group`
    with its position in `indices`, while others are still sampled. `before_work` is called before
    every token and before every completion is graded; it may raise. Raises `UserError` for a prompt
    that leaves no room for its completion.
    """
    timer = timer or Timer()
    sampler = sampler or OwnSampler(student, rollout)
    groups: dict[int, RolloutGroup] = {}

    def grade_group(number: int, completions: list[Completion]) -> None:
        one = asked[number]
        with timer("rewards"):
            prompt = held(one.prompt)
            begun = begun_completion(student.tokenizer, prompt)
            rollouts = grade(task, one.problem, one.name, completions, student, before_work, begun)
            groups[number] = RolloutGroup(indices[number], one.problem, prompt, rollouts)
        after_group(number, groups[number])

    def add_episodes(number: int, rollouts: tuple[Rollout, ...]) -> None:
        one = asked[number]
        for rollout in rollouts:
            require_reward_in_range(task, rollout, one.name)
        groups[number] = RolloutGroup(indices[number], one.problem, tuple(one.prompt), rollouts)
        after_group(number, groups[number])

    rules = episode_rules(task)
    with timer("generation"):
        asked = asked_prompts(student, task, split, indices, rollout, problem_seed)
        if rules is not None:
            _require_no_pictures(task, asked)
            EpisodePlayer(
                student,
                rules,
                rollout=rollout,
                sampler=sampler,
                seed=seed,
                before_work=before_work,
                after_group=add_episodes,
                timer=timer,
            ).play(asked)
        else:
            sampler.sample(
                [one.prompt for one in asked],
                group_size=rollout.group_size,
                max_completion_tokens=rollout.max_completion_tokens,
                temperature=rollout.temperature,
                seed=seed,
                before_token=before_work,
                after_group=grade_group,
            )
    # A signal to all processes may have ended the verifier's process before a completion was
    # judged. The run then stops here, without recording what could not be judged.
    before_work()
    return [groups[number] for number in range(len(groups))]


def _require_no_pictures(task: Task, asked: Sequence[Asked]) -> None:
    if any(one.problem.images for one in asked):
        raise UserError(
            f"task {task.name!r} has episodes with pictures, but episodes support only text; leave "
            "the pictures out, or the episodes."
        )


def asked_prompts(
    student: LanguageModel,
    task: Task,
    split: Split,
    indices: Sequence[int],
    rollout: RolloutConfig,
    problem_seed: int,
) -> list[Asked]:
    """Return some problems of a split with their prompts. Raises `UserError` for a prompt that
    leaves no room for its completion."""
    asked = []
    for index in indices:
        problem = task.problem(split, index, seed=problem_seed)
        name = f"{'training' if split == 'train' else split} problem {index}"
        prompt = prompt_token_ids(
            student.tokenizer, problem.asked, rollout, problem.images, student.vision
        )
        check_prompt_length(len(prompt), name, rollout, student.context_tokens)
        asked.append(Asked(problem, name, prompt))
    return asked


def grade(
    task: Task,
    problem: Problem,
    name: str,
    completions: Sequence[Completion],
    student: LanguageModel,
    before_work: Callable[[], None],
    begun: str = "",
) -> tuple[Rollout, ...]:
    """Grade the completions of a problem, called `name` in messages; `begun` is the part of each
    that the prompt already contains."""
    texts = completion_texts(student.tokenizer, completions)
    rollouts = []
    for completion, text in zip(completions, texts, strict=True):
        before_work()
        judgement = judge_completion(
            task, problem, begun + text, is_truncated=completion.is_truncated
        )
        require_reward_in_range(task, judgement, name)
        rollouts.append(
            Rollout(
                completion,
                text,
                str(judgement.verdict),
                judgement.reward,
                judgement.reason,
                judgement.feedback,
            )
        )
    return tuple(rollouts)
