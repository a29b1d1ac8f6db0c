"""The errors a user can fix. Each is printed as one line, without a traceback."""


class UserError(ValueError):
    """Something the user can fix: an option, a missing file, a full disk. Its message is one line."""


class DataError(UserError):
    """A file, a row or a text that cannot be used. Its message is one line."""


class NotFinite(UserError):
    """A loss, a gradient or a weight is NaN or infinite: training diverged. Its message is one line."""


def one_line(text):
    """Any object as one line of at most 200 characters, to be put into a message."""
    return " ".join(str(text).split())[:200]
