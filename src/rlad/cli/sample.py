"""`rlad sample`: graded completions of the student with the teacher's log-probs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor

from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student
from rlad.rollouts.prompts import check_prompt_length, prompt_token_ids
from rlad.rollouts.sampling import sample
from rlad.rollouts.types import Completion
from rlad.runs.directory import RunDirectory
from rlad.seeds import stream_seed
from rlad.tasks import Problem, Task, make_task
from rlad.tasks.base import judge_completion
from rlad.teachers import prepare_teacher
from rlad.teachers.base import TeacherRequest
from rlad.text import printable

_COLOURS = {"correct": "green", "wrong": "red", "cannot_judge": "yellow"}
Row = dict[str, Any]


def preview(config: RunConfig, *, num_prompts: int) -> list[Row]:
    """Completions of the first validation prompts, graded and scored; one row per completion.

    The student is the last checkpoint in the config's run directory when that holds this very run,
    else the initial student.
    """
    run, rollout = RunDirectory(config.directory), config.rollout
    is_this_run = run.exists() and load_config(run.path).digest == config.digest
    has_checkpoint = is_this_run and run.checkpoints()
    student = load_student(config, run.newest_checkpoint()[1] if has_checkpoint else None)
    teacher, task = prepare_teacher(config, student), make_task(**config.task.model_dump())
    try:
        problems = [task.problem("validation", i) for i in range(num_prompts)]
        prompts = [prompt_token_ids(student.tokenizer, p.asked, rollout) for p in problems]
        for i, prompt in enumerate(prompts):
            check_prompt_length(
                len(prompt), f"validation problem {i}", rollout, student.context_tokens
            )
        groups = sample(
            student,
            prompts,
            group_size=rollout.group_size,
            max_completion_tokens=rollout.max_completion_tokens,
            temperature=rollout.temperature,
            seed=stream_seed(config.seed, "preview"),
            max_batch_rows=rollout.max_batch_rows,
        )
        rows = []
        for problem, prompt, group in zip(problems, prompts, groups, strict=True):
            ids = [list(completion.token_ids) for completion in group]
            requests = [TeacherRequest(prompt, completion, problem) for completion in ids]
            scored = teacher.logprobs(requests) if teacher else [None] * len(group)
            rows += [
                _row(student, task, problem, *pair) for pair in zip(group, scored, strict=True)
            ]
        return rows
    finally:
        task.close()
        if teacher:
            teacher.close()


def _row(
    student: LanguageModel,
    task: Task,
    problem: Problem,
    completion: Completion,
    teacher_logprobs: Tensor | None,
) -> Row:
    token_ids = list(completion.token_ids)
    (text,) = student.tokenizer.batch_decode([token_ids], skip_special_tokens=True)
    judgement = judge_completion(task, problem, text, is_truncated=completion.is_truncated)
    return {
        "student": student.name,
        "prompt": problem.prompt,
        "completion": text,
        "verdict": str(judgement.verdict),
        "reward": _finite(judgement.reward),
        "reason": judgement.reason,
        "is_truncated": completion.is_truncated,
        "tokens": student.tokenizer.convert_ids_to_tokens(token_ids),
        "student_logprobs": list(completion.logprobs),
        "teacher_logprobs": None
        if teacher_logprobs is None
        else [_finite(value) for value in teacher_logprobs.tolist()],
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN: a reward that was not given and a token that was not scored are null."""
    return value if math.isfinite(value) else None


def print_preview(rows: Iterable[Row], console: Console | None = None) -> None:
    """Each prompt once, then its completions with verdict, reward and log-ratio to the teacher."""
    console = console or Console(highlight=False)
    prompt = None
    for row in rows:
        if prompt is None:
            console.print(Text(f"student: {printable(row['student'])}"), soft_wrap=True)
        if row["prompt"] != prompt:
            prompt = row["prompt"]
            console.rule(style="dim")
            console.print(Text(printable(prompt).strip(), style="bold"), soft_wrap=True)
        console.print(
            Text(f"\n{row['verdict']}", style=_COLOURS[row["verdict"]]).append(
                _details(row), style="default"
            )
        )
        console.print(Text(printable(row["completion"])), soft_wrap=True)


def _details(row: Row) -> str:
    reward = "" if row["reward"] is None else f"  reward {row['reward']:g}"
    reason = f"  ({printable(row['reason'])})" if row["reason"] else ""
    truncated = ", truncated" if row["is_truncated"] else ""
    return f"{reward}{reason}  {len(row['tokens'])} tokens{truncated}{_opinion(row)}"


def _opinion(row: Row) -> str:
    """The teacher's: mean of log πS - log πT over the tokens, and the token at which it is
    largest."""
    scored: Sequence[float | None] = row["teacher_logprobs"] or []
    ratios = {i: row["student_logprobs"][i] - t for i, t in enumerate(scored) if t is not None}
    if not ratios:
        return ""
    most = max(ratios, key=lambda i: abs(ratios[i]))
    mean = sum(ratios.values()) / len(ratios)
    return f"\nlog πS - log πT: mean {mean:+.3f}, largest {ratios[most]:+.2f} at token {most + 1} {row['tokens'][most]!r}"
