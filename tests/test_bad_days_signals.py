"""SIGINT, SIGTERM and SIGHUP at every kind of moment: one line, 128 plus the signal's number, no process left, and going on."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from stopped_program import Program, pcr_export

from pcr_export.folder_lock import hold_folder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESUMED = "stopped; the same command goes on from here"
SMALL = ("--steps", "4", "--calib-size", "8", "--images", "2", "--height", "16", "--width", "16")
ENGINE = ("--backend", "tensorrt-rtx", "--target", "sm89")


@dataclass(frozen=True)
class Moment:
    """When a command is stopped."""

    command: Callable[[Path], list[str | Path]]  # by the folder that it writes to
    comes: Callable[[Program, Path], bool]
    line: str


def child(word: str) -> Callable[[Program, Path], bool]:
    return lambda program, _folder: any(word in command for command in program.running().values())


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> dict[str, Moment]:
    source = exported.parents[1] / "models" / "random"

    def export(folder: Path) -> list[str | Path]:
        return pcr_export(source, "--out", folder.parent, *SMALL, *ENGINE)

    def evaluate(folder: Path) -> list[str | Path]:
        if not folder.exists():
            shutil.copytree(exported, folder)
        return pcr_export("evaluate", folder, "--workers", "2", "--images", "2")

    def calibrates(_program: Program, folder: Path) -> bool:
        return (folder / ".stages" / "calibration" / "call_00001.safetensors").exists()

    return {
        "imports": Moment(export, lambda program, _folder: program.has_loaded("libtorch_cpu"), "stopped"),
        "calibration": Moment(export, calibrates, RESUMED),
        "memory of a session": Moment(export, child("session_memory"), RESUMED),
        "engine build": Moment(export, child("build_process"), RESUMED),
        "start of Ray": Moment(evaluate, child("gcs_server"), RESUMED),
        "Ray's workers": Moment(evaluate, child("ray::_Worker"), RESUMED),
    }


def test_while_it_starts(record_property: Callable) -> None:
    for number in SIGNALS:
        program = Program(pcr_export("evaluate", "nowhere"))
        program.wait_for(lambda program: program.has_loaded("_ctypes") or program.has_loaded("libtorch"))
        ended = program.stop(number, group=number == signal.SIGINT)
        record_property("line", " ".join(ended.lines))
        assert (ended.code, ended.lines, ended.left) == (128 + number, ["stopped"], [])


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True], ids=["to it alone", "to its group"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    "when", ["imports", "calibration", "memory of a session", "engine build", "start of Ray", "Ray's workers"]
)
def test_matrix(
    when: str,
    number: signal.Signals,
    group: bool,
    moments: dict[str, Moment],
    tmp_path: Path,
    record_property: Callable,
) -> None:
    if "Ray" in when:
        pytest.importorskip("ray")
    if when == "engine build":
        pytest.importorskip("tensorrt_rtx")
    moment, folder = moments[when], tmp_path / "random-w8a8"
    program = Program(moment.command(folder))
    program.wait_for(lambda program: moment.comes(program, folder))
    ended = program.stop(number, group=group)
    record_property("line", f"{' '.join(ended.lines)} (exit code {ended.code}, {ended.seconds:.1f} s)")
    assert (ended.code, ended.lines, ended.left) == (128 + number, [moment.line], [])
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
    if folder.exists():
        with hold_folder(folder):
            pass
    if not group:
        again = Program(moment.command(folder)).end()
        assert (again.code, again.lines, again.left) == (0, [], [])


@pytest.mark.slow
@pytest.mark.parametrize("when", ["memory of a session", "engine build"])
def test_kill_9_leaves_no_child(when: str, moments: dict[str, Moment], tmp_path: Path) -> None:
    folder = tmp_path / "random-w8a8"
    program = Program(moments[when].command(folder))
    program.wait_for(lambda program: moments[when].comes(program, folder))
    program.process.kill()
    program.process.wait()
    deadline = time.monotonic() + 5
    while program.running():
        assert time.monotonic() < deadline, program.running()
        time.sleep(0.05)
