"""Run a function in a process of its own, and measure how long it takes and how much memory it and its children hold."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SAMPLE_S = 0.05
_FIELDS = re.compile(r"^(RssAnon|RssFile):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a phase cost."""

    name: str
    seconds: float
    peak_anonymous_bytes: int  # memory that nothing but swap could take back
    peak_file_bytes: int  # mapped files in memory, which the system drops when it needs the room


def measure_phase(name: str, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Phase]:
    """Call `function` in a new interpreter; its result, and what it cost, that interpreter's start included.

    Raises:
        RuntimeError: the function raised or its process died; what it said stands on standard error.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, arguments))
    started, peaks = time.perf_counter(), {"RssAnon": 0, "RssFile": 0}
    process.start()
    sender.close()  # so that a process that dies ends the wait
    while not receiver.poll(SAMPLE_S):
        for kind, size in _resident(process.pid or 0).items():
            peaks[kind] = max(peaks[kind], size)
    seconds = time.perf_counter() - started
    try:
        result = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"phase {name} failed") from error
    finally:
        process.join()
    phase = Phase(
        name=name,
        seconds=round(seconds, 1),
        peak_anonymous_bytes=peaks["RssAnon"],
        peak_file_bytes=peaks["RssFile"],
    )
    return result, phase


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def _resident(pid: int) -> dict[str, int]:
    """Bytes that the process and its descendants have resident, by kind."""
    total = {"RssAnon": 0, "RssFile": 0}
    for each in _family(pid):
        try:
            status = Path(f"/proc/{each}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended just now
            continue
        for kind, size in _FIELDS.findall(status):
            total[kind] += int(size) * 1024
    return total


def _family(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            names = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for name in names:
            yield from _family(int(name))
