"""What every command line does with an error: one line on standard error, and an exit status."""

import argparse
import contextlib
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn

from licq.support.errors import InputError, InputWarning

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

# The user can mend these; any other OSError is a defect of ours and keeps its traceback.
_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR}

# Arguments of functions -> the `dest` of the flags that give them, where the names differ; the first that
# the command line has.
_SYNONYMS = {
    "choices": ("bits_choices",),
    "exclude": ("data",),  # of `sample_crops`: the images of the evaluation
    "folder": ("out",),
    "images": ("data",),
    "level": ("quality",),  # of a variable-rate codec
    "num": ("num_calib",),
    "files": ("calib",),  # of `sample_crops`
    "reductions": ("crop_reductions",),
}
_KNOBS = "knobs"  # the `dest` of --set, which takes the fields of the configurations
_NAME = re.compile(r"`([A-Za-z_]\w*)(?:=([^`]*))?`")

# The parser of the command that runs, whose flags messages name.
_parser: ContextVar["ArgumentParser | None"] = ContextVar("parser", default=None)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one-line `InputError`s instead of a usage text and an exit.

    From the moment it parses, `main_guard` and `explain` put its flags into messages: `` `checkpoint` ``
    becomes `--checkpoint`. Of subcommands it is the one that was chosen.
    """

    def parse_known_args(self, *args: Any, **more: Any) -> Any:
        _parser.set(self)  # before the subcommands' parsers do the same
        return super().parse_known_args(*args, **more)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def flag(self, name: str) -> str | None:
        """What the command line calls the argument `name` of a function: `--flag`, or the metavar of a
        positional argument; None where it has no such flag."""
        actions = {action.dest: action for action in self._actions}
        for dest in (name, *_SYNONYMS.get(name, ())):
            if dest in actions:
                return _spelled(actions[dest])
        return None

    def with_flags(self, message: str) -> str:
        """`message` with flags for the arguments in backquotes.

        `` `crop` `` becomes `--crop`, `` `crop=64` `` `--crop 64` and `` `rounding=ste` ``, a field of a
        configuration, `--set rounding=ste`. What is no argument of this command line stays as it is.
        """

        def spelled(match: re.Match) -> str:
            name, value = match.groups()
            flag = self.flag(name)
            if value is None:
                return flag or match[0]
            if flag is not None:
                return flag if value == "True" else f"{flag} {value}"
            knobs = self.flag(_KNOBS)
            return f"{knobs} {name}={value}" if knobs else match[0]

        return _NAME.sub(spelled, message)


def _spelled(action: argparse.Action) -> str:
    long = [option for option in action.option_strings if option.startswith("--")]
    if action.option_strings:
        return (long or action.option_strings)[0]
    return action.metavar if isinstance(action.metavar, str) else action.dest


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
    before = _parser.set(None)
    try:
        with _warnings_in_one_line():
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
    finally:
        _parser.reset(before)


def explain(error: Exception) -> str | None:
    """The one line for a user who can mend the cause of `error`; None where it is a defect of ours.

    Arguments stand in it as flags of the command line that was parsed last.
    """
    message = _explanation(error)
    return message and with_flags(" ".join(message.split()))


def with_flags(message: str) -> str:
    """`message` as the command line that was parsed last says it; see `ArgumentParser.with_flags`."""
    parser = _parser.get()
    return parser.with_flags(message) if parser is not None else message


def _explanation(error: Exception) -> str | None:
    if isinstance(error, (InputError, argparse.ArgumentError)):
        return str(error)
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and _is_out_of_memory(error):
        return _out_of_memory()
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}; free some space or choose another folder as `out`"
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its permissions"
    return None


# What makes a command need less memory, by the `dest` of its flag.
_SMALLER = {
    "crop": "a smaller `crop`",
    "num_calib": "fewer images (`num_calib`)",
    "jobs": "fewer `jobs`",
    "tile": "a smaller `tile`",
    "workers": "fewer `workers`",
    "device": "another `device`",
}


def _out_of_memory() -> str:
    parser = _parser.get()
    remedies = [what for dest, what in _SMALLER.items() if parser is None or parser.flag(dest)]
    return f"out of memory; use {' or '.join(remedies) or 'smaller images'}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    # By name, so that a command line that never needed torch does not import it to fail.
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """An `InputWarning` is one line `warning: ...`, without the place in our code that others are shown
    with."""
    show = warnings.showwarning

    def show_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, InputWarning):
            print("warning:", with_flags(" ".join(str(message).split())), file=sys.stderr)
        else:
            show(message, category, *place, **more)

    warnings.showwarning = show_line
    try:
        yield
    finally:
        warnings.showwarning = show


def _fail(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return EXIT_BAD_INPUT
