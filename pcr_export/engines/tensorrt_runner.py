"""TensorRT and TensorRT-RTX engines on a GPU: load, check, run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcr_export.engines.engine_record import EngineRecord, check_current, read_engine_record
from pcr_export.engines.flavours import Flavour, gpu_target, load_flavour
from pcr_export.engines.input_ranges import check_input_ranges, is_within
from pcr_export.engines.latency import Latency, measure_latency
from pcr_export.errors import PcrExportError
from pcr_export.read_files import MOST_CACHE_BYTES, check_regular, read_bytes
from pcr_export.write_files import write_bytes

NO_GPU = "no CUDA GPU here: run the onnxruntime engine, or copy the folder to a GPU host"
DTYPES = {  # by the name of TensorRT's DataType
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorRtEngine:
    """A denoiser's engine on this machine's first GPU; open inside `with`.

    CUDA memory, streams and graphs are torch's: it is a dependency anyway, and the pipeline's tensors are its own.

    Args:
        path: the .engine file; its record lies beside it as .json.
        onnx_path: the ONNX file that it must have been built from; None: not compared.

    Raises on entry:
        PcrExportError: the engine or its record is missing, damaged or stale, its library is not installed, or there is no GPU.
    """

    def __init__(self, path: Path, onnx_path: Path | None = None) -> None:
        self.path, self.onnx_path = path, onnx_path
        self._record: EngineRecord | None = None
        self._program: _Program | None = None

    def __enter__(self) -> TensorRtEngine:
        record = read_engine_record(self.path.with_suffix(".json"))
        flavour = load_flavour(record.flavour)
        gpu = gpu_target()
        check_current(record, self.path, flavour=flavour, gpu=gpu, onnx_path=self.onnx_path)
        require_gpu(gpu)
        self._record, self._program = record, _Program(self.path, record, flavour)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._program = None

    @property
    def record(self) -> EngineRecord:
        """What the engine was built with and for."""
        if self._record is None:
            raise RuntimeError("TensorRtEngine is used inside `with`")
        return self._record

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output for one step, on the GPU, a copy of its own; inputs by name from any device, the timestep of rank 0.

        Raises:
            PcrExportError: an input is missing or unknown, or its shape lies outside what the engine was built for.
        """
        return self._bind(inputs).run(inputs).clone()

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same for arrays; float32, a copy of its own."""
        output = self({name: torch.from_numpy(np.array(value)) for name, value in inputs.items()})
        return output.float().cpu().numpy()

    def latency(self, inputs: Mapping[str, np.ndarray], runs: int) -> Latency:
        """Wall time of `runs` calls after a few that warm up, from the launch to the GPU's end; inputs lie on the GPU already."""
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        call = self._bind(tensors)
        call.run(tensors)
        return measure_latency(call.launch_and_wait, runs)

    def _bind(self, inputs: Mapping[str, Tensor]) -> _Call:
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        check_input_ranges(self.path.name, self.record, shapes)
        if self._program is None:
            raise RuntimeError("TensorRtEngine is used inside `with`")
        return self._program.bind(shapes)


def require_gpu(gpu: str | None) -> None:
    """Refuse a machine without a GPU (None), and a torch that can't use the GPU that is there.

    Raises:
        PcrExportError: what to do instead.
    """
    if gpu is None:
        raise PcrExportError(NO_GPU)
    if not torch.cuda.is_available():
        raise PcrExportError(f"torch {torch.__version__} can't use this machine's {gpu}: install its CUDA build")


class _Program:
    """The deserialized engine, and its call for the shapes that are in use."""

    def __init__(self, path: Path, record: EngineRecord, flavour: Flavour) -> None:
        self.trt = flavour.module
        self.record = record
        self.log = _make_log(self.trt)
        self.runtime = self.trt.Runtime(self.log)  # must outlive the engine
        check_regular(path, advice=f"build it again with {record.rebuild_command}")
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            raise PcrExportError(
                f"{path} does not load ({self.log.last()}): build it again with {record.rebuild_command}"
            )
        self.stream = torch.cuda.Stream()
        self.jit = _Jit(self, path.with_suffix(".jit")) if hasattr(self.trt, "CudaGraphStrategy") else None
        self.contexts: dict[int, Any] = {}  # by optimization profile
        self.call: _Call | None = None

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> _Call:
        """The call for these input shapes. Only the last one is kept: a context holds the shapes of one."""
        if self.call is None or self.call.shapes != shapes:
            self.call = None  # frees its buffers and its graph
            self.call = _Call(self, self._context(self._profile(shapes)), shapes)
            if self.jit is not None:
                self.jit.save()
        return self.call

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        if self.engine.num_optimization_profiles == 1:
            return 0  # that of the record, by which the shapes were checked
        for profile in range(self.engine.num_optimization_profiles):
            ranges = {name: self.engine.get_tensor_profile_shape(name, profile) for name in shapes}
            if all(is_within(shape, ranges[name][0], ranges[name][2]) for name, shape in shapes.items()):
                return profile
        raise PcrExportError(
            f"no profile of the engine holds {dict(shapes)}: build it with {self.record.rebuild_command}"
        )

    def _context(self, profile: int) -> Any:
        if profile not in self.contexts:
            arguments = [] if self.jit is None else [self.jit.config]
            context = self.engine.create_execution_context(*arguments)
            if context is None:
                raise PcrExportError(f"the engine gets no memory ({self.log.last()}): close other programs on this GPU")
            if profile:
                self.check(context.set_optimization_profile_async(profile, self.stream.cuda_stream))
                self.stream.synchronize()
            self.contexts[profile] = context
        return self.contexts[profile]

    def check(self, done: bool) -> None:
        """Raise what TensorRT logged where one of its calls says that it failed."""
        if not done:
            raise PcrExportError(
                f"the engine does not run ({self.log.last()}): build it with {self.record.rebuild_command}"
            )


