"""Every file that the package writes: under a name that nobody can foresee, beside its place, then put there; never through a link."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pcr_export.errors import PcrExportError

TEMPORARY = re.compile(r"\.pcr-[0-9a-f]{16}\.tmp")
TRITON_LINK = re.compile(
    r"triton/(\w+)/1/model\.onnx"
)  # below the folder, to that network of it: deploy/triton_repository.py


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, as `write_bytes` does."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as `write_json` spells it."""
    return json.dumps(value, indent=2) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write `data`; what lay there is replaced at once. Raises OSError that names the file, of which nothing is left."""
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is put in the place of `path` where the block ends well; else nothing is left of it. Folders are made.

    A link that lies at `path` is replaced, what it points to stays as it is. Raises OSError that names `path`.
    """
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_new(temporary) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk has room again


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` for libraries that write files by name; it is gone with what is left in it after the block."""
    folder = temporary_beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` that nobody can foresee; `sweep` knows it where a killed process left it."""
    return path.with_name(f".pcr-{secrets.token_hex(8)}.tmp")


def open_new(path: Path) -> BinaryIO:
    """Make a file and open it for writing. Raises FileExistsError where anything lies there, a link to nowhere too."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, which the caller holds alone."""
    for parent, folders, files in os.walk(folder):
        for name in filter(TEMPORARY.fullmatch, files):
            Path(parent, name).unlink(missing_ok=True)
        for name in [name for name in folders if TEMPORARY.fullmatch(name)]:
            shutil.rmtree(Path(parent, name), ignore_errors=True)


def refuse_linked_folders(folder: Path) -> None:
    """Raise PcrExportError where a folder below `folder` is a link, through which files elsewhere would be written or deleted.

    `folder` itself may be one: whoever gives it knows where it leads. The links of triton/ stay: nothing is written through them.
    """
    for parent, folders, _ in os.walk(folder):
        for name in sorted(folders):
            path = Path(parent, name)
            if path.is_symlink() and not _is_of_triton(folder, path):
                raise PcrExportError(
                    f"{path} is a link to another folder ({os.readlink(path)}), and nothing is written through one: "
                    "remove it, or put the folder itself there"
                )


def _is_of_triton(folder: Path, link: Path) -> bool:
    match = TRITON_LINK.fullmatch(link.relative_to(folder).as_posix())
    return match is not None and os.readlink(link) == f"../../../{match[1]}"
