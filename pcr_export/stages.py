"""Stages of a job: skipped where nothing that they depend on has changed, run again where it has, never half-believed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pcr_export.errors import PcrExportError
from pcr_export.read_files import read_text
from pcr_export.write_files import write_json

Key = Mapping[str, str]  # what a stage depends on: part -> its hash or value
Facts = dict[str, Any]  # what a stage tells the report; plain JSON
FOLDER, MISSING = "folder", "missing"  # in the place of a file's hash


def key_hash(key: Key) -> str:
    """sha256 of a key."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Stages:
    """The stages of one output folder. A stamp per finished stage holds its key, its facts and the hashes of its output files."""

    def __init__(self, folder: Path, *, resume: bool = True, log: Callable[[str], None] = lambda _line: None) -> None:
        self.folder = folder
        self._resume = resume
        self._log = log

    def run(self, name: str, key: Key, outputs: Sequence[Path], action: Callable[[], Facts]) -> Facts:
        """Run `action` unless a finished run with an equal key left every output as it is now. Returns its facts.

        Args:
            outputs: files, whose bytes are compared, and folders, which only have to be there.
        """
        stamp = self.folder / f"{name}.json"
        known = _read_stamp(stamp) if self._resume else None
        if known is not None:
            changed = [part for part in {*key, *known["key"]} if key.get(part) != known["key"].get(part)]
            hashes = {} if changed else self._hash_outputs(outputs)  # files are read where nothing else tells
            before = known["outputs"]
            changed += [file for file, value in hashes.items() if value == MISSING or value != before.get(file)]
            if not changed:
                self._log(f"{name}: done before, nothing changed")
                return dict(known["facts"])
            self._log(f"{name}: running again, changed: {', '.join(sorted(changed))}")
        stamp.unlink(missing_ok=True)
        facts = action()
        write_json(stamp, {"key": dict(key), "facts": facts, "outputs": self._hash_outputs(outputs)})
        return facts

    def _hash_outputs(self, outputs: Sequence[Path]) -> dict[str, str]:
        """By the path from the stamps' folder: what a file holds, FOLDER or MISSING."""
        return {
            os.path.relpath(path, self.folder): hash_file(path)
            if path.is_file()
            else FOLDER
            if path.is_dir()
            else MISSING
            for path in outputs
        }


def _read_stamp(path: Path) -> dict[str, Any] | None:
    """The stamp, or None where there is none or none that can be trusted."""
    try:
        stamp = json.loads(read_text(path))  # whatever numbers a stage tells
    except (PcrExportError, ValueError, RecursionError):
        return None
    parts = ("key", "facts", "outputs")
    well_formed = isinstance(stamp, dict) and all(isinstance(stamp.get(part), dict) for part in parts)
    return stamp if well_formed else None
