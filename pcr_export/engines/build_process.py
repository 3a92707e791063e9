"""The process that builds one engine: it can be stopped at once, its crash is no crash of the job, its memory goes with it.

Run by child_process, it reads one job as JSON from its standard input and writes one JSON object a
line to its standard output: {"percent": …} as it goes, and at the end {"result": …} or {"error": …}.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcr_export.engines.builder_callbacks import (
    ACTIVATIONS,
    WEIGHTS,
    Log,
    Send,
    Sink,
    logger,
    monitor,
    one_line,
    writer,
)
from pcr_export.engines.flavours import Flavour, load_flavour
from pcr_export.engines.layer_dump import (
    HOST_JUMPS,
    POINTWISE,
    Kernel,
    count_kernels,
    parse_inspector,
    prove_int8,
)
from pcr_export.errors import PcrExportError
from pcr_export.read_files import MOST_CACHE_BYTES, read_bytes
from pcr_export.write_files import open_new, write_bytes


def main() -> None:
    """Build the job on standard input; the library's own prints go to standard error."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    try:
        send({"result": build(json.load(sys.stdin), send)})
    except PcrExportError as error:
        send({"error": str(error)})
    except OSError as error:
        send({"error": f"the engine can't be built here: {error}"})


@dataclass(frozen=True)
class Opened:
    """A parsed network and what must live as long as it does."""

    flavour: Flavour
    log: Log
    listener: Any  # the logger that the library writes to
    builder: Any
    network: Any
    parser: Any  # owns the network's weights
    seconds: float  # of parsing


def open_network(job: Mapping[str, Any]) -> Opened:
    """Parse the ONNX file of `job`.

    Raises:
        PcrExportError: the library is not installed, or its parser refuses.
    """
    flavour, log = load_flavour(job["flavour"]), Log()
    listener = logger(flavour.module, log)
    started = time.perf_counter()
    builder = flavour.module.Builder(listener)
    network, parser = _parse(flavour.module, builder, listener, log, job["onnx"])
    return Opened(flavour, log, listener, builder, network, parser, time.perf_counter() - started)


def build(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Parse, build and write the engine of `job`, and say what is in it.

    Args:
        job: flavour, target, onnx, engine, inputs (name -> min, opt, max shape), layers, timing_cache or None, stream.
        send: takes {"percent": 0 to 100} as the build advances.

    Raises:
        PcrExportError: the parser or the builder refuses; its first error.
    """
    opened = open_network(job)
    trt, log = opened.flavour.module, opened.log
    started = time.perf_counter()
    config = configure(opened, job)
    progress = monitor(trt, send)
    config.progress_monitor = progress
    size, sha256 = write_engine(opened, config, job)
    seconds = time.perf_counter() - started
    del progress  # the library borrows it until here
    if job["timing_cache"]:
        save_timing_cache(config, Path(job["timing_cache"]))
    kernels = log.kernels() or _inspect(trt, opened.listener, job)
    return {
        "version": opened.flavour.version,
        "engine_bytes": size,
        "engine_sha256": sha256,
        "kernels": len(kernels),
        "pointwise_kernels": sum(kernel.kind == POINTWISE for kernel in kernels),
        "kernel_table": count_kernels(kernels),
        "data_dependent": any(kernel.kind in HOST_JUMPS for kernel in kernels),
        "weight_bytes": log.bytes_of(WEIGHTS),
        "activation_bytes": log.bytes_of(ACTIVATIONS),
        "parse_seconds": round(opened.seconds, 3),
        "build_seconds": round(seconds, 3),
        "peak_bytes": peak_bytes(),
        "sites": prove_int8(kernels, job["layers"]),
    }


def peak_bytes() -> int | None:
    """The most memory that this process had resident, as Linux tells; None elsewhere."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(match[1]) * 1024 if match else None


def _parse(trt: Any, builder: Any, listener: Any, log: Log, onnx: str) -> tuple[Any, Any]:
    """The network and the parser, which owns its weights."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # needed on 10, ignored on 11
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, listener)
    if not parser.parse_from_file(onnx):
        raise PcrExportError(f"{onnx} is not parsed: {_parser_error(parser) or log.first_error()}")
    _decompose_attention(trt, network)
    return network, parser


def _parser_error(parser: Any) -> str | None:
    if not parser.num_errors:
        return None
    error = parser.get_error(0)
    # A refused operator has only the text of the failed check, "false".
    return f"{error.node_operator()} node {error.node_name()!r}, {error.code().name}: {one_line([error.desc()])}"


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


def configure(opened: Opened, job: Mapping[str, Any]) -> Any:
    """The builder's configuration for the target of `job`, with one profile of its input shapes."""
    trt, config = opened.flavour.module, opened.builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if opened.flavour.targets:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, job["target"].upper()), 0)
    add_profile(opened, config, job["inputs"])
    if job["timing_cache"]:
        load_timing_cache(config, Path(job["timing_cache"]))
    return config


