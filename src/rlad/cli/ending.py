"""How a command ends: sentences and exit codes for errors, and what happens to a full output."""

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
        except click.NoSuchOption as error:
            sentence = error.format_message() + _as_a_setting(error)
            raise click.UsageError(sentence, error.ctx) from None
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click itself knows what to do with these
        except Exception as error:
            if (failure := out_of_memory(error)) is not None:
                _end(failure)
            click.echo(traceback.format_exc() + BUG_REPORT, err=True)
            sys.exit(EXIT_FAILURE)


class Output:
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


def _as_a_setting(error: click.NoSuchOption) -> str:
    """Say which setting an option may be meant as, where the verb takes settings."""
    parameters = error.ctx.command.params if error.ctx else []
    if not any("KEY=VALUE" in str(parameter.metavar) for parameter in parameters):
        return ""
    from rlad.config.run import RunConfig
    from rlad.config.validation import nearest_key

    near = nearest_key(RunConfig, error.option_name.lstrip("-").replace("-", "_"))
    return f" Settings are written KEY=VALUE, without dashes{': ' * bool(near)}{near}"


def _end(error: RladError) -> NoReturn:
    # Of the processes that a launcher has started on a host one says what all of them find wrong,
    # and each what it alone has met.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first or not isinstance(error, UserError | LostProcessError):
        for line in printable(str(error)).splitlines():
            click.echo(f"rlad: {line}", err=True)
    sys.exit(error.exit_code)
