"""Verbs of one run, from its first config to what is wrong with it."""

from pathlib import Path
from typing import Any

import click

from rlad.cli.arguments import AT_LEAST_1, CONFIG_ARGUMENTS, JSON_OPTION, load
from rlad.errors import UserError

_GPUS = ["rtx3090", "rtx4090", "rtx5090", "l4", "a10g", "l40s", "a100-40", "a100", "h100"]
_GPUS += ["h200", "b200"]


@click.command()
@click.option("--student", help="A name that `--models` lists.")
@click.option("--teacher", help="By default the one of the student's family.")
@click.option(
    "--task",
    type=click.Choice(["gsm8k", "knights_and_knaves", "countdown", "arithmetic", "jsonl"]),
    default="gsm8k",
)
@click.option("--gpu", type=click.Choice(_GPUS), default="h100", help="One of them.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("run.toml"))
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@click.option("--models", is_flag=True, help="List the models whose shapes are known.")
def init(student: str | None, models: bool, **how: Any) -> None:
    """Write a first config.

    For a student, a teacher, a task and a GPU. The values are the paper's where it states them; a
    comment after each says where it comes from, and the first lines what memory and time the run is
    estimated to take. Nothing is downloaded.

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
@click.option("--resume", is_flag=True, help="Continue the run that is in the run directory.")
@click.option(
    "--overwrite", is_flag=True, help="First delete the run that is in the run directory."
)
@JSON_OPTION
def train(arguments: tuple[str, ...], **how: bool) -> None:
    """Train a student.

    RUN is a TOML file, or the directory of a run; without it the embedded example is trained (no
    GPU, no download, a few minutes). KEY=VALUE changes one setting, for example
    optimization.num_steps=50 or objective=grpo; `rlad list` names them.

    Ctrl-C writes a checkpoint; `rlad train DIRECTORY --resume` continues exactly there.
    """
    from rlad.cli.train import run_training

    run_training(load(arguments), **how)


@click.command()
@CONFIG_ARGUMENTS
@click.option("--without-models", is_flag=True, help="Load no weights: leave out the trial.")
@click.option("--force", is_flag=True, help="Try the models though their memory seems too little.")
@click.option(
    "--engine",
    type=click.Choice(["verl"]),
    help="Also check whether this engine, installed with rlad, knows our objectives.",
)
@click.option(
    "--ranking",
    type=click.IntRange(min=1),
    metavar="PROBLEMS",
    help="Also sample complete answers to this many training problems: does the teacher, shown "
    "the answer or other completions, rank them as the verifier does?",
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
    """Say what a config will do and whether it can.

    Looks at settings, tokenizers, teacher, prompts, verifier and memory; then loads the models for
    a trial: a handful of completions, what the teacher says of them, how many tokens TRRD would
    gate, and how long a step takes. Trains and writes nothing. The exit code is 2 when it cannot
    work. Arguments are those of `rlad train`.
    """
    config = load(arguments)
    from rlad.cli.check import run_check

    run_check(config, **how)


@click.command()
@CONFIG_ARGUMENTS
@click.option("--num-prompts", default=2, type=AT_LEAST_1, help="Validation prompts.")
@JSON_OPTION
def sample(arguments: tuple[str, ...], **how: Any) -> None:
    """Show graded completions of the student.

    With the teacher's opinion of them. Arguments are those of `rlad train`; the student is the last
    checkpoint of the run, or the initial student when it has none.
    """
    config = load(arguments)
    from rlad.cli.sample import show_samples

    show_samples(config, **how)


@click.command()
@click.argument("run_or_model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--task", "task_type", help="Type of task; a run and the embedded models bring their own."
)
@click.option("--split", type=click.Choice(["validation", "test"]), default="test")
@click.option(
    "--num-problems",
    type=AT_LEAST_1,
    help="By default as many as the run tested itself on; or 300.",
)
@click.option("--num-samples", default=1, type=AT_LEAST_1, help="Completions of each, k of mean@k.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="New JSONL file for the result of each problem.",
)
@JSON_OPTION
def evaluate(run_or_model: str, overrides: tuple[str, ...], **how: Any) -> None:
    """Measure a run or a model on held-out problems.

    Prints mean@k and unbiased pass@k with 95 % intervals over problems. RUN_OR_MODEL is a run
    directory (of which the checkpoint that validates best is taken), a checkpoint of one, a model
    folder, a Hugging Face name, or embedded/student. KEY=VALUE as in `rlad train`, for example
    'task.num_people=[4,5]' or rollout.max_completion_tokens=512.
    """
    from rlad.cli.evaluate import run_evaluation

    run_evaluation(run_or_model, overrides, **how)


@click.command()
@click.argument("run_or_model")
@click.option("--system", metavar="TEXT", help="System prompt, for models with a chat template.")
@click.option("--temperature", type=click.FloatRange(min=0), help="By default the run's.")
@click.option("--max-tokens", type=AT_LEAST_1, help="Of an answer; by default the run's.")
@click.option("--teacher", "with_teacher", is_flag=True, help="Show what its teacher says.")
@click.option("--teacher-model", metavar="MODEL", help="Show what another teacher says.")
@click.option("--seed", type=click.IntRange(min=0), help="Repeats the same answers.")
def chat(run_or_model: str, **how: Any) -> None:
    """Talk to a run or a model.

    RUN_OR_MODEL is a run directory (of which the checkpoint that validates best is taken), a
    checkpoint of one, a model or adapter folder, a Hugging Face name, or embedded/student. With
    `--teacher` each answer is shown again, its tokens coloured by what the teacher thinks of them.
    In a pipe all of the input is one question.
    """
    from rlad.cli.chat import run_chat

    run_chat(run_or_model, **how)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--page", is_flag=True, help="As a page for the browser that refreshes itself.")
@click.option("--port", default=8765, type=click.IntRange(0, 65535), help="Of the page; 0: free.")
@click.option("--once", is_flag=True, help="Show the run as it is now, and end.")
def watch(run: Path, **how: Any) -> None:
    """Watch a run while it trains.

    Curves, guards, time left and the last completions of run directory RUN, which another terminal
    trains, or of one that is finished. Reads its files and changes nothing. `--page` shows the same
    with the imitation map at an address of this machine, which no other machine can reach.
    """
    from rlad.cli.watch import watch_run

    watch_run(run, **how)


@click.command()
@click.argument("run")
@JSON_OPTION
def doctor(run: str, as_json: bool) -> None:
    """Say what is wrong with a run.

    Reads the run directory RUN, of a run that is finished, stopped or in progress, and says in
    plain words, the worst first, what its figures, files and checkpoints show and what to do.
    Changes nothing, loads no model. The exit code is 1 when something is wrong.
    """
    from rlad.cli.doctor import run_doctor

    run_doctor(run, as_json=as_json)
