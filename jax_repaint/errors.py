"""The one exception for what a user can mend: what was wrong, where, and what would be right."""


class InputError(ValueError):
    """Input that cannot be used; commands print it as one line and exit with code 2."""
