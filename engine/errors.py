"""Errors that end a program with one line and an exit code, and text that is safe to print."""

from contextlib import contextmanager

import yaml


class BadArgument(Exception):
    """A flag, file or column is wrong: one line on stderr, exit code 2."""


class RunError(Exception):
    """The run cannot go on: one line on stderr, exit code 1."""


@contextmanager
def naming(source):
    """Context in which what is wrong with a file, or a flag, becomes a BadArgument that names it."""
    try:
        yield
    except (BadArgument, ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        raise BadArgument(f"{source}: {' '.join(reason.split()).removeprefix('--')}") from error


def printable(text):
    """Show control characters as \\x.. and \\n: they may carry terminal escape codes, or write a line of their own."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error):
    """Type and first line of an exception's message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
