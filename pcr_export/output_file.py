"""A file that a command is to write, looked at before the command's work starts."""

from __future__ import annotations

import os
from pathlib import Path

from pcr_export.errors import PcrExportError


def check_output_file(path: Path, flag: str, suffix: str) -> None:
    """Raise PcrExportError where `path` is a folder, ends otherwise than `suffix`, or lies where nothing can be written.

    Folders that are missing are made when the file is written.

    Args:
        flag: the option that names the file, for the message.
        suffix: with its dot, in lower case.
    """
    if path.is_dir():
        raise PcrExportError(f"{flag} {path} is a folder: name a file in it, such as {path / f'out{suffix}'}")
    if path.suffix.lower() != suffix:
        raise PcrExportError(
            f"{flag} {path} must end in {suffix}, which is what is written: {path.with_suffix(suffix)}"
        )
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise PcrExportError(f"{flag} {path} lies below {there}, which is a file: choose another folder")
    if not os.access(there, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PcrExportError(f"{flag} {path} can't be written to: choose another folder")
