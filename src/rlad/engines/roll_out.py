"""Graded completions of training problems, by the student or by a teacher: what every engine starts from."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rlad.config import RunConfig
from rlad.language_model import LanguageModel
from rlad.metrics import Metrics
from rlad.prompts import check_prompt_length, prompt_token_ids
from rlad.rollouts import Rollout, RolloutGroup
from rlad.sampling import sample
from rlad.tasks import Task


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
) -> list[RolloutGroup]:
    """A graded group of completions by `writer` for each training problem, prompted as the student is.

    The time that it takes is noted in `seconds`. `before_work` is called before every token and every completion is judged.
    """
    rollout, tokenizer = config.rollout, student.tokenizer
    problems = [task.problem("train", i, seed=config.seed) for i in indices]
    with timed(seconds, "time/generation/seconds"):
        prompts = [prompt_token_ids(tokenizer, problem.prompt, rollout.prompt_format) for problem in problems]
        for i, prompt in zip(indices, prompts, strict=True):
            check_prompt_length(len(prompt), f"training problem {i}", rollout, student.context_tokens)
        completions = sample(
            writer,
            prompts,
            group_size=rollout.group_size,
            max_completion_tokens=rollout.max_completion_tokens,
            temperature=rollout.temperature,
            seed=seed,
            max_batch_rows=rollout.max_batch_rows,
            before_token=before_work,
        )
    groups = []
    with timed(seconds, "time/rewards/seconds"):
        for i, problem, prompt, group in zip(indices, problems, prompts, completions, strict=True):
            texts = tokenizer.batch_decode([list(c.token_ids) for c in group], skip_special_tokens=True)
            rollouts = []
            for completion, text in zip(group, texts, strict=True):
                before_work()
                judgement = task.judge(problem, text)
                rollouts.append(Rollout(completion, text, str(judgement.verdict), judgement.reward))
            groups.append(RolloutGroup(i, problem.prompt, tuple(prompt), tuple(rollouts)))
    return groups


@contextmanager
def timed(seconds: Metrics, key: str) -> Iterator[None]:
    """Notes how long the block took."""
    started = time.monotonic()
    yield
    seconds[key] = time.monotonic() - started
