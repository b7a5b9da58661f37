"""What can end a run."""


class RunFailedError(ValueError):
    """A run could not go on, through no mistake in what the user wrote: a full disk, numbers that are not finite."""
