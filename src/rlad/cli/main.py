"""The command line: the options and help of each verb. What a verb does is in the file of its name;
heavy imports are inside of the functions."""

import io
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rlad import __version__
from rlad.errors import (
    BUG_REPORT,
    EXIT_FAILURE,
    EXIT_SIGNAL,
    LostProcessError,
    RladError,
    RunFailedError,
    UserError,
    out_of_memory,
)
from rlad.text import printable

if TYPE_CHECKING:
    from rlad.config.run import RunConfig

_CONFIG_ARGUMENTS = click.argument("arguments", nargs=-1, metavar="[RUN] [KEY=VALUE]...")
_AT_LEAST_1 = click.IntRange(min=1)
_NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
_GPUS = ["rtx3090", "rtx4090", "rtx5090", "l4", "a10g", "l40s", "a100-40", "a100", "h100"]
_GPUS += ["h200", "b200"]
_JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


class _Verbs(click.Group):
    """A group of commands that decides how each of them ends."""

    def invoke(self, context: click.Context) -> Any:
        """Run a command: an error of rlad ends in its sentence and exit code, Ctrl-C in 130, a bug
        in its traceback and 1."""
        if not sys.warnoptions:
            # What libraries plan to change is for those who develop with them.
            warnings.simplefilter("ignore", FutureWarning)
        try:
            result = super().invoke(context)
            sys.stdout.flush()
            return result
        except RladError as error:
            _end(error)
        except KeyboardInterrupt:
            click.echo("rlad: interrupted", err=True)
            sys.exit(EXIT_SIGNAL + 2)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click itself knows what to do with these
        except Exception as error:
            if (failure := out_of_memory(error)) is not None:
                _end(failure)
            click.echo(traceback.format_exc() + BUG_REPORT, err=True)
            sys.exit(EXIT_FAILURE)


class _Output:
    """Standard output or standard error, which may be a file on a full disk."""

    def __init__(self, name: str, stream: io.TextIOWrapper):
        # What the terminal's encoding cannot show is replaced.
        stream.reconfigure(errors="replace")
        self._name = name
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._explained():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._explained():
            self._stream.flush()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # of `rlad ... | head`, which click knows
            raise
        except OSError as error:
            # Nothing more can be said there, not even at the end of the process.
            setattr(sys, self._name, open(os.devnull, "w"))  # noqa: SIM115
            which = {"stdout": "output", "stderr": "error"}[self._name]
            raise RunFailedError(
                f"standard {which} cannot be written ({error.strerror}); make room for it."
            ) from None


def _end(error: RladError) -> NoReturn:
    # Of the processes that a launcher has started on a host one says what all of them find wrong,
    # and each what it alone has met.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first or not isinstance(error, UserError | LostProcessError):
        for line in printable(str(error)).splitlines():
            click.echo(f"rlad: {line}", err=True)
    sys.exit(error.exit_code)


@click.group(
    cls=_Verbs,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__)
