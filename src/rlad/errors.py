"""What can end a run, and the exit code of the command that it ends."""

EXIT_FAILURE, EXIT_USER_MISTAKE, EXIT_SIGNAL = 1, 2, 128


class RunFailedError(ValueError):
    """A run could not go on, through no mistake in what the user wrote: a full disk, numbers that
    are not finite."""


def exit_code(error: ValueError) -> int:
    return EXIT_FAILURE if isinstance(error, RunFailedError) else EXIT_USER_MISTAKE
