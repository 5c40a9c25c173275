"""The one exception that speaks to the user of a command."""


class UserError(Exception):
    """A mistake that the user can mend; its message is one line: what is wrong and what to do.

    The commands print it without a traceback and exit with code 2.
    """
