"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """Something the user can mend; the message is one line that says what is wrong and what to do.

    The command line prints the message alone and exits with 2; a library caller sees an
    ordinary `ValueError`.
    """
