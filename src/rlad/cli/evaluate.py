"""`rlad evaluate`: held-out figures of a run's best checkpoint or of any model."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlad.config.file import load_config, parse_config, parse_overrides
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.models.files import EMBEDDED
from rlad.models.loading import load_language_model
from rlad.rollouts.evaluation import evaluate
from rlad.runs.checkpoints import damage
from rlad.runs.directory import CHECKPOINTS, RunDirectory
from rlad.runs.rows import ProblemResult, summarise
from rlad.runs.statistics import Estimate
from rlad.tasks import Split, make_task
from rlad.text import printable


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Which model was evaluated on what, and the result of each problem."""

    model: str
    task: str
    split: Split
    results: list[ProblemResult]

    def summary_json(self) -> dict[str, Any]:
        """Return the summary with intervals as plain JSON."""
        return {"model": self.model, "task": self.task, "split": self.split} | _plain(
            summarise([self.results])
        )


def run_evaluation(
    run_or_model: str, overrides: Sequence[str], *, as_json: bool, **how: Any
) -> None:
    """Evaluate and print the summary, for a reader or as JSON."""
    evaluation = evaluate_run_or_model(run_or_model, overrides, **how)
    if as_json:
        click.echo(json.dumps(evaluation.summary_json()))
    else:
        print_summary(evaluation)


def evaluate_run_or_model(
    run_or_model: str,
    overrides: Sequence[str],
    task_type: str | None,
    split: Split,
    num_problems: int | None,
    num_samples: int,
    output: Path | None,
) -> Evaluation:
    """Evaluate each held-out problem; the results are also written to `output` as JSONL."""
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
        results = evaluate(
            student,
            task,
            split,
            rollout=config.rollout,
            num_problems=num_problems or config.evaluation.num_test_problems,
            num_samples=num_samples,
            temperature=config.evaluation.temperature,
        )
    if output is not None:
        lines = [
            json.dumps({"model": model, "task": config.task.type, "split": split} | asdict(r))
            for r in results
        ]
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Evaluation(model, config.task.type, split, results)


def _config_and_model(run_or_model: str, overrides: Sequence[str]) -> tuple[RunConfig, str]:
    """Return the config and the model: of a run its best checkpoint, of a checkpoint its run's
    config, of an embedded model that of the example."""
    # Four things may be meant: a run, one of its checkpoints, an embedded model, any other model.
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
    if not any(override.startswith(("task=", "task.type=")) for override in overrides):
        raise UserError(
            f"{run_or_model!r} is no run directory, so its task is not known; add --task, for "
            "example --task knights_and_knaves."
        )
    table = {"student": {"model": run_or_model}, "objective": {"type": "grpo"}}
    return parse_config(parse_overrides(table, overrides)), run_or_model


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return asdict(value) if isinstance(value, Estimate) else value


def print_summary(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print a table of the summary."""
    console = console or Console(highlight=False)
    summary = summarise([evaluation.results])
    n = summary["num_samples"]
    table = Table(box=None, pad_edge=False)
    table.add_column("quantity")
    table.add_column("value (95 % interval over problems)")
    table.add_row(f"mean@{n}", str(summary[f"mean@{n}"]))
    for k, estimate in summary["pass@k"].items():
        table.add_row(f"pass@{k}", str(estimate))
    for difficulty, estimate in summary["pass@1 by difficulty"].items():
        table.add_row(Text(f"pass@1, {printable(difficulty)}"), str(estimate))
    table.add_row("mean completion length", f"{summary['mean_completion_tokens']:.1f} tokens")
    table.add_row("truncated", f"{summary['truncated_share']:.1%}")
    table.add_row("could not be judged", f"{summary['cannot_judge_share']:.1%}")
    what = (
        f"{summary['num_problems']} {evaluation.split} problems of {evaluation.task} x {n} samples"
    )
    console.print(f"{printable(evaluation.model)}\n{what}\n", markup=False, soft_wrap=True)
    console.print(table)
