"""One writer at a time in an output folder: a lock that the kernel takes back when its holder dies, however it dies."""

from __future__ import annotations

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
        file.write(f"{os.getpid()} {shlex.join(map(os.path.basename, sys.argv[:1]))} {shlex.join(sys.argv[1:])}\n")
        file.flush()
        yield
        file.truncate(0)


def last_command(folder: Path) -> str:
    """The command that holds the folder, or the last one to hold it where that was stopped or failed; empty where none is known."""
    return _read_lock(folder).partition(" ")[2]


def _open_lock(folder: Path) -> TextIO:
    """The lock's file, made where it is missing. What lies there is opened only where it is a file of this folder alone."""
    path = lock_file(folder)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, flags, 0o666), "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise PcrExportError(_not_ours(path)) from error
        raise PcrExportError(
            f"--out: {folder} can't be written to ({error.strerror}): choose another folder"
        ) from error
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        raise PcrExportError(_not_ours(path))
    return file


def _not_ours(path: Path) -> str:
    return f"{path} is no file of this folder alone, and nothing is written through it: remove it"


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
