"""`rlad train`: progress, the result, and how to continue after Ctrl-C."""

import json
import shlex
import sys
from pathlib import Path

import click
from rich.console import Console

from rlad.cli.printing import print_line
from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.errors import EXIT_SIGNAL
from rlad.runs.directory import EVAL, WARNINGS, RunDirectory
from rlad.training.run import TrainResult


def run_training(config: RunConfig, *, resume: bool, overwrite: bool, as_json: bool) -> None:
    console = Console(stderr=as_json)
    with console.status("starting"):  # the next imports take seconds
        from rlad.engines.making import is_main_process
        from rlad.stopping import StopRequested
        from rlad.training.console import ConsoleReporter
        from rlad.training.run import how_to_resume, train
    try:
        with ConsoleReporter(console) as reporter:
            result = train(config, resume=resume, overwrite=overwrite, reporter=reporter)
    except StopRequested as stopped:
        if is_main_process():
            click.echo(f"rlad: stopped by {stopped}; {how_to_resume(config)}", err=True)
        sys.exit(EXIT_SIGNAL + stopped.signal_number)
    if not is_main_process():
        return
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        print_summary(console, result)


def print_summary(console: Console, result: TrainResult) -> None:
    """Print results, a problem that is solved only after training, paths, and commands to run
    next."""
    _heading(console, "result")
    print_line(console, f"test pass@1 before  {result.before}")
    print_line(
        console,
        f"test pass@1 after   {result.after}   (95 % intervals over problems)",
        style="bold",
    )
    _print_example(console, RunDirectory(result.run_dir))
    _heading(console, "files and next commands")
    print_line(console, f"run directory   {result.run_dir}  ({result.seconds:.0f} s)")
    model = RunDirectory(result.run_dir).checkpoints()[-1][1]
    print_line(console, f"model           {model}  (after the last step)")
    print_line(console, f"learning curve  {result.run_dir / 'curve.png'}\n")
    for command, meaning in _next_commands(result.run_dir).items():
        print_line(console, f"{command}\n    {meaning}")


def _next_commands(run_dir: Path) -> dict[str, str]:
    """Return commands to run next, and what each of them shows."""
    run = shlex.quote(str(run_dir))
    config = load_config(run_dir)
    warned = [row["name"].replace("_", " ") for row in RunDirectory(run_dir).read(WARNINGS)]
    opinion = " with their log-ratio to the teacher" if config.teacher else ""
    commands = {f"rlad doctor {run}": f"there were warnings: {', '.join(warned)}"} if warned else {}
    commands |= {
        f"rlad evaluate {run} --num-samples 8": "mean@8 and pass@k of its best checkpoint, by "
        "difficulty",
        f"rlad sample {run}": f"graded completions{opinion}",
        f"rlad chat {run}": "talk to the model",
        f"rlad export model {run}": "a plain Hugging Face folder of the checkpoint that is best on "
        "the validation problems",
        f"rlad list objectives {config.objective.type}": "the formula and its settings",
    }
    if config.needs_teacher:
        alone = f"rlad train {run} objective=grpo run_dir={run}-grpo"
        commands[alone] = "the same run without the teacher"
    return commands


def _print_example(console: Console, run: RunDirectory) -> None:
    tests = [row["results"] for row in run.read(EVAL) if row["split"] == "test"]
    solved = [
        (then, now)
        for then, now in zip(tests[0], tests[-1], strict=True)
        if not then["num_correct"] and now["num_correct"] == now["num_samples"]
    ]
    if not solved:
        return
    then, now = min(solved, key=lambda pair: len(pair[1]["first_completion"]))
    _heading(console, "a test problem that is now solved")
    print_line(console, then["prompt"].strip(), style="bold")
    for when, result, colour in (("before", then, "red"), ("after", now, "green")):
        print_line(console, f"\n{when} training:", style=colour)
        print_line(console, result["first_completion"].strip())


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(text, style="dim", align="left")
