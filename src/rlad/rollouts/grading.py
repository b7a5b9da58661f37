"""Graded completions of training problems, by the student or by a teacher: what every engine starts
from."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rlad.config.run import RunConfig
from rlad.models.loading import LanguageModel
from rlad.rollouts.prompts import check_prompt_length, prompt_token_ids
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Completion, Metrics, Rollout, RolloutGroup
from rlad.tasks import Task
from rlad.tasks.base import judge_completion, require_reward_in_range


def roll_out(
    config: RunConfig,
    task: Task,
    indices: Sequence[int],
    *,
    writer: LanguageModel,
    student: LanguageModel,
    seed: int,
    seconds: Metrics,
    before_work: Callable[[], None],
    first_group: int = 0,
    after_group: Callable[[int, RolloutGroup], None] = lambda number, group: None,
) -> list[RolloutGroup]:
    """A graded group of completions by `writer` for each training problem, prompted as the student
    is.

    A group is graded when the last of its completions has ended, and then given to `after_group`
    with its place in `indices`, while others are still written. The time that writing and grading
    take is noted in `seconds`. `before_work` is called before every token and every completion is
    judged. `first_group` is how many groups of the batch others write.
    """
    rollout, tokenizer = config.rollout, student.tokenizer
    problems = [task.problem("train", i, seed=config.seed) for i in indices]
    groups: dict[int, RolloutGroup] = {}
    spent: Metrics = {"all": 0.0, "rewards": 0.0, "after groups": 0.0}

    def grade(number: int, completions: list[Completion]) -> None:
        problem = problems[number]
        with timed(spent, "rewards"):
            texts = tokenizer.batch_decode(
                [list(c.token_ids) for c in completions], skip_special_tokens=True
            )
            rollouts = []
            for completion, text in zip(completions, texts, strict=True):
                before_work()
                judgement = judge_completion(
                    task, problem, text, is_truncated=completion.is_truncated
                )
                require_reward_in_range(task, judgement, f"training problem {indices[number]}")
                rollouts.append(Rollout(completion, text, str(judgement.verdict), judgement.reward))
            groups[number] = RolloutGroup(
                indices[number], problem.prompt, tuple(prompts[number]), tuple(rollouts)
            )
        with timed(spent, "after groups"):
            after_group(number, groups[number])

    with timed(spent, "all"):
        prompts = [prompt_token_ids(tokenizer, problem.asked, rollout) for problem in problems]
        for i, prompt in zip(indices, prompts, strict=True):
            check_prompt_length(
                len(prompt), f"training problem {i}", rollout, student.context_tokens
            )
        sample(
            writer,
            prompts,
            group_size=rollout.group_size,
            max_completion_tokens=rollout.max_completion_tokens,
            temperature=rollout.temperature,
            seed=seed,
            first_row=first_group * rollout.group_size,
            max_batch_rows=rollout.max_batch_rows,
            before_token=before_work,
            after_group=grade,
        )
    before_work()  # a signal to all processes may have ended the verifier's before a completion was judged
    seconds["time/rewards/seconds"] = spent["rewards"]
    seconds["time/generation/seconds"] = spent["all"] - spent["rewards"] - spent["after groups"]
    return [groups[number] for number in range(len(groups))]


@contextmanager
def timed(seconds: Metrics, key: str) -> Iterator[None]:
    """Adds how long the block took."""
    started = time.monotonic()
    yield
    seconds[key] = seconds.get(key, 0.0) + time.monotonic() - started
