"""The errors that are shown as a sentence, and the exit code of a command that ends with one.

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
"""The line after the traceback of everything that is not an error of rlad."""


class RladError(Exception):
    """The base of the errors whose text is a sentence for the user: what came, what is allowed,
    what to do."""

    exit_code = EXIT_FAILURE


class UserError(RladError, ValueError):
    """The error for a user's mistake: something that they wrote or gave cannot be used. Python
    callers can catch it as a `ValueError`."""

    exit_code = EXIT_USER_MISTAKE


class RunFailedError(RladError):
    """The error for a run that cannot continue without a mistake of the user, such as a full disk
    or numbers that are not finite."""


class LostProcessError(RunFailedError):
    """The error when another process of the run has ended, which reports the reason itself."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended; its message says why.")


def out_of_memory(error: Exception) -> RunFailedError | None:
    """Return the error for a lack of memory, on a GPU or in main memory; None for others."""
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
