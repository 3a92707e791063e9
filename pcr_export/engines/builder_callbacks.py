"""What a builder calls back while it builds: its log, its progress, and the stream that it writes the engine to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pcr_export.engines.layer_dump import Kernel, parse_dump

Send = Callable[[Mapping[str, Any]], None]
WEIGHTS, ACTIVATIONS = "Total Weights Memory: ", "Total Activation Memory: "
_DUMPS = ("Layers:", "Engine Layer Information")
_NO_GPU_ASIDES = ("catchCudaError", "ScopedCudaStream")
_KEPT = (*_DUMPS, WEIGHTS, ACTIVATIONS)


@dataclass
class Log:
    """What is kept of a builder's 10^5 messages."""

    errors: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def bytes_of(self, label: str) -> int | None:
        """The number in the last message that starts with `label`."""
        found = [re.match(r"\d+", message.removeprefix(label)) for message in self.kept if message.startswith(label)]
        return int(found[-1][0]) if found and found[-1] else None

    def kernels(self) -> list[Kernel]:
        """The kernels in all layer dumps, one dump per optimization profile."""
        return [kernel for message in self.kept if message.startswith(_DUMPS) for kernel in parse_dump(message)]

    def first_error(self) -> str:
        """The first error on one line."""
        return one_line(self.errors)


def one_line(messages: Sequence[str]) -> str:
    """The first message that tells something, without the aside that this machine has no GPU."""
    for message in messages:
        lines = [line.strip() for line in message.splitlines() if not any(aside in line for aside in _NO_GPU_ASIDES)]
        if any(lines):
            return " ".join(lines)[:400]
    return "no reason given"


def logger(trt: Any, log: Log) -> Any:
    """An ILogger of the library that keeps in `log` what is worth it; cheap, for 10^5 messages."""
    worst = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if message.startswith(_KEPT):
                log.kept.append(message)
            elif severity in worst:
                log.errors.append(message)

    return Logger()


class Sink:
    """Counts and hashes what it writes. The library swallows exceptions, so an error is kept for later."""

    def __init__(self, write: Callable[[Any], int]) -> None:
        self._write = write
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def take(self, data: Any) -> int:
        """Write one chunk; the number of bytes written, 0 after an error."""
        try:
            self._write(data)
        except OSError as error:
            self.error = error
            return 0
        self.sha256.update(data)
        self.size += len(data)
        return len(data)


def writer(trt: Any, sink: Sink) -> Any:
    """An IStreamWriter of the library that writes to `sink`."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any, *_size: int) -> int:
            return sink.take(data)

    return Writer()


class Phases:
    """Percent of a build from its nested phases: a step of an inner phase is a share of the step around it."""

    def __init__(self) -> None:
        self._open: dict[str, list[int]] = {}  # phase -> [steps done, steps], outermost first
        self.percent = 0

    def start(self, phase: str, steps: int) -> None:
        """A phase begins inside those that are open."""
        self._open[phase] = [0, max(steps, 1)]

    def finish(self, phase: str) -> None:
        """A phase ends."""
        self._open.pop(phase, None)

    def step(self, phase: str) -> int:
        """One step of `phase` is done; the percent of the whole, which never falls."""
        if phase in self._open:
            self._open[phase][0] += 1
        done, share = 0.0, 1.0
        for steps_done, steps in self._open.values():
            done += share * min(steps_done, steps) / steps
            share /= steps
        self.percent = max(self.percent, min(int(100 * done), 100))
        return self.percent


def monitor(trt: Any, send: Send) -> Any:
    """An IProgressMonitor of the library that sends {"percent": …} whenever it grows."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._phases.start(phase, steps)

        def phase_finish(self, phase: str) -> None:
            self._phases.finish(phase)

        def step_complete(self, phase: str, _step: int) -> bool:
            before, now = self._phases.percent, self._phases.step(phase)
            if now > before:
                send({"percent": now})
            return True

    return Monitor()
