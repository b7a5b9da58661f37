"""`rlad evaluate`: results of a run's best checkpoint, or of any model, on held-out problems."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rlad.cli.printing import print_line, print_table
from rlad.config.file import load_config, parse_config, parse_overrides
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.models.files import EMBEDDED
from rlad.models.loading import load_language_model
from rlad.rollouts.evaluation import evaluate
from rlad.rollouts.samplers import make_sampler
from rlad.runs.checkpoints import damage
from rlad.runs.directory import CHECKPOINTS, RunDirectory
from rlad.runs.rows import ProblemResult, summarise
from rlad.tasks import Split, make_task


def run_evaluation(
    run_or_model: str, overrides: Sequence[str], *, as_json: bool, **how: Any
) -> None:
    """Evaluate and print the summary, as a table or as JSON."""
    about, results = evaluate_run_or_model(run_or_model, overrides, **how)
    if as_json:
        click.echo(json.dumps(about | summarise([results]), default=asdict))
    else:
        print_summary(about, results, Console(highlight=False))


def evaluate_run_or_model(
    run_or_model: str,
    overrides: Sequence[str],
    task_type: str | None,
    split: Split,
    num_problems: int | None,
    num_samples: int,
    output: Path | None,
) -> tuple[dict[str, str], list[ProblemResult]]:
    """Evaluate on each held-out problem, and write the results to `output` as JSONL, if given.

    Returns the names of model, task and split, and the results.
    """
    if output is not None and (output.exists() or not output.parent.is_dir()):
        raise UserError(
            f"--output {output} exists already or its folder does not exist; give a new file."
        )
    another = [f"task={task_type}", "evaluation.ood_task={}"] if task_type else []
    config, model = _config_and_model(run_or_model, [*another, *overrides])
    settings = config.student
    with closing(make_task(**config.task.model_dump())) as task:
        student = load_language_model(
            model, dtype=settings.dtype, device=settings.device, end_tokens=settings.end_tokens
        )
        with closing(make_sampler(student, config.rollout)) as sampler:
            results = evaluate(
                student,
                task,
                split,
                rollout=config.rollout,
                num_problems=num_problems or config.evaluation.num_test_problems,
                num_samples=num_samples,
                temperature=config.evaluation.temperature,
                sampler=sampler,
            )
    about = {"model": model, "task": config.task.type, "split": split}
    if output is not None:
        lines = [json.dumps(about | result.to_json()) + "\n" for result in results]
        output.write_text("".join(lines), encoding="utf-8")
    return about, results


def _config_and_model(run_or_model: str, overrides: Sequence[str]) -> tuple[RunConfig, str]:
    """Return the config and the model. The task must be known."""
    is_known = any(override.startswith(("task=", "task.type=")) for override in overrides)
    if not is_known and not brings_its_task(run_or_model):
        raise UserError(
            f"{run_or_model!r} is not a run directory, so its task is unknown; add --task, for "
            "example --task knights_and_knaves."
        )
    return resolve_run_or_model(run_or_model, overrides)


def brings_its_task(run_or_model: str) -> bool:
    """Return whether the task is known: for a run, a checkpoint of one, or an embedded model."""
    path = Path(run_or_model)
    is_checkpoint = path.parent.name == CHECKPOINTS and RunDirectory(path.parents[1]).exists()
    return RunDirectory(path).exists() or is_checkpoint or run_or_model in EMBEDDED


def resolve_run_or_model(run_or_model: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """Return the config and the model. For a run, this is its best checkpoint. A checkpoint has the
    config of its run, an embedded model that of the example, and any other model the defaults."""
    path = Path(run_or_model)
    if RunDirectory(path).exists():
        return load_config(path, overrides), str(RunDirectory(path).best_checkpoint()[1])
    if path.parent.name == CHECKPOINTS and RunDirectory(path.parents[1]).exists():
        if reason := damage(path):
            raise UserError(
                f"checkpoint {path} is damaged ({reason}); give another one, or the run directory "
                "itself."
            )
        return load_config(path.parents[1], overrides), run_or_model
    if run_or_model in EMBEDDED:
        return load_config(None, overrides), run_or_model
    table = {"student": {"model": run_or_model}, "objective": {"type": "grpo"}}
    table |= {"task": {"type": "knights_and_knaves"}}  # a placeholder
    return parse_config(parse_overrides(table, overrides)), run_or_model


def print_summary(
    about: Mapping[str, str], results: Sequence[ProblemResult], console: Console
) -> None:
    """Print a table of the summary."""
    summary = summarise([results])
    n = summary["num_samples"]
    rows = [("quantity", "value (95 % interval over problems)")]
    rows.append((f"mean@{n}", str(summary[f"mean@{n}"])))
    rows += [(f"pass@{k}", str(estimate)) for k, estimate in summary["pass@k"].items()]
    for difficulty, estimate in summary["pass@1 by difficulty"].items():
        rows.append((f"pass@1, {difficulty}", str(estimate)))
    rows.append(("mean completion length", f"{summary['mean_completion_tokens']:.1f} tokens"))
    if "mean_turns" in summary:
        rows.append(("mean turns", f"{summary['mean_turns']:.1f}"))
    rows.append(("truncated", f"{summary['truncated_share']:.1%}"))
    rows.append(("could not be judged", f"{summary['cannot_judge_share']:.1%}"))
    what = f"{summary['num_problems']} {about['split']} problems of {about['task']} x {n} samples"
    print_line(console, f"{about['model']}\n{what}\n")
    print_table(console, rows)
