"""What Polygraphy needs to run and compare this package's engines: inputs, runners and a measure."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcr_export.engines.onnxruntime import OnnxRuntimeEngine
from pcr_export.engines.tensorrt_runner import TensorRtEngine
from pcr_export.engines.timing import Feed
from pcr_export.errors import PcrExportError

try:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.common import TensorMetadata
    from polygraphy.comparator import Comparator, IterationResult, RunResults
    from polygraphy.logger import G_LOGGER
except ModuleNotFoundError as missing:
    raise PcrExportError("compare needs polygraphy: pip install polygraphy") from missing

__all__ = [
    "G_LOGGER",
    "Comparator",
    "EngineRunner",
    "RunResults",
    "SeededInputs",
    "measure_distance",
    "onnx_runner",
]

OTHER_SIZE = 8  # of a symbolic axis whose size nobody tells


class SeededInputs:
    """The same inputs at several timesteps, as Polygraphy's data loader: it is told the runner's inputs and iterated anew by each.

    Args:
        sizes: of symbolic axes; an axis that is not in it has OTHER_SIZE.
        timesteps: float32 [calls], fed to the input of rank 0.
        seed: of the standard normal numbers; integer inputs are 0 or 1.
    """

    def __init__(self, sizes: Mapping[str, int], timesteps: np.ndarray, seed: int) -> None:
        self.sizes, self.timesteps, self.seed = sizes, timesteps, seed
        self.input_metadata = TensorMetadata()

    def __iter__(self) -> Iterator[Feed]:
        for timestep in self.timesteps:
            rng = np.random.default_rng(self.seed)
            feed = {name: self._array(rng, each) for name, each in self.input_metadata.items()}
            yield {name: np.array(timestep, x.dtype) if x.ndim == 0 else x for name, x in feed.items()}

    def _array(self, rng: np.random.Generator, metadata: Any) -> np.ndarray:
        shape = [axis if isinstance(axis, int) else self.sizes.get(str(axis), OTHER_SIZE) for axis in metadata.shape]
        dtype = metadata.dtype.numpy()
        if np.issubdtype(dtype, np.floating):
            return np.asarray(rng.standard_normal(shape), dtype)
        return np.asarray(rng.integers(0, 2, shape), dtype)


class EngineRunner(BaseRunner):
    """A TensorRtEngine as Polygraphy's runner; it takes the inputs that `inputs` was told of before."""

    def __init__(self, name: str, engine: TensorRtEngine, inputs: SeededInputs) -> None:
        super().__init__(name=name)
        self.engine, self.metadata = engine, inputs.input_metadata

    def activate_impl(self) -> None:
        """Load the engine."""
        self.engine.__enter__()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs."""
        return self.metadata

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, np.ndarray]:
        """The one output; sets the seconds that the call took."""
        start = time.perf_counter()
        output = self.engine.run(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict(output=output)

    def deactivate_impl(self) -> None:
        """Free the engine."""
        self.engine.__exit__(None, None, None)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Of an output from its reference; Polygraphy takes it for a match, whatever the figures: compare reports, it never fails."""

    sqnr_db: float
    max_abs: float


def measure_distance(reference: IterationResult, result: IterationResult) -> OrderedDict[str, Distance]:
    """Polygraphy's comparison function: how far the one output of `result` is from that of `reference`."""
    (name,), (exact,), (other,) = reference, reference.values(), result.values()
    difference = other.astype(np.float64) - exact
    signal, noise = np.square(exact, dtype=np.float64).sum(), np.square(difference).sum()
    sqnr = math.inf if noise == 0 else 10 * (math.log10(max(signal, 1e-300)) - math.log10(noise))
    return OrderedDict({name: Distance(sqnr_db=sqnr, max_abs=float(np.abs(difference).max()))})


def onnx_runner(name: str, path: Path, threads: int | None) -> OnnxrtRunner:
    """Polygraphy's own runner on a session with this package's options; it opens the session when its turn comes."""
    return OnnxrtRunner(lambda: OnnxRuntimeEngine(path, threads).__enter__().session, name=name)
