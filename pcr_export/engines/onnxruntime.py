"""onnxruntime on the CPU: the engine that runs everywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from pcr_export.engines.latency import Latency, measure_latency
from pcr_export.engines.onnx_files import check_model_files
from pcr_export.errors import PcrExportError, first_line
from pcr_export.usable_cpus import usable_cpus

QUIET = 3  # onnxruntime's log level for errors
LOAD_ERRORS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)
RUN_ERRORS = (state.Fail, state.InvalidArgument, state.RuntimeException, ValueError, RuntimeError)


class OnnxRuntimeEngine:
    """A denoiser's ONNX file in an onnxruntime session; open inside `with`.

    Args:
        path: the model file; its external data lies beside it.
        threads: of one operator; None: one per physical core, or those that this process may use.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = path
        self.threads = threads
        self._session: onnxruntime.InferenceSession | None = None

    def __enter__(self) -> OnnxRuntimeEngine:
        check_model_files(self.path)
        try:
            self._session = onnxruntime.InferenceSession(self.path, _options(self.threads), ["CPUExecutionProvider"])
        except LOAD_ERRORS as error:
            raise PcrExportError(
                f"onnxruntime cannot load {self.path} ({first_line(error)}): export the model again"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """The open session."""
        if self._session is None:
            raise RuntimeError("OnnxRuntimeEngine is used inside `with`")
        return self._session

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output for one step: float32, a copy of its own. `inputs` are arrays by name, the timestep of rank 0.

        Raises:
            PcrExportError: an input is missing, unknown, or of the wrong type or shape.
        """
        feed = {name: np.asarray(value) for name, value in inputs.items()}
        expected = {each.name for each in self.session.get_inputs()}
        if feed.keys() != expected:
            raise PcrExportError(f"{self.path.name} takes the inputs {sorted(expected)}, not {sorted(feed)}")
        try:
            return np.array(self.session.run(None, feed)[0])
        except RUN_ERRORS as error:
            raise PcrExportError(f"{self.path.name} does not run on these inputs: {first_line(error)}") from error

    def latency(self, inputs: Mapping[str, np.ndarray], runs: int) -> Latency:
        """Wall time of `runs` calls after a few that warm up."""
        feed = {name: np.asarray(value) for name, value in inputs.items()}
        self.run(feed)
        return measure_latency(lambda: self.session.run(None, feed), runs)


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = QUIET
    usable = usable_cpus()
    if threads is not None or usable < (os.cpu_count() or 1):  # left to itself, onnxruntime counts the machine's cores
        options.intra_op_num_threads = usable if threads is None else threads
    if not _has_vnni():
        # u8 x s8 kernels without VNNI add pairs in 16 bits and saturate; this picks exact ones at half the speed.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _has_vnni() -> bool:
    """Whether the processor is known to multiply u8 x s8 exactly; only Linux tells."""
    information = Path("/proc/cpuinfo")
    return information.exists() and "vnni" in information.read_text("utf-8", "replace")
