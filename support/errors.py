"""Errors and warnings that are the user's to mend."""


class InputError(Exception):
    """Bad arguments or input. The message is one line: what is wrong and how to mend it.

    It names arguments and fields in backquotes: "give `checkpoint` an existing file". The command lines put
    the flag in its place, print the line on standard error and leave with status 2; see
    `licq.support.cli.main_guard`.
    """


class InputWarning(UserWarning):
    """Input that is left out or replaced, and how to mend that, in one line as of `InputError`.

    The command lines print it as `warning: ...` on standard error and go on.
    """
