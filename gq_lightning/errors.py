"""The one exception for wrong input: its message is a single line that names the file, the field and the fix."""


class UserError(Exception):
    """Wrong input by the user. The command line prints the message after ``error:`` and exits with 2, without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: object) -> str:
    """Text that every file and terminal takes: names of files that are no text (lone surrogates, to Python) are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()
