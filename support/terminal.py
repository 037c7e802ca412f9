"""What reaches the terminal: texts from files of others must not be obeyed by it."""
import os
import shlex
import sys


def printable(text, keep=""):
    """The text with what a terminal would obey (escape sequences, line breaks) as escapes."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def shell_word(text):
    """The text as a word of a command that can be copied from the terminal."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(shell_escape, text)) + "'"


def shell_escape(c):
    """A character inside $'...', the shell's own way to write what cannot be shown."""
    if c in "\\'":
        return f"\\{c}"
    if c.isprintable():
        return c
    return f"\\x{ord(c):02x}" if ord(c) < 128 else f"\\U{ord(c):08x}"


def prepare():
    """Make print work wherever the program runs, whatever it prints.

    A closed stdout is no stream at all; a locale that knows only ASCII must not end a run at its
    first accent.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's may have none
            stream.reconfigure(errors="backslashreplace")
