"""The command line: the group of all commands, and the environment that they share."""

import io
import os
import sys

import click

from rlad import __version__
from rlad.cli.ending import Output, Verbs
from rlad.cli.verbs import comparisons, runs, tools
from rlad.errors import UserError


@click.group(
    cls=Verbs,
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
            setattr(sys, name, Output(name, stream))
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one.") from None
    # With many small operations on few cores, threads that spin while waiting take most of the
    # time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # rlad has its own progress bar. Problems in loading are raised as errors.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for _verb in (
    runs.init,
    runs.train,
    runs.check,
    runs.sample,
    runs.evaluate,
    runs.chat,
    runs.watch,
    runs.doctor,
    comparisons.compare,
    comparisons.report,
    tools.serve_teacher,
    tools.export,
    tools.list_,
    tools.models,
):
    main.add_command(_verb)
