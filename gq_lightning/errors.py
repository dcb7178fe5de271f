"""The one exception for wrong input: its message is a single line that names the file, the field and the fix."""


class UserError(Exception):
    """Wrong input by the user. The command line prints the message after ``error:`` and exits with 2, without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: object) -> str:
    """Text on one line that every file and terminal takes: control characters, and bytes that are no text, are escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))
