"""The command line: one function per verb; heavy imports inside the function."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from rlad import __version__

EXIT_FAILURE, EXIT_USER_MISTAKE = 1, 2

_CONFIG_ARGUMENTS = click.argument("arguments", nargs=-1, metavar="[RUN.toml] [KEY=VALUE]...")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """RL-aware distillation: train a small reasoning model by reinforcement learning with a teacher in every update.

    \b
    rlad train                              the embedded example, start to end
    rlad check my_run.toml                  does this config make sense? (trains nothing)
    rlad train my_run.toml                  train
    rlad train my_run.toml objective=grpo   the same run without a teacher
    """
    # A loop of many small operations on few cores loses most of its time to threads that spin while they wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _sentences_for_mistakes(verb: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake ends in its sentence and exit code 2, an interruption in 128 + signal."""

    @wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except ValueError as error:
            click.echo("\n".join(f"rlad: {line}" for line in str(error).splitlines()), err=True)
            sys.exit(EXIT_USER_MISTAKE)
        except KeyboardInterrupt:
            click.echo("rlad: interrupted", err=True)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output has gone, as in `rlad list | head`
            sys.stderr.close()
            sys.exit(EXIT_FAILURE)

    return wrapped


def _load(arguments: Sequence[str]) -> Any:
    """The run described by `[RUN.toml] [KEY=VALUE]...`."""
    from rlad.config_file import load_config

    paths, overrides = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    if len(paths) > 1:
        raise ValueError(f"one config at a time: got {', '.join(paths)}; overrides have the form key.path=value.")
    return load_config(Path(paths[0]) if paths else None, overrides)


@main.command()
@_CONFIG_ARGUMENTS
@click.option("--resume", is_flag=True, help="Go on with the run that is in the run directory.")
@click.option("--overwrite", is_flag=True, help="Delete the run that is in the run directory first.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@_sentences_for_mistakes
def train(arguments: tuple[str, ...], resume: bool, overwrite: bool, as_json: bool) -> None:
    """Train a student. Without arguments: the embedded example (no GPU, no download, a few minutes)."""
    config = _load(arguments)
    from rich.console import Console

    from rlad.console import ConsoleReporter
    from rlad.stopping import StopRequested
    from rlad.training import train as run_training

    console = Console(stderr=as_json)
    with ConsoleReporter(console) as reporter:
        try:
            result = run_training(config, resume=resume, overwrite=overwrite, reporter=reporter)
        except StopRequested as stopped:
            reporter.__exit__(None, None, None)
            command = f"rlad train {config.directory}/config.toml --resume"
            click.echo(f"rlad: stopped by {stopped}; a checkpoint is written, go on with `{command}`", err=True)
            sys.exit(128 + stopped.signal_number)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        from rlad.summary import print_summary

        print_summary(console, result)


@main.command()
@_CONFIG_ARGUMENTS
@click.option("--json", "as_json", is_flag=True, help="Print findings and resolved config as one JSON object.")
@_sentences_for_mistakes
def check(arguments: tuple[str, ...], as_json: bool) -> None:
    """Validate a config: resolved values, what will be computed, tokenizers, memory. Trains nothing."""
    config = _load(arguments)
    from rlad.check import check_run, print_report

    report = check_run(config)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        print_report(report)
    if report.errors:
        sys.exit(EXIT_USER_MISTAKE)


@main.command()
@_CONFIG_ARGUMENTS
@click.option("--num-prompts", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per completion.")
@_sentences_for_mistakes
def sample(arguments: tuple[str, ...], num_prompts: int, as_json: bool) -> None:
    """Graded completions of the student with the teacher's log-probs. Takes a config, or the config.toml of a run."""
    config = _load(arguments)
    from rlad.preview import preview, print_preview

    rows = preview(config, num_prompts=num_prompts)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
    else:
        print_preview(rows)


@main.command()
@click.argument("run_or_model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--task", help="Type of task; a run directory brings its own.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@click.option("--num-problems", default=300, show_default=True, type=click.IntRange(min=1))
@click.option("--num-samples", default=1, show_default=True, type=click.IntRange(min=1), help="k of mean@k.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSONL file for the result of each problem.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@_sentences_for_mistakes
def evaluate(
    run_or_model: str,
    overrides: tuple[str, ...],
    task: str | None,
    split: str,
    num_problems: int,
    num_samples: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """mean@k and unbiased pass@k on held-out problems, with 95 % intervals over prompts.

    RUN_OR_MODEL is a run directory (its best checkpoint is evaluated), a model folder or a Hugging Face name. Overrides are those
    of a run, for example task.num_people=[4,5] or rollout.max_completion_tokens=512.
    """
    from rlad.evaluation_command import evaluate_run_or_model, print_summary, summary_json

    results = evaluate_run_or_model(run_or_model, overrides, task, split, num_problems, num_samples, output)
    if as_json:
        click.echo(json.dumps(summary_json(results)))
    else:
        print_summary(results)


@main.command(name="list")
@click.argument("what", type=click.Choice(["objectives", "tasks", "teachers"]))
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@_sentences_for_mistakes
def list_(what: str, name: str | None, as_json: bool) -> None:
    """Objectives, tasks or teachers; with NAME its documentation, formula and settings."""
    from rlad.catalogue import describe, names

    if name is None:
        rows = names(what)
        click.echo(json.dumps(rows) if as_json else "\n".join(f"{key:<20} {text}" for key, text in rows.items()))
    else:
        text = describe(what, name)
        click.echo(json.dumps({"name": name, "text": text}) if as_json else text)
