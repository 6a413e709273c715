"""What every command line does with an error: one line on standard error, and an exit status."""

import argparse
import errno
import os
import sys
from collections.abc import Callable

from licq.support.errors import InputError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# The user can mend these; any other OSError is a defect of ours and keeps its traceback.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one-line `InputError`s instead of a usage text and an exit."""

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help")


def main_guard(
    function: Callable[[], int | None],
    interrupted: str = "the same command with --resume continues from the last finished unit",
) -> int:
    """Run a command line's body and return its exit status, with errors as one line `error: ...` on standard
    error.

    0 or what `function` returns; 2 for bad arguments or input, a path that cannot be read, no memory, no disk
    space; 130 when interrupted; 141 when the reader of standard output has gone. Any other exception is a
    defect and passes through. Used as `sys.exit(main_guard(main))`. `interrupted` says after an interrupt how
    to go on.
    """
    try:
        status = function()
        sys.stdout.flush()  # here, so that a closed pipe is met inside the guard
        return status or 0
    except SystemExit as leaving:  # a plain argparse parser has said its part already
        if isinstance(leaving.code, str):
            return _fail(leaving.code)
        return leaving.code or 0
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit; that must not fail aloud either.
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            pass
        return EXIT_BROKEN_PIPE
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        return _fail(message)


def explain(error: Exception) -> str | None:
    """The one line for a user who can mend the cause of `error`; None where it is a defect of ours."""
    if isinstance(error, (InputError, argparse.ArgumentError)):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and _is_out_of_memory(error):
        return _OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}; free some space or choose another folder with --out"
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    return None


_OUT_OF_MEMORY = "out of memory; use a smaller --crop, fewer images (--num_calib), or another --device"


def _is_out_of_memory(error: RuntimeError) -> bool:
    # By name, so that a command line that never needed torch does not import it to fail.
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return EXIT_BAD_INPUT
