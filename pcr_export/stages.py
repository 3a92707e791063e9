"""Stages of a job: skipped where nothing that they depend on has changed, run again where it has, never half-believed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Key = Mapping[str, str]  # what a stage depends on: part -> its hash or value
Facts = dict[str, Any]  # what a stage tells the report; plain JSON


def key_hash(key: Key) -> str:
    """sha256 of a key."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, through a temporary name."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, through a temporary name."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data`, through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


class Stages:
    """The stages of one output folder. A stamp per finished stage holds its key and its facts."""

    def __init__(self, folder: Path, *, resume: bool = True, log: Callable[[str], None] = lambda _line: None) -> None:
        self.folder = folder
        self._resume = resume
        self._log = log

    def run(self, name: str, key: Key, outputs: Sequence[Path], action: Callable[[], Facts]) -> Facts:
        """Run `action` unless a finished run with an equal key left every output in place. Returns its facts."""
        stamp = self.folder / f"{name}.json"
        known = _read_stamp(stamp) if self._resume else None
        if known is not None and all(path.exists() for path in outputs):
            changed = sorted(part for part in {*key, *known["key"]} if key.get(part) != known["key"].get(part))
            if not changed:
                self._log(f"{name}: done before, nothing changed")
                return dict(known["facts"])
            self._log(f"{name}: running again, changed: {', '.join(changed)}")
        stamp.unlink(missing_ok=True)
        facts = action()
        write_json(stamp, {"key": dict(key), "facts": facts})
        return facts


def _read_stamp(path: Path) -> dict[str, Any] | None:
    """The stamp, or None where there is none or none that can be trusted."""
    try:
        stamp = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    well_formed = (
        isinstance(stamp, dict) and isinstance(stamp.get("key"), dict) and isinstance(stamp.get("facts"), dict)
    )
    return stamp if well_formed else None
