"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Something the user can mend. The message is one line: what was found, and the remedy."""
