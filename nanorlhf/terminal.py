"""The line of progress of a terminal: it is drawn over and over in one place, and wiped before anything else is printed."""

import os
import shutil
import sys

drawn = None                         # the stream on which a line stands


def here():
    """True if stdout is a terminal, and no file or pipe."""
    return sys.stdout is not None and sys.stdout.isatty()


class Stream:
    """sys.stdout or sys.stderr; what is printed there wipes the line first."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        wipe()
        return self.stream.write(text)


def draw(head, rest, last=False):
    """Shows head + rest in place of the line before, cut to the terminal's width. The head has a colour, unless the variable
    NO_COLOR is set (no-color.org) or the terminal is a simple one. The last line stays."""
    global drawn
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Stream):
            setattr(sys, name, Stream(getattr(sys, name)))
    width = shutil.get_terminal_size().columns - 1                                     # a full line would wrap
    text = (head + rest)[:width].ljust(width)
    if not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb"):
        text = f"\033[36m{text[:len(head)]}\033[0m{text[len(head):]}"
    drawn = None if last else sys.stdout.stream       # before it is shown: a signal's handler may print in between
    sys.stdout.stream.write("\r" + text + ("\n" if last else "\r"))
    sys.stdout.stream.flush()


def wipe():
    """Clears the line, if one is shown."""
    global drawn
    if drawn is not None:
        stream, drawn = drawn, None
        stream.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        stream.flush()
