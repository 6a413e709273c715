"""Errors that are the user's to mend."""


class InputError(Exception):
    """Bad arguments or input. The message is one line: what is wrong and how to mend it.

    The command lines print it on standard error and leave with status 2; see `support.cli.main_guard`.
    """
