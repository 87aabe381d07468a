"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input: the message names the file, line, key or value and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
