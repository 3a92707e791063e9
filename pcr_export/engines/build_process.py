"""The process that builds one engine: it can be stopped at once, its crash is no crash of the job, its memory goes with it.

`python -m pcr_export.engines.build_process` reads one job as JSON from its standard input and writes one JSON object a
line to its standard output: {"percent": …} as it goes, and at the end {"result": …} or {"error": …}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pcr_export.engines.flavours import Flavour, load_flavour
from pcr_export.engines.layer_dump import (
    HOST_JUMPS,
    POINTWISE,
    Kernel,
    count_kernels,
    parse_dump,
    parse_inspector,
    prove_int8,
)
from pcr_export.errors import PcrExportError

Send = Callable[[Mapping[str, Any]], None]
_WEIGHTS, _ACTIVATIONS = "Total Weights Memory: ", "Total Activation Memory: "
_DUMPS = ("Layers:", "Engine Layer Information")
_NO_GPU_ASIDE = "catchCudaError"
_KEPT = (*_DUMPS, _WEIGHTS, _ACTIVATIONS)


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
        return _one_line(self.errors)


def main() -> None:
    """Build the job on standard input; the library's own prints go to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and kills
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    try:
        send({"result": build(json.load(sys.stdin), send)})
    except PcrExportError as error:
        send({"error": str(error)})


def build(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Parse, build and write the engine of `job`, and say what is in it.

    Args:
        job: flavour, target, onnx, engine, inputs (name -> min, opt, max shape), layers, timing_cache or None, stream.
        send: takes {"percent": 0 to 100} as the build advances.

    Raises:
        PcrExportError: the parser or the builder refuses; its first error.
    """
    flavour, log = load_flavour(job["flavour"]), Log()
    trt, logger = flavour.module, _logger(flavour.module, log)
    started = time.perf_counter()
    builder = trt.Builder(logger)
    network, parser = _parse(trt, builder, logger, log, job["onnx"])
    parsed = time.perf_counter()
    config = _configure(flavour, builder, network, job)
    config.progress_monitor = monitor = _monitor(trt, send)
    size, sha256 = _write(trt, builder, network, config, log, job)
    built = time.perf_counter()
    del monitor, parser
    if job["timing_cache"]:
        _save_timing_cache(config, Path(job["timing_cache"]))
    kernels = log.kernels() or _inspect(trt, logger, job)
    return {
        "version": flavour.version,
        "engine_bytes": size,
        "engine_sha256": sha256,
        "kernels": len(kernels),
        "pointwise_kernels": sum(kernel.kind == POINTWISE for kernel in kernels),
        "kernel_table": count_kernels(kernels),
        "data_dependent": any(kernel.kind in HOST_JUMPS for kernel in kernels),
        "weight_bytes": log.bytes_of(_WEIGHTS),
        "activation_bytes": log.bytes_of(_ACTIVATIONS),
        "parse_seconds": round(parsed - started, 3),
        "build_seconds": round(built - parsed, 3),
        "peak_bytes": peak_bytes(),
        "sites": prove_int8(kernels, job["layers"]),
    }


def peak_bytes() -> int | None:
    """The most memory that this process had resident, as Linux tells; None elsewhere."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else None


def _parse(trt: Any, builder: Any, logger: Any, log: Log, onnx: str) -> tuple[Any, Any]:
    """The network and the parser, which owns its weights."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # needed on 10, ignored on 11
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(onnx):
        raise PcrExportError(f"{onnx} is not parsed: {_parser_error(parser) or log.first_error()}")
    _decompose_attention(trt, network)
    return network, parser


def _parser_error(parser: Any) -> str | None:
    if not parser.num_errors:
        return None
    error = parser.get_error(0)
    # A refused operator has only the text of the failed check, "false".
    return f"{error.node_operator()} node {error.node_name()!r}, {error.code().name}: {_one_line([error.desc()])}"


def _one_line(messages: Sequence[str]) -> str:
    """The first message that tells something, without the aside that this machine has no GPU."""
    for message in messages:
        lines = [line.strip() for line in message.splitlines() if _NO_GPU_ASIDE not in line]
        if any(lines):
            return " ".join(lines)[:400]
    return "no reason given"


def _decompose_attention(trt: Any, network: Any) -> None:
    """Let attention without a fused kernel become products and a softmax, where this version would refuse it."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the binding's way to cast down
            layer.attention.decomposable = True


def _configure(flavour: Flavour, builder: Any, network: Any, job: Mapping[str, Any]) -> Any:
    trt, config = flavour.module, builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if flavour.targets:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job["target"].upper()), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if any(size < 0 for size in tensor.shape):
            profile.set_shape(tensor.name, *(tuple(shape) for shape in job["inputs"][tensor.name]))
    config.add_optimization_profile(profile)
    if job["timing_cache"]:
        cache = Path(job["timing_cache"])
        config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.exists() else b""), False)
    return config


def _write(trt: Any, builder: Any, network: Any, config: Any, log: Log, job: Mapping[str, Any]) -> tuple[int, str]:
    """Build into the file; its size and sha256. Streamed where the library can: it then holds one copy less."""
    with Path(job["engine"]).open("wb") as file:
        sink = Sink(file.write)
        if job["stream"] and hasattr(builder, "build_serialized_network_to_stream"):
            done = builder.build_serialized_network_to_stream(network, config, _writer(trt, sink))
        else:
            engine = builder.build_serialized_network(network, config)
            done = engine is not None and sink.take(memoryview(engine)) > 0
    if sink.error:
        raise PcrExportError(f"{job['engine']} can't be written: {sink.error}")
    if not done or sink.size == 0:
        raise PcrExportError(f"{job['flavour']} does not build {job['onnx']} for {job['target']}: {log.first_error()}")
    return sink.size, sink.sha256.hexdigest()


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


def _writer(trt: Any, sink: Sink) -> Any:
    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: Any, *_size: int) -> int:
            return sink.take(data)

    return Writer()


def _logger(trt: Any, log: Log) -> Any:
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


def _monitor(trt: Any, send: Send) -> Any:
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


def _save_timing_cache(config: Any, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
    os.replace(temporary, path)


def _inspect(trt: Any, logger: Any, job: Mapping[str, Any]) -> list[Kernel]:
    """The kernels of the built engine by its inspector, at the optimum shapes: for a GPU host whose builder dumps none."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(job["engine"]).read_bytes())
    if engine is None:
        return []
    context, inspector = engine.create_execution_context(), engine.create_engine_inspector()
    for name, (_, best, _) in job["inputs"].items():
        context.set_input_shape(name, tuple(best))
    inspector.execution_context = context
    return parse_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    main()
