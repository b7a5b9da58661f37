"""Held-out evaluation: sample and grade problems that were not trained on."""

from collections.abc import Callable

from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.types import RolloutGroup, Sampler
from rlad.runs.rows import ProblemResult
from rlad.seeds import stream_seed
from rlad.tasks import Split, Task, Verdict


def evaluate(
    language_model: LanguageModel,
    task: Task,
    split: Split,
    *,
    rollout: RolloutConfig,
    num_problems: int,
    num_samples: int,
    temperature: float,
    sampler: Sampler | None = None,
    before_work: Callable[[], None] = lambda: None,
) -> list[ProblemResult]:
    """Sample and grade the first `num_problems` problems of a split, with the prompt format and the
    limits of `rollout`.

    Prompts and sampling seeds are the same for every run and model, so two results can be compared
    prompt by prompt. `sampler`, `before_work` and errors are those of `graded_groups`.
    """
    available = task.num_problems(split)
    groups = graded_groups(
        language_model,
        task,
        split,
        range(num_problems if available is None else min(num_problems, available)),
        rollout=rollout.model_copy(update={"group_size": num_samples, "temperature": temperature}),
        seed=stream_seed(0, "evaluation", split),
        sampler=sampler,
        before_work=before_work,
    )
    return [_result(group) for group in groups]


def _result(group: RolloutGroup) -> ProblemResult:
    problem = group.problem
    rollouts = group.rollouts
    verdicts = [rollout.verdict for rollout in rollouts]
    num_turns = sum(len(rollout.turns) for rollout in rollouts)
    num_tokens = sum(rollout.completion.num_actions for rollout in rollouts)
    return ProblemResult(
        index=group.problem_index,
        key=problem.key,
        difficulty=problem.difficulty,
        num_samples=len(rollouts),
        num_correct=verdicts.count(Verdict.CORRECT),
        num_cannot_judge=verdicts.count(Verdict.CANNOT_JUDGE),
        num_truncated=sum(rollout.completion.is_truncated for rollout in rollouts),
        mean_completion_tokens=num_tokens / len(rollouts),
        prompt=problem.prompt,
        first_completion=rollouts[0].text,
        mean_turns=num_turns / len(rollouts) if num_turns else None,
    )
