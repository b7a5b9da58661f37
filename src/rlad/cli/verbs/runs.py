"""Commands for one run, from its first config to its diagnosis."""

from pathlib import Path
from typing import Any

import click

from rlad.cli.arguments import AT_LEAST_1, CONFIG_ARGUMENTS, JSON_OPTION, load
from rlad.errors import UserError

_GPUS = ["rtx3090", "rtx4090", "rtx5090", "l4", "a10g", "l40s", "a100-40", "a100", "h100"]
_GPUS += ["h200", "b200"]


@click.command()
@click.option("--student", help="Name of a model that `--models` lists.")
@click.option("--teacher", help="Name of a model; by default the teacher of the student's family.")
@click.option(
    "--task",
    type=click.Choice(["gsm8k", "knights_and_knaves", "countdown", "arithmetic", "jsonl"]),
    default="gsm8k",
)
@click.option("--gpu", type=click.Choice(_GPUS), default="h100", help="Type of the one GPU.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("run.toml"))
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@click.option("--models", is_flag=True, help="List the models whose shapes are known.")
def init(student: str | None, models: bool, **how: Any) -> None:
    """Write a first config.

    It is for a student, a teacher, a task and a GPU. Values are the paper's where it states them,
    and a comment after each names its source. The first lines estimate memory and time of the run.
    Nothing is downloaded.

    \b
    rlad init --student Qwen/Qwen3-0.6B --teacher Qwen/Qwen3-8B --task gsm8k --gpu h100
    """
    from rlad.cli.init import print_known_models, write_start

    if models:
        print_known_models()
    elif student is None:
        raise UserError("--student is missing; give a name that `rlad init --models` lists.")
    else:
        write_start(student=student, **how)


@click.command()
@CONFIG_ARGUMENTS
@click.option("--resume", is_flag=True, help="Continue the run in the run directory.")
@click.option("--overwrite", is_flag=True, help="Delete the run in the run directory first.")
@JSON_OPTION
def train(arguments: tuple[str, ...], **how: bool) -> None:
    """Train a student.

    RUN is a TOML file or the directory of a run; the default is the embedded example (no GPU, no
    download, a few minutes). KEY=VALUE changes one setting, for example optimization.num_steps=50
    or objective=grpo; `rlad list` shows all settings.

    Ctrl-C writes a checkpoint; `rlad train DIRECTORY --resume` continues exactly from there.
    """
    from rlad.cli.train import run_training

    run_training(load(arguments), **how)


@click.command()
@CONFIG_ARGUMENTS
@click.option("--without-models", is_flag=True, help="Load no weights, skip the trial.")
@click.option("--force", is_flag=True, help="Run the trial even if memory seems too small.")
@click.option(
    "--engine",
    type=click.Choice(["verl"]),
    help="Also check whether this engine is installed with rlad and has its objectives.",
)
@click.option(
    "--ranking",
    type=click.IntRange(min=1),
    metavar="PROBLEMS",
    help="Also sample completions for this many training problems, and measure whether the "
    "teacher, shown the answer or other completions, ranks them as the verifier does.",
)
@click.option(
    "--nearest",
    type=click.IntRange(min=1),
    metavar="PROBLEMS",
    help="Also let student and teacher solve this many validation problems, and show which methods "
    "helped in measured cases with similar results.",
)
@JSON_OPTION
def check(arguments: tuple[str, ...], **how: Any) -> None:
    """Show what a config will do, and whether it can work.

    Checks settings, tokenizers, teacher, prompts, verifier and memory. Then loads the models for a
    trial: a few completions, the teacher's log-probs of them, how many tokens TRRD would gate, and
    how long a step takes. Trains and writes nothing. The exit code is 2 if the config cannot work.
    Arguments are those of `rlad train`.
    """
    config = load(arguments)
    from rlad.cli.check import run_check

    run_check(config, **how)


@click.command()
@CONFIG_ARGUMENTS
@click.option("--num-prompts", default=2, type=AT_LEAST_1, help="Number of validation prompts.")
@JSON_OPTION
def sample(arguments: tuple[str, ...], **how: Any) -> None:
    """Show graded completions of the student.

    Also shows their log-ratio to the teacher. Arguments are those of `rlad train`; the student is
    the last checkpoint of the run, or the initial student if there is none.
    """
    config = load(arguments)
    from rlad.cli.sample import show_samples

    show_samples(config, **how)


@click.command()
@click.argument("run_or_model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--task", "task_type", help="Type of task; runs and the embedded models have one.")
@click.option("--split", type=click.Choice(["validation", "test"]), default="test")
@click.option(
    "--num-problems",
    type=AT_LEAST_1,
    help="By default evaluation.num_test_problems of the run, or 300.",
)
@click.option(
    "--num-samples", default=1, type=AT_LEAST_1, help="Completions per problem, k of mean@k."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="New JSONL file for the results by problem.",
)
@JSON_OPTION
def evaluate(run_or_model: str, overrides: tuple[str, ...], **how: Any) -> None:
    """Evaluate a run or a model on held-out problems.

    Prints mean@k and unbiased pass@k with 95 % intervals over problems. RUN_OR_MODEL is a run
    directory (its checkpoint with the best validation is used), a checkpoint of one, a model
    folder, a Hugging Face name, or embedded/student. KEY=VALUE is as in `rlad train`, for example
    'task.num_people=[4,5]' or rollout.max_completion_tokens=512.
    """
    from rlad.cli.evaluate import run_evaluation

    run_evaluation(run_or_model, overrides, **how)


@click.command()
@click.argument("run_or_model")
@click.option("--system", metavar="TEXT", help="System prompt, for models with a chat template.")
@click.option("--temperature", type=click.FloatRange(min=0), help="By default that of the run.")
@click.option("--max-tokens", type=AT_LEAST_1, help="Limit of an answer; by default the run's.")
@click.option("--teacher", "with_teacher", is_flag=True, help="Show the teacher's log-ratios.")
@click.option("--teacher-model", metavar="MODEL", help="Show those of another teacher.")
@click.option("--seed", type=click.IntRange(min=0), help="Make answers repeatable.")
def chat(run_or_model: str, **how: Any) -> None:
    """Talk to a run or a model.

    RUN_OR_MODEL is a run directory (its checkpoint with the best validation is used), a checkpoint
    of one, a model or adapter folder, a Hugging Face name, or embedded/student. With `--teacher`
    each answer is shown again, with tokens coloured by their log-ratio to the teacher. In a pipe
    all of the input is one question.
    """
    from rlad.cli.chat import run_chat

    run_chat(run_or_model, **how)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--page", is_flag=True, help="Show a web page that refreshes itself.")
@click.option("--port", default=8765, type=click.IntRange(0, 65535), help="For --page; 0: any.")
@click.option("--once", is_flag=True, help="Show the run's present state and exit.")
def watch(run: Path, **how: Any) -> None:
    """Watch a run while it trains.

    Shows curves, guards, time left and the last completions of run directory RUN, which trains in
    another terminal or is finished. Only reads files. `--page` shows the same and the imitation map
    at a local address, which other machines cannot reach.
    """
    from rlad.cli.watch import watch_run

    watch_run(run, **how)


@click.command()
@click.argument("run")
@JSON_OPTION
def doctor(run: str, as_json: bool) -> None:
    """Report what is wrong with a run.

    Reads the directory RUN of a finished, stopped or running run. Reports problems of its metrics,
    files and checkpoints, the worst first, and what to do. Changes nothing and loads no model. The
    exit code is 1 if something is wrong.
    """
    from rlad.cli.doctor import run_doctor

    run_doctor(run, as_json=as_json)
