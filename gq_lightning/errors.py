"""The exception for wrong input. Its message is a single line that names the file, the field and the fix."""


class UserError(Exception):
    """Wrong input. The command line prints the message after ``error:`` and exits with status 2, without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: object) -> str:
    """The text on one line, safe for files and terminals: control characters and bytes that are not text are escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))
