"""The one exception for wrong input: its message is a single line that names the file, the field and the fix."""


class UserError(Exception):
    """Wrong input by the user. The command line prints the message after ``error:`` and exits with 2, without a traceback."""
