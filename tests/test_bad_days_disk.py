"""A disk that is full and one that is read-only, both real: one line, nothing lost, and going on gives the same bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models.tiny_pipelines import tiny_sd
from test_export import float_graph, job

from pcr_export.cli import main
from pcr_export.errors import PcrExportError
from pcr_export.export import export_denoiser
from pcr_export.export_job import Job
from pcr_export.prompts import read_prompts
from pcr_export.write_files import write_bytes

DISK_BYTES = 2**21
CHANGING = {
    "report.json",
    "manifest.json",
    ".stages/calibrate.json",
    ".stages/validate.json",
}  # wall-clock times, or a hash of them


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root on Linux may mount a disk that is small")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def small_job(folder: Path, lines: list[str] | None = None) -> Job:
    return replace(job(folder), float_graph=float_graph, log=(lines if lines is not None else []).append)


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name not in CHANGING}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "toy"
    export_denoiser(small_job(folder))
    return folder


def fill(disk: Path, free: int) -> Path:
    """Leave `free` bytes on the disk."""
    filler, room = disk / "filler", os.statvfs(disk)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - free))
    return filler


@pytest.mark.parametrize("free", [0, 12_288, 20_480, 49_152, 73_728, 102_400])
def test_full_disk(free: int, disk: Path, whole: Path, record_property: Callable) -> None:
    filler = fill(disk, free)
    with pytest.raises((OSError, PcrExportError)) as refused:
        export_denoiser(small_job(disk / "toy"))
    record_property("line", str(refused.value).replace(str(disk), "."))
    assert re.search("No space left on device|make room", str(refused.value))
    assert "\n" not in str(refused.value)
    finished = {path.stem for path in (disk / "toy" / ".stages").glob("*.json")}
    filler.unlink()
    lines: list[str] = []
    export_denoiser(small_job(disk / "toy", lines))
    assert {line.split(":")[0] for line in lines if "done before" in line} == finished  # what was computed is kept
    assert contents(disk / "toy") == contents(whole)


def test_read_only_disk(disk: Path, whole: Path, record_property: Callable) -> None:
    export_denoiser(small_job(disk / "toy"))
    before = contents(disk / "toy")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk / "toy", disk / "new"):
        with pytest.raises(PcrExportError, match="choose another folder") as refused:
            export_denoiser(small_job(folder))
        record_property("line", str(refused.value).replace(str(disk), "."))
    assert contents(disk / "toy") == before == contents(whole)


def test_nothing_is_left_of_a_file_that_has_no_room(disk: Path) -> None:
    fill(disk, 4096)
    with pytest.raises(OSError, match=r"No space left.*big"):
        write_bytes(disk / "big", bytes(10**5))
    assert not list(disk.glob("big*"))


@pytest.mark.slow
@pytest.mark.parametrize("free", [65_536, 524_288])
def test_full_disk_on_the_command_line(
    free: int, disk: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, record_property: Callable
) -> None:
    source = tiny_sd(tmp_path / "random")
    small = ("--steps", "2", "--calib-size", "2", "--images", "2", "--height", "16", "--width", "16")
    monkeypatch.setattr(sys, "argv", ["pcr-export", str(source), "--out", str(disk), *small])
    filler = fill(disk, free)
    capsys.readouterr()  # of writing the model
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if not line.startswith("warning: ")]  # of prompts that are too long for this model
    record_property("line", lines[-1].replace(str(disk), "."))
    assert stop.value.code not in (0, None)
    assert len(lines) == 1, lines
    assert re.search("No space left on device|make room", lines[0])
    filler.unlink()
    subprocess.run(
        ["mount", "-o", f"remount,size={8 * DISK_BYTES}", str(disk)], check=True
    )  # a whole export needs more
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code


def test_prompts_on_a_disk_that_fails() -> None:
    """/proc/self/mem opens and can't be read: an I/O error as a broken disk gives it."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("only Linux has /proc")
    with pytest.raises(PcrExportError, match="can't be read"):
        read_prompts(Path("/proc/self/mem"))
