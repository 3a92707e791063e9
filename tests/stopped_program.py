"""The program as a process that is sent a signal: what it said, how it ended, and which processes it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdiffbench.process_tree import descendants

ROOT = Path(__file__).parents[1]
MARK = "PCR_EXPORT_TEST"  # in the environment of everything that a program starts: also of what lost its parent
STRAGGLERS = 5  # seconds for what ends by itself: a worker of Ray sees that its raylet is gone
PATIENCE = 300  # seconds until a moment comes


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    code: int
    lines: list[str]  # of stderr, without warnings
    left: list[str]  # commands of the processes that are still there
    seconds: float  # from the signal to the end


class Program:
    """A program in a process group of its own."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self._seen: dict[int, str] = {}
        self.mark = f"{MARK}={uuid.uuid4()}"
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the program
        name, _, value = self.mark.partition("=")
        environment = {**os.environ, name: value, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,
            preexec_fn=attentive,
        )

    def wait_for(self, moment: Callable[[Program], bool]) -> None:
        """Until `moment` is true of the program."""
        deadline = time.monotonic() + PATIENCE
        while not moment(self):
            assert self.process.poll() is None, f"ended too early: {self._said()}"
            assert time.monotonic() < deadline, "the moment did not come"
            time.sleep(0.01)

    def running(self) -> dict[int, str]:
        """Every process of the program that has not ended: its id and its command.

        Ray's write their titles over their environment: they are known as descendants, and by when they started.
        """
        found, below = {}, descendants(self.process.pid)
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            try:
                started = (folder / "stat").read_text().rpartition(")")[2].split()[19]
                marked = self.mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                if marked or pid in below or self._seen.get(pid) == started:
                    self._seen[pid] = started
                    found[pid] = (
                        (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                    )
            except OSError:  # of another user, or it ended meanwhile
                continue
        return {pid: command for pid, command in found.items() if command}  # a zombie has none

    def has_loaded(self, library: str) -> bool:
        """Whether a shared library of this name is mapped."""
        try:
            return library in Path(f"/proc/{self.process.pid}/maps").read_text()
        except OSError:
            return False

    def stop(self, number: int, *, group: bool = False, patience: float = 60) -> Ended:
        """Send the signal, to the process alone (kill) or to its group (a terminal), and wait for the end."""
        self.running()
        started = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.end(started, patience)

    def end(self, started: float | None = None, patience: float = PATIENCE) -> Ended:
        """Wait for the end. What it left is killed afterwards."""
        started = time.monotonic() if started is None else started
        try:
            code = self.process.wait(patience)
            late = time.monotonic() + STRAGGLERS
            while self.running() and time.monotonic() < late:
                time.sleep(0.05)
        finally:
            left = self.running()
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        return Ended(code, self._said(), list(left.values()), time.monotonic() - started)

    def _said(self) -> list[str]:
        self._stderr.seek(0)
        lines = self._stderr.read().decode().splitlines()
        return [line for line in lines if not line.startswith("warning: ")]


def attentive() -> None:
    """Before a program starts: no signal is ignored, even where the tests themselves run in the background."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def pcr_export(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pcr_export", *arguments]
