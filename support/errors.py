"""The one exception for mistakes of the user: a wrong flag, a damaged file, a missing folder."""
from support.terminal import printable

LONGEST = 2000  # characters of a message


class InputError(Exception):
    """A mistake in what the user gave. program.run_main prints it as one line, exit code 2."""

    def __str__(self):
        # The message may quote an untrusted file: line breaks and terminal codes are escaped,
        # and the length is limited.
        text = super().__str__()
        if len(text) > LONGEST:
            text = text[:LONGEST] + "..."
        return printable(text)
