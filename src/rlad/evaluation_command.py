"""`rlad evaluate`: held-out figures of a run's best checkpoint or of any model."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlad.config import RunConfig
from rlad.config_file import load_config, parse_config, parse_overrides
from rlad.evaluate import Estimate, ProblemResult, evaluate, summarise
from rlad.language_model import load_language_model
from rlad.run_dir import RunDirectory
from rlad.tasks import Split, make_task


def evaluate_run_or_model(
    run_or_model: str,
    overrides: Sequence[str],
    task_type: str | None,
    split: Split,
    num_problems: int,
    num_samples: int,
    output: Path | None,
) -> list[ProblemResult]:
    """Results of each held-out problem; also written to `output` as JSONL. `ValueError` for a user's mistake."""
    path = Path(run_or_model)
    if (path / "checkpoints").is_dir():
        run = RunDirectory.open(path)
        config = load_config(path / "config.toml", ([f"task={task_type}"] if task_type else []) + list(overrides))
        best = run.best_step()
        model = str(run.checkpoint(best) if best is not None else run.last_checkpoint()[1])
    else:
        config, model = _config_of_model(run_or_model, task_type, overrides), run_or_model
    task = make_task(**config.task.model_dump())
    try:
        results = evaluate(
            load_language_model(model, dtype=config.student.dtype, device=config.student.device),
            task,
            split,
            num_problems=num_problems,
            num_samples=num_samples,
            max_completion_tokens=config.rollout.max_completion_tokens,
            temperature=config.evaluation.temperature,
            prompt_format=config.rollout.prompt_format,
            max_batch_rows=config.rollout.max_batch_rows,
        )
    finally:
        task.close()
    if output is not None:
        lines = [json.dumps({"model": model, "task": config.task.type, "split": split} | asdict(r)) for r in results]
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return results


def _config_of_model(model: str, task_type: str | None, overrides: Sequence[str]) -> RunConfig:
    if task_type is None:
        raise ValueError(
            f"{model!r} is no run directory, so its task is not known; add --task, for example --task knights_and_knaves."
        )
    table = {"student": {"model": model}, "objective": {"type": "grpo"}, "task": {"type": task_type}}
    return parse_config(parse_overrides(table, overrides))


def summary_json(results: Sequence[ProblemResult]) -> dict[str, Any]:
    """The summary with intervals as plain JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return asdict(value) if isinstance(value, Estimate) else value

    return plain(summarise(results))


def print_summary(results: Sequence[ProblemResult], console: Console | None = None) -> None:
    """A table of the summary."""
    console = console or Console(highlight=False)
    summary = summarise(results)
    n = summary["num_samples"]
    table = Table(title=f"{summary['num_problems']} problems x {n} samples, 95 % intervals over problems", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_row(f"mean@{n}", str(summary[f"mean@{n}"]))
    for k, estimate in summary["pass@k"].items():
        table.add_row(f"pass@{k}", str(estimate))
    for difficulty, estimate in summary["pass@1 by difficulty"].items():
        table.add_row(f"pass@1, {difficulty}", str(estimate))
    table.add_row("mean completion length (tokens)", f"{summary['mean_completion_tokens']:.1f}")
    table.add_row("truncated", f"{summary['truncated_share']:.1%}")
    table.add_row("could not be judged", f"{summary['cannot_judge_share']:.1%}")
    console.print(table)
