"""One writer at a time in an output folder: a lock that the kernel takes back when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pcr_export.errors import PcrExportError


def lock_file(folder: Path) -> Path:
    """Where the lock of an output folder lies. The file stays; whether it is locked is for the kernel to say."""
    return folder / ".stages" / "lock"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Be the only one inside `with` that writes to `folder`, which is made where it is missing.

    The file tells the holder's process and command to the one who is refused. Not to be nested for one folder.

    Raises:
        PcrExportError: another process holds the folder, which is named, or the folder can't be written to.
    """
    path = lock_file(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise PcrExportError(
            f"--out: {folder} can't be written to ({error.strerror}): choose another folder"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PcrExportError(
                f"{folder} is being written by {_holder(path)}: wait for its end, stop it, or choose another folder"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} {shlex.join(map(os.path.basename, sys.argv[:1]))} {shlex.join(sys.argv[1:])}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(path: Path) -> str:
    """What the holder wrote of itself, on one line; it may be just about to."""
    pid, _, command = path.read_text("utf-8", "replace").strip().partition(" ")
    return f"process {pid} ({' '.join(command.split())[:200]})" if pid else "another process"