class _Jit:
    """What only TensorRT-RTX has: it compiles kernels when a context is made and when new shapes come.

    The compiled kernels are kept in a file beside the engine. Kernels for the very shapes are compiled at once, so that the first
    call has the kernels of the last. CUDA graphs are RTX's own: it captures anew where kernels, shapes or addresses change.
    """

    def __init__(self, program: _Program, path: Path) -> None:
        self.path = path
        trt, record = program.trt, program.record
        self.config = program.engine.create_runtime_config()
        graphs = trt.CudaGraphStrategy
        self.config.cuda_graph_strategy = graphs.DISABLED if record.data_dependent else graphs.WHOLE_GRAPH_CAPTURE
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self.config.dynamic_shapes_kernel_specialization_strategy = eager
        self.cache = self.config.create_runtime_cache()  # the configuration does not keep it alive
        if path.is_file():
            self.cache.deserialize(
                read_bytes(path, most=MOST_CACHE_BYTES)
            )  # False, and no harm, where another version or GPU wrote it
        self.config.set_runtime_cache(self.cache)

    def save(self) -> None:
        """Write the compiled kernels; a folder that can't be written costs the next start its time, nothing else."""
        with contextlib.suppress(OSError):
            write_bytes(self.path, memoryview(self.cache.serialize()))


class _Call:
    """One set of input shapes: buffers of a fixed address, and on TensorRT the CUDA graph that replays the launch."""

    def __init__(self, program: _Program, context: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.program, self.context, self.shapes = program, context, dict(shapes)
        engine, trt = program.engine, program.trt
        self.inputs = {name: self._buffer(name, shape) for name, shape in shapes.items()}
        for name, buffer in self.inputs.items():
            program.check(context.set_input_shape(name, tuple(buffer.shape)))
            program.check(context.set_tensor_address(name, buffer.data_ptr()))
        program.check(not context.infer_shapes())
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        (name,) = (name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
        self.output = self._buffer(name, self._output_shape(name))
        program.check(context.set_tensor_address(name, self.output.data_ptr()))
        self.graph: torch.cuda.CUDAGraph | None = None
        torch.cuda.current_stream().synchronize()  # the buffers are on the current stream, the launches are not
        self._launch()  # TensorRT wants one launch with new shapes before a capture
        program.stream.synchronize()
        on_gpu = all(buffer.is_cuda for buffer in self.inputs.values())  # what the host reads, a graph would freeze
        if program.jit is None and on_gpu and not program.record.data_dependent:
            self.graph = self._capture()

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Copy `inputs` in and launch; the output is this call's buffer, ready on the current stream."""
        stream, current = self.program.stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for name, buffer in self.inputs.items():
                buffer.copy_(inputs[name])
            self.launch()
        current.wait_stream(stream)
        return self.output

    def launch_and_wait(self) -> None:
        """Launch once more on the inputs that are there, and wait for the GPU."""
        self.launch()
        self.program.stream.synchronize()

    def launch(self) -> None:
        """Launch on the program's stream."""
        if self.graph is None:
            self._launch()
        else:
            with torch.cuda.stream(self.program.stream):
                self.graph.replay()

    def _launch(self) -> None:
        self.program.check(self.context.execute_async_v3(self.program.stream.cuda_stream))

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.program.stream):
            self._launch()
        return graph

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        engine, trt = self.program.engine, self.program.trt
        device = "cpu" if engine.get_tensor_location(name) == trt.TensorLocation.HOST else "cuda"
        return torch.zeros(shape, dtype=DTYPES[engine.get_tensor_dtype(name).name], device=device)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        """As TensorRT infers it; an axis that it knows only after the run (-1) is the first input's: a denoiser's output is its like."""
        first = self.shapes[next(iter(self.program.record.inputs))]
        inferred = tuple(self.context.get_tensor_shape(name))
        return tuple(first[axis] if size < 0 else size for axis, size in enumerate(inferred))


def _make_log(trt: Any) -> Any:
    """A logger that keeps the errors for the exception's one line."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def last(self) -> str:
            return self.errors[-1].splitlines()[0] if self.errors else "no reason given"

    return Log()
