"""Files that are whole or absent."""

import contextlib
import os
import tempfile
from pathlib import Path

from support.errors import InputError


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path beside `path`; on success it takes the name `path`, on failure it is removed.

    A reader never sees a half-written file, also when the disk fills up or the process is killed.

    Raises:
        InputError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; free some space or choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)
