"""`rlad sample`: graded completions of the student with the teacher's log-probs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rlad.config import RunConfig
from rlad.console import printable
from rlad.language_model import load_language_model
from rlad.prompts import prompt_token_ids
from rlad.run_dir import RunDirectory
from rlad.sampling import sample
from rlad.seeds import stream_seed
from rlad.tasks import make_task
from rlad.training import make_teacher

_COLOURS = {"correct": "green", "wrong": "red", "cannot_judge": "yellow"}


def preview(config: RunConfig, *, num_prompts: int) -> list[dict[str, Any]]:
    """Completions of the first validation prompts, graded and scored; one row per completion.

    The student is the last checkpoint of the config's run directory where there is one, else the initial student.
    """
    trained = RunDirectory(Path(config.directory)).checkpoints()
    name = str(trained[-1][1]) if trained else config.student.model
    student = load_language_model(name, dtype=config.student.dtype, device=config.student.device)
    teacher, task, rollout = make_teacher(config, student), make_task(**config.task.model_dump()), config.rollout
    problems = [task.problem("validation", i) for i in range(num_prompts)]
    prompts = [prompt_token_ids(student.tokenizer, p.prompt, rollout.prompt_format) for p in problems]
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
        completions = [list(c.token_ids) for c in group]
        scored = teacher.logprobs([prompt] * len(group), completions) if teacher else [None] * len(group)
        for completion, teacher_logprobs in zip(group, scored, strict=True):
            text = student.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            judgement = task.judge(problem, text)
            rows.append(
                {
                    "student": name,
                    "prompt": problem.prompt,
                    "completion": text,
                    "verdict": str(judgement.verdict),
                    "reward": judgement.reward,
                    "reason": judgement.reason,
                    "is_truncated": completion.is_truncated,
                    "tokens": student.tokenizer.convert_ids_to_tokens(list(completion.token_ids)),
                    "student_logprobs": list(completion.logprobs),
                    "teacher_logprobs": None if teacher_logprobs is None else teacher_logprobs.tolist(),
                }
            )
    task.close()
    return rows


def print_preview(rows: Iterable[dict[str, Any]], console: Console | None = None) -> None:
    """Each prompt once, then its completions with verdict, reward and mean log-ratio to the teacher."""
    console = console or Console(highlight=False)
    prompt = None
    for row in rows:
        if row["prompt"] != prompt:
            prompt = row["prompt"]
            console.rule(style="dim")
            console.print(Text(printable(prompt).strip(), style="bold"))
        head = Text(f"\n{row['verdict']}", style=_COLOURS[row["verdict"]])
        head.append(f"  reward {row['reward']:g}, {len(row['tokens'])} tokens" + (", truncated" if row["is_truncated"] else ""))
        if row["teacher_logprobs"] is not None:
            ratios = [s - t for s, t in zip(row["student_logprobs"], row["teacher_logprobs"], strict=True)]
            most = max(range(len(ratios)), key=lambda i: abs(ratios[i]))
            head.append(
                f", log πS - log πT: mean {sum(ratios) / len(ratios):+.3f}, "
                f"largest {ratios[most]:+.2f} at token {most + 1} {row['tokens'][most]!r}"
            )
        console.print(head)
        console.print(Text(printable(row["completion"])))