def main() -> None:
    """RL-aware distillation: a small language model learns to reason by reinforcement learning,
    with a bigger one as teacher.

    \b
    rlad train                              train the embedded example, start to end
    rlad check my_run.toml                  can this work? what will it do? (trains nothing)
    rlad train my_run.toml                  train your own student
    rlad train my_run.toml objective=grpo   the same with one setting changed
    rlad compare                            which method works? several seeds, one report
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _Output(name, stream))
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one.") from None
    # A loop of many small operations on few cores loses most of its time to threads that spin while
    # they wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Ours is the only progress bar. What goes wrong in loading is raised as an error.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _load(arguments: Sequence[str]) -> "RunConfig":
    from rlad.config.file import load_config

    path, overrides = _path_and_overrides(arguments)
    # A verifier of one's own is a module in the working directory, or beside the config. Last, so
    # that it hides no package.
    sys.path += ["", *([str(Path(path).absolute().parent)] if path else [])]
    return load_config(path, overrides)


def _path_and_overrides(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    overrides = [a for a in arguments if "=" in a and not os.path.exists(a)]
    paths = [a for a in arguments if a not in overrides]
    if len(paths) > 1:
        raise UserError(
            f"got {len(paths)} configs, {', '.join(paths)}; give one, and overrides of the form "
            "key.path=value."
        )
    return (paths[0] if paths else None), overrides


@main.command()
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


@main.command()
@_CONFIG_ARGUMENTS
@click.option("--resume", is_flag=True, help="Continue the run that is in the run directory.")
@click.option(
    "--overwrite", is_flag=True, help="Delete the run that is in the run directory first."
)
@_JSON
def train(arguments: tuple[str, ...], **how: bool) -> None:
    """Train a student.

    RUN is a TOML file, or the directory of a run; without it the embedded example is trained (no
    GPU, no download, a few minutes). KEY=VALUE changes one setting, for example
    optimization.num_steps=50 or objective=grpo; `rlad list` names them.

    Ctrl-C writes a checkpoint; `rlad train DIRECTORY --resume` continues exactly there.
    """
    from rlad.cli.train import run_training

    run_training(_load(arguments), **how)


@main.command()
@_CONFIG_ARGUMENTS
@click.option("--without-models", is_flag=True, help="Load no weights: leave out the trial.")
@click.option("--force", is_flag=True, help="Try the models though their memory seems too little.")
@click.option(
    "--engine",
    type=click.Choice(["verl"]),
    help="Also ask this engine, installed beside rlad, for our objectives.",
)
@click.option(
    "--ranking",
    type=click.IntRange(min=1),
    metavar="PROBLEMS",
    help="Also sample completions of so many training problems in full: does the teacher, shown "
    "the answer or other completions, rank them as the verifier does?",
)
@_JSON
def check(arguments: tuple[str, ...], **how: Any) -> None:
    """Say what a config will do and whether it can.

    Looks at settings, tokenizers, teacher, prompts, verifier and memory; then loads the models for
    a trial: a handful of completions, what the teacher says of them, how many tokens TRRD would
    gate, and how long a step takes. Trains and writes nothing. The exit code is 2 when it cannot
    work. Arguments are those of `rlad train`.
    """
    config = _load(arguments)
    from rlad.cli.check import run_check

    run_check(config, **how)


@main.command()
@_CONFIG_ARGUMENTS
@click.option("--num-prompts", default=2, type=_AT_LEAST_1, help="Validation prompts.")
@_JSON
def sample(arguments: tuple[str, ...], **how: Any) -> None:
    """Show graded completions of the student.

    With the teacher's opinion of them. Arguments are those of `rlad train`; the student is the last
    checkpoint of the run, or the initial student when it has none.
    """
    config = _load(arguments)
    from rlad.cli.sample import show_samples

    show_samples(config, **how)


@main.command()
@click.argument("run_or_model")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--task", "task_type", help="Type of task; a run and the embedded models bring their own."
)
@click.option("--split", type=click.Choice(["validation", "test"]), default="test")
@click.option(
    "--num-problems",
    type=_AT_LEAST_1,
    help="By default as many as the run tested itself on; or 300.",
)
@click.option(
    "--num-samples", default=1, type=_AT_LEAST_1, help="Completions of each, k of mean@k."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="New JSONL file for the result of each problem.",
)
@_JSON
def evaluate(run_or_model: str, overrides: tuple[str, ...], **how: Any) -> None:
    """Measure a run or a model on held-out problems.

    Prints mean@k and unbiased pass@k with 95 % intervals over problems. RUN_OR_MODEL is a run
    directory (of which the checkpoint that validates best is taken), a checkpoint of one, a model
    folder, a Hugging Face name, or embedded/student. KEY=VALUE as in `rlad train`, for example
    'task.num_people=[4,5]' or rollout.max_completion_tokens=512.
    """
    from rlad.cli.evaluate import run_evaluation

    run_evaluation(run_or_model, overrides, **how)


@main.command()
@click.argument("run_or_model")
@click.option("--system", metavar="TEXT", help="System prompt, for models with a chat template.")
@click.option("--temperature", type=click.FloatRange(min=0), help="By default the run's.")
@click.option("--max-tokens", type=_AT_LEAST_1, help="Of an answer; by default the run's.")
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


@main.command()
@click.argument("arguments", nargs=-1, metavar="[COMPARE.toml] [KEY=VALUE]...")
@click.option(
    "--dry-run", is_flag=True, help="Print the runs and which of them are done; train nothing."
)
@click.option(
    "--plan", is_flag=True, help="Say what it can see, and how many seeds and problems it takes."
)
@click.option(
    "--difference",
    "points",
    type=click.FloatRange(0.1, 100),
    default=5.0,
    help="In points, for --plan.",
)
@click.option(
    "--pilot",
    type=click.Path(path_type=Path),
    help="For --plan: a comparison's folder or results.jsonl to take the spread from.",
)
def compare(
    arguments: tuple[str, ...], dry_run: bool, plan: bool, points: float, pilot: Path | None
) -> None:
    """Find out which method works, over several seeds.

    All methods have one budget, and there is one report of them.

    COMPARE.toml names the methods, the seeds and the run that they share; without it the embedded
    example is compared. KEY=VALUE changes one setting, for example 'seeds=[0,1,2,3,4]' or jobs=2.

    A comparison that is started again continues with what is missing. A run that fails is named in
    the report, and the exit code is 1.
    """
    from rlad.config.comparison import load_comparison

    comparison, folder = load_comparison(*_path_and_overrides(arguments))
    from rlad.cli.compare import plan_comparison, run_compare

    if plan:
        plan_comparison(comparison, folder, points=points, pilot=pilot)
        return
    command = shlex.join(["rlad", "compare", *arguments])
    run_compare(comparison, folder, dry_run=dry_run, command=command)


@main.command()
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--output", default="report", help="Folder for report.html, report.md and results.jsonl."
)
@click.option(
    "--baseline",
    metavar="METHOD",
    help="What the others are compared with; by default grpo, or else the first.",
)
@click.option(
    "--figures", type=_NEW_FOLDER, help="Folder for figures of a paper (PDF, SVG) and LaTeX."
)
def report(runs: tuple[str, ...], output: str, baseline: str | None, figures: Path | None) -> None:
    """Make a report of runs that are there.

    Tables with intervals, learning curves, cost, and what TRRD did with each token.

    RUNS are run directories, or folders that hold some.
    """
    from rlad.cli.report import report_runs

    click.echo(f"report  {report_runs(runs, output, baseline, figures)}")


@main.command()
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


@main.command()
@click.argument("run")
@_JSON
def doctor(run: str, as_json: bool) -> None:
    """Say what is wrong with a run.

    Reads the run directory RUN, of a run that is finished, stopped or in progress, and says in
    plain words, the worst first, what its figures, files and checkpoints show and what to do.
    Changes nothing, loads no model. The exit code is 1 when something is wrong.
    """
    from rlad.cli.doctor import run_doctor

    run_doctor(run, as_json=as_json)


@main.command(name="serve-teacher")
@click.argument("model")
@click.option("--engine", type=click.Choice(["auto", "vllm", "rlad"]), default="auto")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", default=8000, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@click.option("--device", default="auto", help="Not for vLLM.")
@click.option(
    "--tokens-per-batch",
    type=_AT_LEAST_1,
    help="Most tokens in one forward pass; 16384 without vLLM.",
)
@click.option(
    "--max-context-tokens",
    type=click.IntRange(min=2),
    help="Longest text; by default what the model allows.",
)
@click.option(
    "--served-name", metavar="NAME", help="Name by which clients ask for it; by default MODEL."
)
@click.option("--without-key", is_flag=True, help="Let other machines in without an API key.")
def serve_teacher(**options: Any) -> None:
    """Serve a teacher to runs on this or other machines.

    MODEL is a folder, a Hugging Face name or embedded/teacher. The engine is vLLM where it is
    installed, else a small server of rlad's own (rlad[serve]). What is printed at the start goes
    into the config of a run.

    Clients must send the key that is in the environment variable RLAD_TEACHER_API_KEY, if it is
    set. rlad's own server is for runs that trust each other; a public server should be vLLM.
    """
    from rlad.cli.serve import ServeOptions
    from rlad.cli.serve import serve_teacher as serve

    serve(ServeOptions(**options))


@main.group()
def export() -> None:
    """Write a trained model, or what another trainer needs."""


@export.command(name="model")
@click.argument("run")
@click.option(
    "--checkpoint", default="best", metavar="best|last|STEP", help="best: on validation problems."
)
@click.option("--output", type=_NEW_FOLDER, help="New folder; default: RUN-model.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--push", metavar="USER/NAME", help="Then push it with its card to the hub.")
@click.option("--private", is_flag=True, help="Make a new repository of the hub private.")
def export_model(run: str, push: str | None, private: bool, **how: Any) -> None:
    """Write the model of run directory RUN as a plain Hugging Face folder.

    Its LoRA adapter, if it has one, is merged into its base model.
    """
    from rlad.export.hub import push_model, require_push
    from rlad.runs.directory import RunDirectory

    if push is not None:
        require_push(push)
    from rlad.export.model import export_model as write

    folder = write(run, **how)
    click.echo(f"model  {folder}")
    if push is not None:
        address = push_model(RunDirectory(Path(run)), folder, push, private=private)
        click.echo(f"pushed  {address}")


@export.command(name="verl")
@_CONFIG_ARGUMENTS
@click.option("--output", type=_NEW_FOLDER, help="New folder; default: RUN_DIR-verl.")
@click.option("--gpus-per-node", default=8, type=_AT_LEAST_1, help="For the student.")
@click.option("--nodes", default=1, type=_AT_LEAST_1, help="For the student.")
@click.option("--teacher-gpus-per-node", default=8, type=_AT_LEAST_1)
@click.option("--teacher-nodes", default=1, type=_AT_LEAST_1)
def export_verl(arguments: tuple[str, ...], output: Path | None, **cluster: int) -> None:
    """Write a run's command, data and reward function for verl (clusters on Ray).

    Needs no verl. Arguments are those of `rlad train`; what verl does differently is in the
    comments of the command.
    """
    config = _load(arguments)
    from rlad.export.verl import export_verl as write
    from rlad.export.verl_command import Cluster

    folder = output or config.directory.with_name(f"{config.directory.name}-verl")
    click.echo(f"command  {write(config, folder, Cluster(**cluster))}")


@main.command(name="list")
@click.argument("what", type=click.Choice(["objectives", "tasks", "teachers", "settings"]))
@click.argument("name", required=False)
@_JSON
def list_(what: str, name: str | None, as_json: bool) -> None:
    """List objectives, tasks, teachers and settings.

    With NAME: its formula or meaning, and every setting with its default, as a config has it.
    """
    from rlad.config.catalogue import describe, names

    if name is None:
        rows = names(what)
        plain = "\n".join(f"{key:<20} {text}" for key, text in rows.items())
        click.echo(json.dumps(rows) if as_json else plain)
    else:
        text = describe(what, name)
        click.echo(json.dumps({"name": name, "text": text}) if as_json else text)


@main.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List models, or fetch and convert one."""
    if context.invoked_subcommand is None:
        from rlad.cli.models import print_models

        print_models()


@models.command()
@click.argument("name")
def prepare(name: str) -> None:
    """Fetch and convert model NAME, so that a run needs no connection."""
    from rlad.cli.models import prepare as prepare_model

    prepare_model(name)
