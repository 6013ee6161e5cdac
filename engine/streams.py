"""Output that does not end a run: a pipe that was closed, a full disk behind stdout, a terminal that is gone."""

import contextlib
import os
import sys


class Unbreakable:
    """A text stream whose failing writes are lost instead of raised; from the first one on, its file is the null device."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        try:
            return function(*args)
        except (OSError, ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError):  # what is buffered goes there, too, also at the interpreter's end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def unbreakable_output():
    """Context in which stdout and stderr are Unbreakable."""
    with contextlib.ExitStack() as stack:
        for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            unbreakable = Unbreakable(stream or open(os.devnull, "w"))  # None: closed from the start
            stack.enter_context(redirect(unbreakable))
            stack.callback(unbreakable.flush)
        yield
