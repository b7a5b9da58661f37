"""How a command ends: error messages, exit codes, and output that cannot be written."""

import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

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


class Verbs(click.Group):
    """The group of all commands, which handles their errors."""

    def invoke(self, context: click.Context) -> Any:
        """Run a command. An error of rlad prints its message and sets its exit code, Ctrl-C sets
        130, a bug prints its traceback and sets 1."""
        if not sys.warnoptions:
            # Planned changes of libraries concern developers, not users.
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
        except click.NoSuchOption as error:
            sentence = error.format_message() + _as_a_setting(error)
            raise click.UsageError(sentence, error.ctx) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click handles these
        except Exception as error:
            if (failure := out_of_memory(error)) is not None:
                _end(failure)
            click.echo(traceback.format_exc() + BUG_REPORT, err=True)
            sys.exit(EXIT_FAILURE)


class Output:
    """Standard output or standard error. It may be a file on a full disk."""

    def __init__(self, name: str, stream: io.TextIOWrapper):
        # Characters that the terminal's encoding lacks are replaced.
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
        except BrokenPipeError:  # from `rlad ... | head`; click handles it
            raise
        except OSError as error:
            # Nothing more can be written there, not even at the end of the process.
            setattr(sys, self._name, open(os.devnull, "w"))  # noqa: SIM115
            which = {"stdout": "output", "stderr": "error"}[self._name]
            raise RunFailedError(
                f"standard {which} cannot be written ({error.strerror}); free some disk space."
            ) from None


def _as_a_setting(error: click.NoSuchOption) -> str:
    """Suggest the setting that an unknown option may mean, if the command takes settings."""
    parameters = error.ctx.command.params if error.ctx else []
    if not any("KEY=VALUE" in str(parameter.metavar) for parameter in parameters):
        return ""
    from rlad.config.run import RunConfig
    from rlad.config.validation import nearest_key

    near = nearest_key(RunConfig, error.option_name.lstrip("-").replace("-", "_"))
    return f" Settings are written KEY=VALUE, without dashes{': ' * bool(near)}{near}"


def _end(error: RladError) -> NoReturn:
    # Among the processes that a launcher started on a host, only the first reports errors that all
    # of them meet; each reports its own.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first or not isinstance(error, UserError | LostProcessError):
        for line in printable(str(error)).splitlines():
            click.echo(f"rlad: {line}", err=True)
    sys.exit(error.exit_code)
