"""The errors that end in a sentence, and the exit code of the command that they end.

Everything else that is raised is a bug, and keeps its traceback.
"""

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2
EXIT_SIGNAL = 128


class RladError(Exception):
    """The base of the errors whose text is a sentence for the user: what came, what is allowed,
    what to do."""

    exit_code = EXIT_FAILURE


class UserError(RladError, ValueError):
    """Something that the user wrote or gave cannot be used. It is a `ValueError` for callers from
    Python."""

    exit_code = EXIT_USER_MISTAKE


class RunFailedError(RladError):
    """A run cannot continue, through no mistake in what the user wrote: a full disk, numbers that
    are not finite."""
