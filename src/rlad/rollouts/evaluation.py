"""Held-out evaluation: sampling and grading problems that were not trained on."""

from collections.abc import Callable, Sequence

from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel
from rlad.rollouts.prompts import check_prompt_length, prompt_token_ids
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Completion
from rlad.runs.results import ProblemResult
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Split, Task, Verdict
from rlad.tasks.base import judge_completion


def evaluate(
    language_model: LanguageModel,
    task: Task,
    split: Split,
    *,
    rollout: RolloutConfig,
    num_problems: int,
    num_samples: int,
    temperature: float,
    before_token: Callable[[], None] = lambda: None,
    share: Callable[[int], range] = range,
) -> list[ProblemResult]:
    """Sample and grade the first `num_problems` problems of a split, with the prompt format and the
    limits of `rollout`.

    Prompts and sampling seeds are the same for every run and model, so two results can be compared
    prompt by prompt. `share` picks, of the number of problems, those that this process takes.
    `before_token` is called before every decoding step and every problem that is graded, and may
    raise. Raises `UserError` for a prompt that leaves no room for its completion.
    """
    available = task.num_problems(split)
    indices = share(num_problems if available is None else min(num_problems, available))
    problems = [task.problem(split, i) for i in indices]
    prompts = [prompt_token_ids(language_model.tokenizer, p.asked, rollout) for p in problems]
    for i, prompt in zip(indices, prompts, strict=True):
        check_prompt_length(
            len(prompt), f"{split} problem {i}", rollout, language_model.context_tokens
        )
    groups = sample(
        language_model,
        prompts,
        group_size=num_samples,
        max_completion_tokens=rollout.max_completion_tokens,
        temperature=temperature,
        seed=stream_seed(0, "evaluation", split),
        first_row=indices.start * num_samples,
        max_batch_rows=rollout.max_batch_rows,
        before_token=before_token,
    )
    results = []
    for index, problem, group in zip(indices, problems, groups, strict=True):
        before_token()
        results.append(_grade(language_model, task, index, problem, group))
    before_token()  # a signal to all processes may have ended the verifier's before a completion was judged
    return results


def _grade(
    language_model: LanguageModel,
    task: Task,
    index: int,
    problem: Problem,
    completions: Sequence[Completion],
) -> ProblemResult:
    texts = language_model.tokenizer.batch_decode(
        [list(c.token_ids) for c in completions], skip_special_tokens=True
    )
    verdicts = [
        judge_completion(task, problem, text, is_truncated=completion.is_truncated).verdict
        for text, completion in zip(texts, completions, strict=True)
    ]
    return ProblemResult(
        index=index,
        key=problem.key,
        difficulty=problem.difficulty,
        num_samples=len(completions),
        num_correct=verdicts.count(Verdict.CORRECT),
        num_cannot_judge=verdicts.count(Verdict.CANNOT_JUDGE),
        num_truncated=sum(c.is_truncated for c in completions),
        mean_completion_tokens=sum(len(c.token_ids) for c in completions) / len(completions),
        prompt=problem.prompt,
        first_completion=texts[0],
    )
