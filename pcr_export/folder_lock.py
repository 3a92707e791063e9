"""One writer at a time in an output folder: a lock that the kernel takes back when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pcr_export.errors import PcrExportError
from pcr_export.write_files import refuse_linked_folders, sweep

MOST_SHOWN = 1000  # bytes of a holder's command


def lock_file(folder: Path) -> Path:
    """Where the lock of an output folder lies. The file stays; whether it is locked is for the kernel to say."""
    return folder / ".stages" / "lock"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Be the only one inside `with` that writes to `folder`, which is made where it is missing and swept of half-written files.

    The file tells the holder's process and command to the one who is refused, and after a stop to the one who finds the folder
    unfinished (`last_command`). Not to be nested for one folder.

    Raises:
        PcrExportError: another process holds the folder, which is named, it can't be written to, or links lead out of it.
    """
    refuse_linked_folders(folder)
    with _open_lock(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PcrExportError(
                f"{folder} is being written by {_holder(folder)}: wait for its end, stop it, or choose another folder"
            ) from error
        sweep(folder)
        file.truncate(0)
        file.write(f"{os.getpid()} {_program()} {shlex.join(sys.argv[1:])}\n")
        file.flush()
        yield
        file.truncate(0)


def last_command(folder: Path) -> str:
    """The command that holds the folder, or the last one to hold it where that was stopped or failed; empty where none is known."""
    return _read_lock(folder).partition(" ")[2]


def _program() -> str:
    path = Path(sys.argv[0])
    return f"python -m {path.parent.name}" if path.name == "__main__.py" else shlex.quote(path.name)


def _open_lock(folder: Path) -> TextIO:
    """The lock's file, made where it is missing. A link that lies there, as in the hub's cache, a pipe and the like make way for it."""
    path = lock_file(folder)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_way(path)
        return os.fdopen(os.open(path, flags, 0o666), "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise PcrExportError(
            f"--out: {folder} can't be written to ({path.name}: {error.strerror}): choose another folder"
        ) from error


def _make_way(path: Path) -> None:
    """Remove what lies at `path` unless it is a file of this folder alone. One process at a time, so that none removes another's lock."""
    place = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network disks lock no folders
            fcntl.flock(place, fcntl.LOCK_EX)
        found = path.lstat() if os.path.lexists(path) else None
        if found is not None and not (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
            path.unlink()
    finally:
        os.close(place)


def _holder(folder: Path) -> str:
    """What the holder wrote of itself; it may be just about to."""
    pid, _, command = _read_lock(folder).partition(" ")
    return f"process {pid} ({command})" if pid else "another process"


def _read_lock(folder: Path) -> str:
    """What the lock says, on one line."""
    try:
        with os.fdopen(os.open(lock_file(folder), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return " ".join(file.read(MOST_SHOWN).decode("utf-8", "replace").split())
    except OSError:
        return ""