def add_profile(opened: Opened, config: Any, shapes: Mapping[str, Any]) -> None:
    """One more optimization profile; `shapes` are each input's minimum, optimum and maximum by name."""
    profile = opened.builder.create_optimization_profile()
    for index in range(opened.network.num_inputs):
        tensor = opened.network.get_input(index)
        if any(size < 0 for size in tensor.shape):
            profile.set_shape(tensor.name, *(tuple(shape) for shape in shapes[tensor.name]))
    config.add_optimization_profile(profile)


def write_engine(opened: Opened, config: Any, job: Mapping[str, Any]) -> tuple[int, str]:
    """Build into the file of `job`; its size and sha256. Streamed where the library can: it then holds one copy less.

    Raises:
        PcrExportError: the builder refuses, or the file can't be written.
    """
    trt, builder, network = opened.flavour.module, opened.builder, opened.network
    with open_new(Path(job["engine"])) as file:
        sink = Sink(file.write)
        if job["stream"] and hasattr(builder, "build_serialized_network_to_stream"):
            done = builder.build_serialized_network_to_stream(network, config, writer(trt, sink))
        else:
            engine = builder.build_serialized_network(network, config)
            done = engine is not None and sink.take(memoryview(engine)) > 0
    if sink.error:
        raise PcrExportError(f"{job['engine']} can't be written: {sink.error}")
    if not done or sink.size == 0:
        what = f"{job['flavour']} does not build {job['onnx']} for {job['target']}"
        raise PcrExportError(f"{what}: {opened.log.first_error()}{advice(job)}")
    return sink.size, sink.sha256.hexdigest()


def advice(job: Mapping[str, Any]) -> str:
    """What to try where the builder fails: most of what it can't do it can't do for a range of sizes."""
    is_range = any(low != high for low, _, high in job["inputs"].values())
    return "; give each of --batch, --height and --width one size" if is_range else ""


def load_timing_cache(config: Any, path: Path) -> None:
    """Give the builder the tactics measured before; a cache that is missing, damaged or of another GPU becomes an empty one."""
    known = [read_bytes(path, most=MOST_CACHE_BYTES)] if path.is_file() else []
    for content in (*known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return


def save_timing_cache(config: Any, path: Path) -> None:
    """Write what the builder measured, through a temporary name."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    write_bytes(path, memoryview(cache.serialize()))


def _inspect(trt: Any, listener: Any, job: Mapping[str, Any]) -> list[Kernel]:
    """The kernels of the built engine by its inspector, at the optimum shapes: for a GPU host whose builder dumps none."""
    engine = trt.Runtime(listener).deserialize_cuda_engine(Path(job["engine"]).read_bytes())
    if engine is None:
        return []
    context, inspector = engine.create_execution_context(), engine.create_engine_inspector()
    for name, (_, best, _) in job["inputs"].items():
        context.set_input_shape(name, tuple(best))
    inspector.execution_context = context
    return parse_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    main()
