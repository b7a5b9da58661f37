"""`rlad sample`: graded completions of the student, with the teacher's log-probs."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from torch import Tensor

from rlad.cli.printing import print_line
from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.engines.rollout_batch import teacher_request
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.samplers import make_sampler
from rlad.rollouts.types import Rollout, RolloutGroup
from rlad.runs.directory import RunDirectory
from rlad.seeds import stream_seed
from rlad.tasks import make_task
from rlad.teachers import prepare_teacher

_COLOURS = {"correct": "green", "wrong": "red", "cannot_judge": "yellow"}
Row = dict[str, Any]


def show_samples(config: RunConfig, *, num_prompts: int, as_json: bool) -> None:
    """Print graded completions, as text or as JSON lines."""
    rows = preview(config, num_prompts=num_prompts)
    if as_json:
        click.echo("\n".join(map(json.dumps, rows)))
    else:
        print_preview(rows, Console(highlight=False))


def preview(config: RunConfig, *, num_prompts: int) -> list[Row]:
    """Grade and score completions of the first validation prompts; return one row per completion.

    The student is the last checkpoint in the config's run directory if that contains a run with
    the same settings, otherwise the initial student.
    """
    run = RunDirectory(config.directory)
    is_this_run = run.exists() and load_config(run.path).digest == config.digest
    has_checkpoint = is_this_run and run.checkpoints()
    student = load_student(config, run.newest_checkpoint()[1] if has_checkpoint else None)
    teacher = prepare_teacher(config, student)
    with ExitStack() as stack:
        if teacher is not None:
            stack.enter_context(closing(teacher))
        task = stack.enter_context(closing(make_task(**config.task.model_dump())))
        sampler = stack.enter_context(closing(make_sampler(student, config.rollout)))
        groups = graded_groups(
            student,
            task,
            "validation",
            range(num_prompts),
            rollout=config.rollout,
            seed=stream_seed(config.seed, "preview"),
            sampler=sampler,
        )
        rows = []
        for group in groups:
            requests = [teacher_request(group, place) for place in range(len(group.rollouts))]
            speaks = [teacher is not None and teacher.speaks(request) for request in requests]
            asked = [one for one, does in zip(requests, speaks, strict=True) if does]
            scored = iter(teacher.logprobs(asked) if teacher else [])
            for rollout, does in zip(group.rollouts, speaks, strict=True):
                row = _row(student, group.prompt, rollout, next(scored) if does else None)
                rows.append(row | _pictures(group))
    return rows


def _pictures(group: RolloutGroup) -> Row:
    """Name the pictures of a prompt, if it has any."""
    names = [picture.name or picture.digest for picture in group.problem.images]
    return {"pictures": names} if names else {}


def _row(
    student: LanguageModel, prompt: str, rollout: Rollout, teacher_logprobs: Tensor | None
) -> Row:
    """Describe one completion. A missing reward or score is None, as JSON has no NaN."""
    token_ids = list(rollout.completion.token_ids)
    completion = rollout.completion
    scores = [] if teacher_logprobs is None else teacher_logprobs.tolist()
    if completion.actions is not None:  # tokens that the environment wrote are not scored
        scores = [x if a else math.nan for x, a in zip(scores, completion.actions, strict=False)]
    episode: Row = {}
    if completion.actions is not None:
        episode = {
            "ending": completion.ending,
            "turns": [asdict(turn) for turn in rollout.turns],
            "actions": list(completion.actions),
        }
    return {
        "student": student.name,
        "prompt": prompt,
        "completion": rollout.text,
        "verdict": rollout.verdict,
        "reward": rollout.reward if math.isfinite(rollout.reward) else None,
        "reason": rollout.reason,
        "is_truncated": rollout.completion.is_truncated,
        "tokens": student.tokenizer.convert_ids_to_tokens(token_ids),
        "student_logprobs": list(rollout.completion.logprobs),
        "teacher_logprobs": [x if math.isfinite(x) else None for x in scores] or None,
        **episode,
    }


def print_preview(rows: Iterable[Row], console: Console) -> None:
    """Print each prompt once, followed by its completions with verdict, reward and log-ratio to
    the teacher."""
    shown = None
    for row in rows:
        if shown is None:
            print_line(console, f"student: {row['student']}")
        if (row["prompt"], row.get("pictures")) != shown:
            prompt = row["prompt"]
            shown = prompt, row.get("pictures")
            console.rule(style="dim")
            print_line(console, prompt.strip(), "bold")
            for name in row.get("pictures", []):
                print_line(console, f"picture: {name}")
        reward = "" if row["reward"] is None else f"  reward {row['reward']:g}"
        reason = f"  ({row['reason']})" if row["reason"] else ""
        truncated = ", truncated" if row["is_truncated"] else ""
        details = f"{reward}{reason}  {len(row['tokens'])} tokens{truncated}{_opinion(row)}"
        if "turns" in row:
            details = f"  {len(row['turns'])} turns, ended by {row['ending']}{details}"
        print_line(console, f"\n{row['verdict']}{details}", _COLOURS[row["verdict"]])
        if "turns" in row:
            _print_conversation(row["turns"], console)
        else:
            print_line(console, row["completion"])


def _print_conversation(turns: Sequence[Row], console: Console) -> None:
    """Print an episode: each turn of the student, and the reply of the environment."""
    for turn in turns:
        print_line(console, turn["text"].strip() or "(nothing)")
        reward = f"  [reward {turn['reward']:g}]" if turn["reward"] else ""
        reply = "\n".join(f"  | {line}" for line in f"{turn['reply']}{reward}".splitlines())
        if reply:
            print_line(console, reply, "dim")


def _opinion(row: Row) -> str:
    """Describe log πS - log πT: its mean over the tokens, and the token where its size is
    largest."""
    scored: Sequence[float | None] = row["teacher_logprobs"] or []
    ratios = {i: row["student_logprobs"][i] - t for i, t in enumerate(scored) if t is not None}
    if not ratios:
        return ""
    most = max(ratios, key=lambda i: abs(ratios[i]))
    mean = sum(ratios.values()) / len(ratios)
    return (
        f"\nlog πS - log πT: mean {mean:+.3f}, largest {ratios[most]:+.2f} at token {most + 1} "
        f"{row['tokens'][most]!r}"
    )
