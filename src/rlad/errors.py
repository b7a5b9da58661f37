"""The errors that end in a sentence, and the exit code of the command that they end.

Everything else that is raised is a bug, and keeps its traceback.
"""

import importlib.util

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2
EXIT_SIGNAL = 128

BUG_REPORT = (
    "This is a bug in rlad, or in a library; please report it with the text above to the project's "
    "issue tracker."
)
"""the line after the traceback of everything that is not an error of rlad"""


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


class LostProcessError(RunFailedError):
    """Another process of the run has ended, and says why itself."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended; its message says why.")


def out_of_memory(error: Exception) -> RunFailedError | None:
    """Return the sentence for a want of memory, on a GPU or in main memory; None for all else."""
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    # By name, as this module does without torch; on the CPU it is a plain RuntimeError.
    if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in reason:
        return None
    return RunFailedError(
        f"the models need more memory than there is ({reason}); lower rollout.max_batch_rows or "
        "optimization.tokens_per_batch, or take smaller models."
    )


def require_package(package: str, what: str, *, extra: str | None = None) -> None:
    """Raise `UserError` unless an optional package, which `what` needs, is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{what} needs {package}, which is not installed; install it with: pip install "
            f"'rlad[{extra or package}]'."
        )
