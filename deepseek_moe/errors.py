"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Something the user can mend. The message is one line: what was found, and the remedy."""

    exit_code = 2


class RunError(UserError):
    """A run that was asked for rightly and could not go on: a full disk, a loss that is NaN."""

    exit_code = 1


class EveryProcess(RunError):
    """An error that every process of a run raises at the same place. Only the first prints it."""
