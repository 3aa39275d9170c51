"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: the message is one line that names what is wrong, where, and what to do.

    The command-line scripts print it as `error: …` and exit with status 2, without a traceback.
    """


def first_line(error: BaseException) -> str:
    """What a library says of its error, short enough for the message of a UserError."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
