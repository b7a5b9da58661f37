"""`rlad train` in this process: progress, the result, and what to do after Ctrl-C."""

import json
import sys

import click
from rich.console import Console

from rlad.config import RunConfig
from rlad.errors import EXIT_SIGNAL


def run_training(config: RunConfig, *, resume: bool, overwrite: bool, as_json: bool) -> None:
    from rlad.engines.rank_requirements import is_first_rank

    console = Console(stderr=as_json, quiet=not is_first_rank())
    with console.status("starting"):  # the next imports take seconds
        from rlad.console import ConsoleReporter
        from rlad.stopping import StopRequested
        from rlad.training import how_to_go_on, train
    try:
        with ConsoleReporter(console) as reporter:
            result = train(config, resume=resume, overwrite=overwrite, reporter=reporter)
    except StopRequested as stopped:
        if is_first_rank():
            click.echo(f"rlad: stopped by {stopped}; {how_to_go_on(config)}", err=True)
        sys.exit(EXIT_SIGNAL + stopped.signal_number)
    if not is_first_rank():
        return
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        from rlad.summary import print_summary

        print_summary(console, result)
