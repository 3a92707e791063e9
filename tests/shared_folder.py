"""A folder that takes long to make, made once by whichever of pytest's workers needs it first; all of them read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this run, filled by `make`. Tests read it; one that changes it takes a copy.

    The others wait while one makes it. Where `make` fails, the next one that asks tries again from nothing.
    """
    folder = run_folder(factory) / name
    done = folder.with_name(f"{name}.done")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            done.touch()
    return folder


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """Where all workers of this run find what they share: pytest gives each of them a folder inside it."""
    own = factory.getbasetemp()
    return (own.parent if own.name.startswith("popen-") else own) / "shared"
